"""A run's output folder is looked at before anything is read."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fiducial.config.load import validate_config
from fiducial.errors import ConfigError
from fiducial.reference.facts import gather_facts
from fiducial.reference.trained import count_trained
from fiducial.train import train
from fiducial.training.output_folder import ADAPTER_FILES, MODEL_FILES, make_output_folder, require_room
from run_configs import run_config

LORA = {"adapter": "lora"}


class Disk(NamedTuple):
    total: int
    used: int
    free: int


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


def leave(free: int, monkeypatch: pytest.MonkeyPatch, *, of: int = 10**9) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(of, of - free, free))


@pytest.mark.parametrize("adapter", [{}, LORA | {"lora_r": 8, "lora_target_linear": True}])
def test_what_is_trained_must_fit_on_the_disk(
    tmp_path: Path, adapter: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_config(tmp_path, max_steps=1, **adapter)
    cfg, saving = validate_config(settings), validate_config(settings | {"save_strategy": "epoch"})
    facts = gather_facts(cfg)
    needed = 4 * count_trained(cfg, facts).total
    leave(needed - 1, monkeypatch)
    with pytest.raises(ConfigError, match=r"output_dir: the disk .* and the trained model takes at least"):
        train(settings)
    leave(needed, monkeypatch)
    train(settings)
    (weights,) = (tmp_path / "out").glob("*model.safetensors")
    assert needed <= weights.stat().st_size < needed + 16_384
    leave(0, monkeypatch)
    (tmp_path / "out" / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    require_room(cfg, facts, resuming=False)  # over the run before
    with pytest.raises(ConfigError, match=r"a checkpoint of it take .*save no checkpoints"):
        require_room(saving, facts, resuming=False)
    require_room(saving, facts, resuming=True)
    weights.unlink()
    weights.symlink_to("gone")
    leave(0, monkeypatch, of=0)
    require_room(saving, facts, resuming=False)  # nothing is known of this disk
