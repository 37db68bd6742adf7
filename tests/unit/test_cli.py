"""The command: what it prints, which exit code it ends with, and how little it loads."""

import errno
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer
from typer.testing import CliRunner, Result

import fiducial
from fiducial import cli
from fiducial.config.load import validate_config
from fiducial.config.method_keys import HYPERPARAMETERS
from fiducial.config.methods import METHODS
from fiducial.errors import ConfigError, FiducialError, ModelError, TrainingError
from processor_time import times_the_imports
from tiny import save_checkpoint

COMMANDS = ("train", "plan", "preprocess", "evaluate", "verify", "merge", "losses")
Fiducial = Callable[..., Result]


@pytest.fixture
def fiducial_command() -> Fiducial:
    """Runs the command in this process."""
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes loading a run raise an error of the test's choice."""

    def make(error: BaseException) -> None:
        def load_run(path: str, overrides: object) -> Any:
            raise error

        monkeypatch.setattr("fiducial.config.load.load_run", load_run)

    return make


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which says on stderr what it imported."""
    program = (
        "import atexit, sys; from fiducial.cli import main\n"
        "heavy = lambda: sorted({'torch', 'transformers'} & set(sys.modules))\n"
        "atexit.register(lambda: print('HEAVY', heavy(), file=sys.stderr))\n"
        "main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )


def test_version(fiducial_command: Fiducial) -> None:
    result = fiducial_command("--version")

    assert result.exit_code == 0
    assert result.stdout.strip() == f"fiducial {fiducial.__version__}"


def test_help_lists_every_command(fiducial_command: Fiducial) -> None:
    result = fiducial_command("--help")

    assert result.exit_code == 0
    assert all(f" {command} " in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(fiducial_command: Fiducial, command: str) -> None:
    result = fiducial_command(command, "-h")

    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_every_argument_and_option_is_explained() -> None:
    commands = cast(Any, typer.main.get_command(cli.app)).commands
    every = [*commands.values(), *commands["cache"].commands.values()]

    assert {command.name for command in every} > {"train", "explain"}
    for command in every:
        assert all(parameter.help for parameter in command.params), command.name


def test_losses_lists_methods_with_hyperparameters_and_papers(fiducial_command: Fiducial) -> None:
    text = " ".join(fiducial_command("losses").stdout.split())

    assert all(method.paper in text for method in METHODS)
    assert all(key in text for key in HYPERPARAMETERS)
    assert "dpo_label_smoothing 0 ≥ 0, < 0.5 Probability" in text
    assert "rl_beta 2 > 0" in text
    assert text.count("LD-DPO: weight of") == text.count("RPO: weight of") == 1, (
        "modifiers are explained once"
    )
    assert "SLiC" in text
    assert text.count("needs no reference") == sum(not method.needs_reference for method in METHODS)


@pytest.mark.parametrize("error", [ConfigError("rl: dop is no method."), ModelError("no such folder.")])
def test_a_users_mistake_is_a_message_and_code_2(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None], error: FiducialError
) -> None:
    failing(error)

    result = fiducial_command("train", "run.yaml")

    assert result.exit_code == 2
    assert result.stderr.strip() == f"{type(error).__name__.removesuffix('Error')} error: {error}"
    assert result.stdout == ""


def test_our_bug_is_code_1_and_asks_for_a_report(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None]
) -> None:
    failing(AssertionError("an invariant"))

    result = fiducial_command("train", "run.yaml")

    assert result.exit_code == 1
    assert "AssertionError: an invariant" in result.stderr
    assert "report" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [TrainingError("NaN"), RuntimeError("ours"), OSError(errno.ENOSPC, "full")])
def test_debug_shows_the_traceback(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None], error: Exception
) -> None:
    failing(error)

    result = fiducial_command("train", "run.yaml", "--debug")

    assert "Traceback (most recent call last)" in result.stderr
    assert result.exit_code == (1 if isinstance(error, RuntimeError) else 2)


def test_a_full_disk_is_named_and_code_2(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None]
) -> None:
    failing(OSError(errno.ENOSPC, "No space left on device", "outputs/model.safetensors"))

    result = fiducial_command("train", "run.yaml")

    assert result.exit_code == 2
    assert "No space left on device: outputs/model.safetensors" in result.stderr


def test_another_machine_error_is_ours(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None]
) -> None:
    failing(OSError(errno.EBADF, "Bad file descriptor"))

    assert fiducial_command("train", "run.yaml").exit_code == 1


def test_ctrl_c_is_code_130_and_says_how_to_go_on(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None]
) -> None:
    failing(KeyboardInterrupt())

    result = fiducial_command("train", "run.yaml", "a b=1")

    assert result.exit_code == 130
    assert "fiducial train run.yaml 'a b=1' auto_resume_from_checkpoints=true" in result.stderr

    again = fiducial_command("train", "run.yaml", "auto_resume_from_checkpoints=true")

    assert again.stderr.count("auto_resume_from_checkpoints=true") == 1


def test_an_interrupted_trainer_speaks_for_itself(
    fiducial_command: Fiducial, failing: Callable[[BaseException], None]
) -> None:
    failing(KeyboardInterrupt("Stopped at step 3; the checkpoint is in out/checkpoint-3."))

    result = fiducial_command("train", "run.yaml")

    assert result.exit_code == 130
    assert result.stderr.strip() == "Stopped at step 3; the checkpoint is in out/checkpoint-3."


@pytest.mark.parametrize(
    ("command", "function", "handed"),
    [
        ("train", "fiducial.train.train", "settings"),
        ("preprocess", "fiducial.train.preprocess", "config"),
        ("evaluate", "fiducial.evaluate.evaluate", "config"),
        ("verify", "fiducial.verification.verify", "config"),
    ],
)
def test_a_command_hands_the_loaded_run_to_its_function(
    fiducial_command: Fiducial, monkeypatch: pytest.MonkeyPatch, command: str, function: str, handed: str
) -> None:
    given: list[Any] = []
    run = validate_config({"base_model": "."})
    loaded = SimpleNamespace(config=run, notes=("a note",), settings="its settings")

    def load_run(path: str, overrides: list[str]) -> Any:
        given.append((path, overrides))
        return loaded

    monkeypatch.setattr("fiducial.config.load.load_run", load_run)
    monkeypatch.setattr(function, given.append)

    result = fiducial_command(command, "run.yaml", "rl_beta=0.2", "datasets.0.split=train[:1]")

    assert result.exit_code == 0, result.stderr
    assert given == [("run.yaml", ["rl_beta=0.2", "datasets.0.split=train[:1]"]), getattr(loaded, handed)]
    assert "note: a note" in result.stderr


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_of_the_seconds_of_imports(
    fiducial_command: Fiducial, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    loaded = SimpleNamespace(config=validate_config({"base_model": "."}), notes=(), settings={})
    monkeypatch.setattr("fiducial.config.load.load_run", lambda path, overrides: loaded)
    monkeypatch.setattr("fiducial.train.train", lambda settings: None)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")

    result = fiducial_command("train", "run.yaml")

    assert ("Loading torch" in result.stderr) == terminal
    assert result.stdout == ""


def test_one_process_of_many_speaks(fiducial_command: Fiducial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")

    assert fiducial_command("losses").stdout == ""


@pytest.mark.parametrize(("launched", "local_rank", "waits"), [(1, "1", 1), (1, "0", 0), (0, "1", 0)])
def test_where_torchrun_ends_the_others_a_machines_first_process_speaks_first(
    fiducial_command: Fiducial,
    failing: Callable[[BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
    launched: int,
    local_rank: str,
    waits: int,
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    failing(ConfigError("rl_betta: unknown key"))
    ended = fiducial_command("train", "run.yaml")
    assert (ended.exit_code, len(waited)) == (2, waits)
    assert "rl_betta: unknown key" in ended.stderr, "what failed here alone is still said"


def write_run(folder: Path, **settings: object) -> Path:
    """A complete run of a tiny checkpoint, as a file."""
    save_checkpoint(folder / "base")
    row = {"prompt": "Hello", "chosen": " you.", "rejected": " no."}
    (folder / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    run = {
        "base_model": str(folder / "base"),
        "rl": "dpo",
        "datasets": [{"path": str(folder / "pairs.jsonl")}],
        "learning_rate": 1e-4,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "output_dir": str(folder / "out"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(run | settings), encoding="utf-8")  # JSON is YAML
    return path


def test_plan_prints_the_reference_and_why(fiducial_command: Fiducial, tmp_path: Path) -> None:
    result = fiducial_command("plan", str(write_run(tmp_path)))

    assert result.exit_code == 0, result.stderr
    assert "initial_policy" in result.stdout
    assert "precomputed" in result.stdout


def test_plan_as_json_is_the_same_as_data(fiducial_command: Fiducial, tmp_path: Path) -> None:
    result = fiducial_command("plan", "--json", str(write_run(tmp_path)), "rl=orpo")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["reference"]["source"] == "none"


def test_every_mistake_of_a_file_is_listed(fiducial_command: Fiducial, tmp_path: Path) -> None:
    result = fiducial_command("plan", str(write_run(tmp_path, rl_betta=0.2, sequence_len=-1)))

    assert result.exit_code == 2
    assert "rl_betta" in result.stderr
    assert "rl_beta" in result.stderr.replace("rl_betta", "")
    assert "sequence_len" in result.stderr


def test_planning_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    run = str(write_run(tmp_path))

    done = fresh("plan", run)

    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr
    assert times_the_imports(lambda: fresh("plan", run)) < 6, "more than a second"


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["losses"], ["train", "--help"]])
def test_looking_around_loads_no_torch(arguments: list[str]) -> None:
    done = fresh(*arguments)

    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stderr


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fiducial", "--version"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=True,
    )

    assert done.stdout.strip() == f"fiducial {fiducial.__version__}"


def test_a_terminal_without_our_letters_ends_no_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fiducial", "losses"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout


def test_ctrl_c_while_the_command_is_imported_shows_no_traceback() -> None:
    program = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from fiducial.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_the_installed_command_begins_where_ctrl_c_is_heard() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))

    assert project["project"]["scripts"] == {"fiducial": "fiducial.__main__:main"}
