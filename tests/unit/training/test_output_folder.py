"""A run's output folder is looked at before anything is read."""

from pathlib import Path
from typing import Any

import pytest

from fiducial.config.load import validate_config
from fiducial.errors import ConfigError
from fiducial.training.output_folder import ADAPTER_FILES, MODEL_FILES, make_output_folder

LORA = {"adapter": "lora"}


def made(folder: Path, **settings: Any) -> Path:
    return make_output_folder(validate_config({"base_model": "m", "output_dir": str(folder), **settings}))


def test_it_is_made_with_its_parents(tmp_path: Path) -> None:
    assert made(tmp_path / "a" / "b").is_dir()
    assert made(tmp_path / "a" / "b").is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"output_dir: {path} is no folder and cannot become one: "):
            made(path)


def test_a_folder_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="may not be written to"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("settings", "others"), [({}, ADAPTER_FILES), (LORA, MODEL_FILES)], ids=["whole", "adapter"]
)
def test_weights_of_the_other_kind_are_not_mixed_with(
    tmp_path: Path, settings: dict[str, Any], others: tuple[str, ...]
) -> None:
    for name in {*ADAPTER_FILES, *MODEL_FILES} - set(others):
        (tmp_path / name).touch()
    made(tmp_path, **settings)
    (tmp_path / others[0]).touch()
    with pytest.raises(ConfigError, match=rf"holds another run's {others[0]}"):
        made(tmp_path, **settings)
