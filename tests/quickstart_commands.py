"""The commands of `make quickstart`, and the folder in which its first has made model and pairs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from made_once import made_once

ROOT = Path(__file__).parents[1]
MADE = Path("outputs/quickstart")


def recipe() -> list[list[str]]:
    """The commands of the Makefile's target, with this interpreter in place of the environment's."""
    lines = (
        (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nquickstart: $(VENV)")[2].splitlines()[1:]
    )
    commands = [line.strip() for line in lines[: lines.index("")]]
    python = f"{sys.executable} "
    return [
        command.replace("$(BIN)/python ", python).replace("$(BIN)/fiducial ", f"{python}-m fiducial ").split()
        for command in commands
    ]


def run(command: list[str], folder: Path) -> str:
    """What `command` prints in `folder`."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def made_by_quickstart(factory: pytest.TempPathFactory) -> Path:
    """A folder as a clone is after the recipe's first command: one for all tests, which leave it as it is."""

    def make(folder: Path) -> None:
        (folder / "examples").symlink_to(ROOT / "examples")
        run(recipe()[0], folder)

    return made_once(factory, "quickstart", make)
