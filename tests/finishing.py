"""What tests of finished runs share: runs of every kind; copying a folder, changing a weight, the command."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from fiducial import cli
from fiducial.run_record import RECORD_FILE
from fiducial.train import TrainResult
from run_configs import run_config
from tiny import save_adapter

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}
SYNCED = {"schedule": "synced", "mixup_alpha": 0.5, "sync_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, live": {"reference": {"source": "separate_model", "schedule": "live"}},
    "lora": LORA,
    "resumed adapter": LORA | {"lora_r": None, "lora_model_dir": "sft"},
    "synced": {"reference": SYNCED, "learning_rate": 1e-2},
    "synced lora": LORA | {"reference": SYNCED | {"mixup_alpha": 1.0}},
}
QUIET = Console(quiet=True)

Finished = Callable[[str], tuple[Path, TrainResult]]
"""From a kind of run to the folder of one that was trained, and how it ended."""


def settings_of(folder: Path, kind: str) -> dict[str, Any]:
    settings = run_config(folder, rows=16, val_set_size=4, save_steps=2, **KINDS[kind])
    if "lora_model_dir" in settings:
        if not (folder / "sft").exists():
            save_adapter(folder / "sft", folder / "base-llama")
        settings["lora_model_dir"] = str(folder / "sft")
    return settings


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
