"""KTO from labelled rows to an aligned model: real data, full and LoRA, evaluated, stopped and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fiducial.errors import DataError
from fiducial.evaluate import evaluate
from fiducial.train import TrainResult, preprocess, train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.interruption import Interrupted
from launching import two_processes
from resuming import interrupt_after, left_behind
from run_configs import run_config, write_labelled

WORKER = Path(__file__).parents[1] / "run_worker.py"
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2},
}


def settings(folder: Path, shared_data: Path, **more: Any) -> dict[str, Any]:
    """Forty-odd real rows; two epochs of five steps, evaluated before, between and after."""
    data = {"path": str(shared_data / "kto_en_demo.json"), "split": "train[:44]"}
    chosen = {
        "rl": "kto",
        "datasets": [data],
        "sequence_len": 200,
        "excess_length_strategy": "truncate",
        "val_set_size": 6,
        "micro_batch_size": 8,
        "micro_batch_tokens": 500,  # several passes a step
        "num_epochs": 2,
        "eval_steps": 5,
        "save_steps": 1,
    }
    return run_config(folder, **(chosen | more))


def logs(result: TrainResult, name: str) -> list[float]:
    lines = [record for _, record in read_metrics_lines(result.output_dir / "metrics.jsonl")]
    return [line[name] for line in lines if name in line]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


def test_it_trains_and_evaluates_on_real_rows(
    tmp_path: Path, shared_data: Path, kind: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, shared_data, **kind)

    result = train(config)

    printed = capsys.readouterr().out
    assert "held-out completions" in printed
    assert "pair" not in printed.partition("held-out completions")[2]
    assert result.record["audit"]["datasets"][0]["format"] == "kto.chat_template.default"
    assert sum(result.record["audit"]["labels"]["train"]) == 38
    assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"]
    losses, points = logs(result, "loss"), logs(result, "kl")
    assert losses[0] == pytest.approx(0.5, abs=1e-4)
    assert points[0] == pytest.approx(0, abs=1e-4)
    assert len(losses) == 10
    assert min(points) >= 0
    assert max(points) > 1e-3, "the policy has moved on mismatched completions"
    held_out = logs(result, "eval_loss")
    assert held_out[0] == pytest.approx(0.5, abs=1e-4)
    assert held_out[-1] != pytest.approx(0.5, abs=1e-3)
    for size in (1, 6):
        again = evaluate(config | {"eval_batch_size": size})
        for name in ("loss", "kl", "rewards/chosen", "rewards/accuracies"):
            assert again[name] == pytest.approx(result.metrics[f"eval_{name}"], rel=1e-4, abs=1e-5)
        assert "on 6 completions" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stop", [3, 5])
def test_stopped_and_resumed_is_uninterrupted(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], stop: int
) -> None:
    train(settings(tmp_path, shared_data, output_dir=str(tmp_path / "whole"), **kind))
    broken = settings(tmp_path, shared_data, output_dir=str(tmp_path / "broken"), **kind)
    with monkeypatch.context() as patch:
        interrupt_after(stop, patch)
        with pytest.raises(Interrupted, match=f"after step {stop} of 10"):
            train(broken)
    train(broken | {"auto_resume_from_checkpoints": True})

    metrics, weights = left_behind(tmp_path / "whole")
    resumed_metrics, resumed_weights = left_behind(tmp_path / "broken")
    assert resumed_metrics == metrics
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


def labelled(folder: Path, labels: list[bool], **more: Any) -> dict[str, Any]:
    data = write_labelled(folder / "labelled.jsonl", labels)
    return run_config(folder, rl="kto", datasets=[{"path": str(data)}], **more)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_labels_of_one_kind_can_be_evaluated(tmp_path: Path, loss_type: str) -> None:
    held_out = write_labelled(tmp_path / "held-out.jsonl", 4 * [True])
    tests = {"kto_loss_type": loss_type, "test_datasets": [{"path": str(held_out)}]}
    config = labelled(tmp_path, 4 * [True, False], **tests)

    result = train(config)

    again = evaluate(config)
    assert again["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)
    assert "rewards/rejected" not in again


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_steps_of_one_completion(tmp_path: Path, loss_type: str) -> None:
    config = labelled(tmp_path, 3 * [True, False], micro_batch_size=1, kto_loss_type=loss_type)

    result = train(config)

    losses = logs(result, "loss")
    assert len(losses) == 6
    assert losses[0] == pytest.approx(0.5, abs=1e-4) != losses[-1]


def test_shuffled_rows_come_in_another_order_and_with_the_same_partners(tmp_path: Path) -> None:
    """One step of all rows is the same step in any order."""
    labels = [True, True, True, True, False, True]
    common = {"micro_batch_size": 6, "num_epochs": 4, "optimizer": "sgd", "learning_rate": 0.1}
    runs = [
        train(labelled(tmp_path, labels, **common, **order, output_dir=str(tmp_path / str(number))))
        for number, order in enumerate(({"shuffle_merged_datasets": False}, {"seed": 1}, {"seed": 2}))
    ]

    assert max(logs(runs[0], "kl")) > 1e-3
    for shuffled in runs[1:]:
        assert logs(shuffled, "loss") == pytest.approx(logs(runs[0], "loss"), rel=1e-4)
        assert logs(shuffled, "kl") == pytest.approx(logs(runs[0], "kl"), rel=1e-3, abs=1e-6)


def test_mismatched_completions_are_scored_once_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = labelled(tmp_path, 3 * [True, False])
    preprocess(config)
    assert "12 completions scored" in capsys.readouterr().out
    train(config)
    assert "completions scored" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes did the runs of `SPREAD`."""
    folder = tmp_path_factory.mktemp("two")
    runs = [{"settings": spread(folder, kind, size=2), "stop_after": None} for kind in SPREAD]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    two_processes(WORKER, str(folder / "runs.json"))
    return folder


SPREAD: dict[str, dict[str, Any]] = {"replicated": {}, "sharded": {"fsdp_version": 2}}


def spread(folder: Path, kind: str, *, size: int) -> dict[str, Any]:
    """Thirteen rows, three held out: the last of two epochs' three steps leaves a process with one row.

    Of a few rows a pass: so few tokens that processes need different numbers of both kinds of passes.
    """
    return labelled(
        folder,
        6 * [True, False] + [True],
        **SPREAD[kind],
        micro_batch_size=size,
        micro_batch_tokens=40,
        eval_batch_size=1,
        val_set_size=3,
        num_epochs=2,
        optimizer="sgd",
        learning_rate=0.1,
        output_dir=str(folder / kind),
    )


@pytest.mark.parametrize("kind", SPREAD)
def test_two_processes_train_and_evaluate_as_one(tmp_path: Path, together: Path, kind: str) -> None:
    alone = train(spread(tmp_path, "replicated", size=4))
    logged = [record for _, record in read_metrics_lines(together / kind / "metrics.jsonl")]

    assert max(logs(alone, "kl")) > 1e-3
    assert max(logs(alone, "eval_kl")) > 1e-3
    for name in ("loss", "kl", "rewards/margins", "eval_loss", "eval_kl", "eval_rewards/margins"):
        found = [line[name] for line in logged if name in line]
        assert found == pytest.approx(logs(alone, name), rel=1e-4, abs=1e-5), name
    weights, expected = (load_file(at / "model.safetensors") for at in (together / kind, alone.output_dir))
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_pairs_are_taken_apart_and_planned_so(tmp_path: Path) -> None:
    """Twelve pairs, two of them held out, make twenty completions: five steps of four an epoch."""
    result = train(run_config(tmp_path, rl="kto", val_set_size=2, num_epochs=2))

    assert result.record["data"]["groups"] == 24
    assert result.record["batch"]["steps_per_epoch"] == 5
    assert result.record["batch"]["steps"] == len(logs(result, "loss")) == 10
    assert result.record["audit"]["labels"] == {"train": (10, 10), "evaluation": (2, 2)}
    assert "| completions a step and process | 4 |" in (result.output_dir / "README.md").read_text()


@pytest.mark.parametrize("label", [True, False], ids=["desirable", "undesirable"])
def test_labels_of_one_kind_alone(tmp_path: Path, label: bool) -> None:
    config = labelled(tmp_path, 8 * [label], num_epochs=4)
    missing = "undesirable" if label else "desirable"
    with pytest.raises(DataError, match=f"none of the 8 completions to train on is {missing}"):
        train(config)

    result = train(config | {f"kto_{missing}_weight": 0})

    rewards = logs(result, "rewards/chosen" if label else "rewards/rejected")
    assert (rewards[-1] > 0.01) if label else (rewards[-1] < -0.01)
    assert not logs(result, "rewards/rejected" if label else "rewards/chosen")


def test_a_weight_of_zero_leaves_its_kind_out_of_the_gradient(tmp_path: Path) -> None:
    one, both = (
        train(
            labelled(
                tmp_path,
                3 * [True, False],
                micro_batch_size=6,
                output_dir=str(tmp_path / str(weight)),
                kto_undesirable_weight=weight,
            )
        )
        for weight in (0, 1)
    )

    assert logs(one, "loss")[0] == pytest.approx(0.25, abs=1e-4)
    assert logs(both, "loss")[0] == pytest.approx(0.5, abs=1e-4)
    assert len(logs(one, "rewards/rejected")) == len(logs(both, "rewards/rejected"))
