"""A run stopped at any step and resumed is the run that was never stopped, to the last bit."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from fiducial import train as train_module
from fiducial.errors import ConfigError
from fiducial.train import train
from fiducial.training.callbacks import Interrupted, read_metrics_lines
from run_configs import run_config

TIMINGS = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "total_flos"}
FULL: dict[str, Any] = {}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
PISSA = LORA | {"peft_init_lora_weights": "pissa", "lora_dropout": 0.0}


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Two epochs of three steps, saved also where nothing is logged or evaluated."""
    chosen = {"num_epochs": 2, "save_steps": 1, "logging_steps": 2, "val_set_size": 3, "eval_steps": 3}
    return run_config(folder, rows=13, **(chosen | overrides))


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
    monkeypatch.setattr(train_module, "setting_callbacks", lambda cfg: [StopAfter(step)])


@pytest.mark.parametrize(
    ("kind", "stop"), [(FULL, 2), (FULL, 3), (FULL, 5), (LORA, 1), (LORA, 4), (PISSA, 2)]
)
def test_stopped_and_resumed_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], stop: int
) -> None:
    train(settings(tmp_path, output_dir=str(tmp_path / "whole"), **kind))
    broken = settings(
        tmp_path, output_dir=str(tmp_path / "broken"), save_strategy="no", save_steps=None, **kind
    )
    with monkeypatch.context() as patch:
        interrupt_after(stop, patch)
        with pytest.raises(Interrupted, match=f"after step {stop} of 6"):
            train(broken)
    assert not (tmp_path / "broken" / "README.md").exists()
    train(broken | {"auto_resume_from_checkpoints": True})
    metrics, weights = left_behind(tmp_path / "whole")
    resumed_metrics, resumed_weights = left_behind(tmp_path / "broken")
    assert resumed_metrics == metrics
    assert set(resumed_weights) == set(weights)
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_a_resumed_run_compares_with_the_weights_it_started_from(tmp_path: Path) -> None:
    whole = settings(tmp_path, output_dir=str(tmp_path / "whole"))
    train(whole)
    metrics, weights = left_behind(tmp_path / "whole")
    for record in (tmp_path / "whole" / "reference").rglob("*.safetensors"):
        record.unlink()  # they must be scored again, and not from the resumed weights
    train(whole | {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-4")})
    resumed_metrics, resumed_weights = left_behind(tmp_path / "whole")
    assert resumed_metrics == metrics
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    train(settings(tmp_path, output_dir=str(tmp_path / "one")))
    train(settings(tmp_path, output_dir=str(tmp_path / "other"), seed=7, val_set_size=0, eval_steps=None))
    _, one = left_behind(tmp_path / "one")
    _, other = left_behind(tmp_path / "other")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_cut_off_while_written_is_never_resumed(tmp_path: Path) -> None:
    whole = settings(tmp_path, output_dir=str(tmp_path / "whole"))
    train(whole)
    metrics, _ = left_behind(tmp_path / "whole")
    for step in (5, 6):
        (tmp_path / "whole" / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with pytest.raises(ConfigError, match=r"lacks trainer_state.json.*checkpoint-4"):
        train(whole | {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-5")})
    train(whole | {"auto_resume_from_checkpoints": True})
    assert left_behind(tmp_path / "whole")[0] == metrics
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
