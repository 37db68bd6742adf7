"""What several tests of the reference's arithmetic read."""

from pathlib import Path

import pytest

from sized import FAMILY, SIZES
from tiny import save_checkpoint


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family, by its name."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(root / name, name, **SIZES, **extra) for name, extra in FAMILY.items()}
