"""Whole runs whose reference goes on from the policy's lower layers end where two passes end, to the bit."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fiducial import prepare
from fiducial.errors import ModelError
from fiducial.train import TrainResult, train
from run_configs import run_config

UPPER = [r"model\.layers\.1\."]


def run(folder: Path, **settings: Any) -> tuple[TrainResult, dict[str, torch.Tensor], str]:
    console = Console(file=io.StringIO(), width=200)
    found = train(run_config(folder, unfrozen_parameters=UPPER, **settings), console=console)
    (file,) = found.output_dir.glob("*.safetensors")
    assert isinstance(console.file, io.StringIO)
    return found, load_file(file), console.file.getvalue()


def refuse(*_: Any, **__: Any) -> None:
    raise ModelError("policy and reference cannot share their lowest 1 layers: this is a test.")


@pytest.mark.parametrize(
    "settings",
    [
        {"reference": {"schedule": "live"}, "micro_batch_tokens": 64},
        {"reference": {"schedule": "live"}, "gradient_checkpointing": True, "dpo_loss_type": "aot"},
        {"streaming": True, "max_steps": 4, "val_set_size": None},
    ],
    ids=["live", "checkpointed, whole steps", "streamed"],
)
def test_one_pass_trains_what_two_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 3, "learning_rate": 1e-2} | settings
    together, ours, said = run(tmp_path, **settings)
    assert together.plan.shared_layers == 1
    assert together.plan.frozen_held_once
    assert "cannot share" not in said
    monkeypatch.setattr(prepare, "in_one_pass", refuse)
    apart, theirs, said = run(tmp_path, **settings, output_dir=str(tmp_path / "apart"))
    assert "this is a test. Each has a pass of its own." in said
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert together.metrics["rewards/margins"] == apart.metrics["rewards/margins"] != 0
