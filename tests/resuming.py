"""Stopping a run as Ctrl-C does, and what a run leaves behind, to compare it with another."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fiducial import assembly
from fiducial.training.callbacks import read_metrics_lines

TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "total_flos"}


def left_behind(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The metrics file without timings, and the final weights."""
    lines = [record for _, record in read_metrics_lines(folder / "metrics.jsonl")]
    kept = [{key: value for key, value in line.items() if not _is_timing(key)} for line in lines]
    (weights,) = folder.glob("*.safetensors")
    return [line for line in kept if "train_loss" not in line], load_file(weights)


def _is_timing(key: str) -> bool:
    return key in TIMINGS or key.endswith(("_runtime", "_per_second"))


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupt_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "setting_callbacks", lambda cfg: [StopAfter(step)])
