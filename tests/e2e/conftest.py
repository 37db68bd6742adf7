"""Runs that several files look at."""

from pathlib import Path

import pytest

from fiducial.train import TrainResult, train
from finishing import QUIET, Finished, settings_of


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A trained run of each kind, made once, and its folder. Whoever changes it copies it first."""
    made: dict[str, tuple[Path, TrainResult]] = {}

    def make(kind: str) -> tuple[Path, TrainResult]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("run")
            made[kind] = folder, train(settings_of(folder, kind), console=QUIET)
        return made[kind]

    return make
