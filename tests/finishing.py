"""What tests of finished runs do: copy a run's folder, change a weight, call the command."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fiducial import cli
from fiducial.run_record import RECORD_FILE


def fiducial_command(*arguments: object) -> Result:
    """Runs the command in this process, on a wide terminal."""
    given = [str(argument) for argument in arguments]
    return CliRunner(env={"COLUMNS": "250"}).invoke(cli.app, given, catch_exceptions=False)


def copied(folder: Path, target: Path) -> Path:
    """The run's folder at another place, with paths of its record turned there."""
    shutil.copytree(folder, target)
    for path in target.rglob(RECORD_FILE):
        path.write_text(path.read_text().replace(str(folder), str(target)))
    return target


def change_one_weight(file: Path) -> None:
    weights = load_file(file)
    name = next(name for name in sorted(weights) if "lora_A" in name or name.endswith("q_proj.weight"))
    weights[name][0, 0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
