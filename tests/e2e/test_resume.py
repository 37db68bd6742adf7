"""A run stopped at any step and resumed is the run that was never stopped, to the last bit."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fiducial.config.load import validate_config
from fiducial.errors import ConfigError, ModelError
from fiducial.evaluate import evaluate
from fiducial.run_record import RECORD_FILE
from fiducial.train import train
from fiducial.training.interruption import Interrupted
from resuming import interrupt_after, left_behind
from run_configs import run_config
from tiny import save_adapter, save_checkpoint

FULL: dict[str, Any] = {}
EACH_EPOCH = {"eval_steps": None}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}
# Ten groups a pass, four a step: a pass ends within a step.
STREAMED = {"streaming": True, "max_steps": 6, "streaming_multipack_buffer_size": 5}
CARRYING: dict[str, Any] = {"dpo_loss_type": ["bco_pair", "beta_dpo"], "learning_rate": 1e-2}
PISSA = LORA | {"peft_init_lora_weights": "pissa", "lora_dropout": 0.0}


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Two epochs of three steps, saved also where nothing is logged or evaluated."""
    chosen = {"num_epochs": 2, "save_steps": 1, "logging_steps": 2, "val_set_size": 3, "eval_steps": 3}
    return run_config(folder, rows=13, **(chosen | overrides))


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        *((FULL, stop) for stop in (2, 3, 5)),
        *((EACH_EPOCH, stop) for stop in (2, 3)),
        *((LORA, stop) for stop in (1, 4)),
        (PISSA, 2),
        (CARRYING, 2),
        *((STREAMED, stop) for stop in (1, 2, 5)),
        (LORA | STREAMED, 3),
    ],
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


@pytest.mark.parametrize(
    ("family", "shape"),
    [("gpt_neox", {}), ("mixtral", {"num_key_value_heads": 2, "num_local_experts": 2})],
)
def test_weights_that_are_saved_under_other_names_are_resumed_and_evaluated(
    tmp_path: Path, family: str, shape: dict[str, int]
) -> None:
    save_checkpoint(tmp_path / f"base-{family}", family, **shape)
    whole = settings(tmp_path, output_dir=str(tmp_path / "whole"), family=family, learning_rate=1e-2)
    train(whole)
    metrics, weights = left_behind(tmp_path / "whole")
    train(whole | {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-4")})
    resumed_metrics, resumed_weights = left_behind(tmp_path / "whole")
    assert resumed_metrics == metrics
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert evaluate(whole)["loss"] == pytest.approx(metrics[-1]["eval_loss"])
    best = whole | {"load_best_model_at_end": True, "eval_steps": 1, "output_dir": str(tmp_path / "best")}
    train(best | {"metric_for_best_model": "eval_loss", "greater_is_better": True})  # the first is
    state = json.loads((tmp_path / "best" / "checkpoint-6" / "trainer_state.json").read_text())
    _, kept = left_behind(Path(state["best_model_checkpoint"]))
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    _, left = left_behind(tmp_path / "best")
    assert all(torch.equal(kept[name], left[name]) for name in kept)


def test_a_run_cut_off_in_the_folder_of_an_earlier_one_goes_on_as_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    chosen = settings(tmp_path, output_dir=str(used))
    train(chosen)
    chosen |= {"learning_rate": 2e-3}
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Interrupted):
            train(chosen)
    assert (used / "checkpoint-6").exists()
    with pytest.raises(ModelError, match=r"weights there are an earlier run's.*checkpoint-2"):
        evaluate(validate_config(chosen))
    told = StringIO()
    resumed = chosen | {"rl_beta": 0.5, "auto_resume_from_checkpoints": True}
    train(resumed, console=Console(file=told, width=250))
    assert f"Going on from {used / 'checkpoint-2'}." in told.getvalue()
    assert "have changed since that was saved: method.beta: 0.1 then, 0.5 now." in told.getvalue()
    assert "the training data or its order is not" not in told.getvalue()
    metrics, _ = left_behind(used)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 4, 6]
    assert evaluate(validate_config(resumed))["loss"] == pytest.approx(metrics[-1]["eval_loss"])


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


def test_a_resumed_run_keeps_its_live_adapter_reference(tmp_path: Path) -> None:
    start = save_adapter(tmp_path / "start", Path(settings(tmp_path)["base_model"]), lora_dropout=0.1)
    live = LORA | {"lora_model_dir": str(start), "reference": {"schedule": "live"}}
    whole = settings(tmp_path, output_dir=str(tmp_path / "whole"), **live)
    train(whole)
    metrics, weights = left_behind(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    _, reference = left_behind(checkpoint / "reference")
    started, reached = (load_file(folder / "adapter_model.safetensors") for folder in (start, checkpoint))
    assert all(torch.equal(reference[name], started[name]) for name in started)
    assert any(not torch.equal(reached[name], started[name]) for name in started)
    train(whole | {"resume_from_checkpoint": str(checkpoint)})
    resumed_metrics, resumed_weights = left_behind(tmp_path / "whole")
    assert resumed_metrics == metrics  # rewards and kl among them: they compare with the starting adapter
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


def test_an_adapter_on_other_modules_is_not_resumed_in_part(tmp_path: Path) -> None:
    train(settings(tmp_path, max_steps=2, **LORA))
    for record in (tmp_path / "out").rglob(RECORD_FILE):
        record.unlink()  # as of a folder that another program copied
    again = settings(tmp_path, lora_target_linear=True, auto_resume_from_checkpoints=True, **LORA)
    with pytest.raises(ModelError, match="other weights than this run trains"):
        train(again)
