"""A base that is random in training: refused where a reference is compared with it, and only there."""

from pathlib import Path
from typing import Any

import pytest

from fiducial.errors import ModelError
from fiducial.train import train
from run_configs import run_config
from tiny import save_checkpoint


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    save_checkpoint(folder / "base-phimoe", "phimoe", num_key_value_heads=2)
    return run_config(folder, family="phimoe", max_steps=1, **overrides)


def test_sampled_experts_are_refused_beside_a_reference(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="draws random numbers in training"):
        train(settings(tmp_path))


def test_sampled_experts_are_trained_without_one(tmp_path: Path) -> None:
    train(settings(tmp_path, rl="orpo"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
