"""Whole runs: every family on real pairs, the equivalences, what is left behind, and what can go wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiducial.config.load import validate_config
from fiducial.errors import ConfigError, TrainingError
from fiducial.evaluate import evaluate
from fiducial.train import TrainResult, preprocess, train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.metrics import METRICS
from run_configs import run_config
from tiny import FAMILIES

LORA = {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}


def step_losses(result: TrainResult) -> list[float]:
    lines = [record for _, record in read_metrics_lines(result.output_dir / "metrics.jsonl")]
    return [line["loss"] for line in lines if "loss" in line]


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    (file,) = result.output_dir.glob("*.safetensors")
    return load_file(file)


def real_pairs(shared_data: Path, **settings: Any) -> dict[str, Any]:
    pairs = {"path": str(shared_data / "hh_harmless_test.jsonl.gz"), "split": "train[:40]"}
    return {"datasets": [pairs], "sequence_len": 400, "max_steps": 3, "micro_batch_size": 2} | settings


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_on_real_pairs(
    tmp_path: Path, shared_data: Path, family: str, adapter: dict[str, Any]
) -> None:
    result = train(run_config(tmp_path, family=family, **real_pairs(shared_data), **adapter))
    assert result.record["layout"]["layout"] == "packed"
    assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"]
    losses = step_losses(result)
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4)
    assert losses[-1] != losses[0]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / f"base-{family}")
    if adapter:
        trained = PeftModel.from_pretrained(base, result.output_dir)
        assert any(tensor.abs().max() > 0 for name, tensor in weights_of(result).items() if "lora_B" in name)
        assert trained.active_adapters == ["default"]
    else:
        trained = AutoModelForCausalLM.from_pretrained(result.output_dir)
        assert not torch.equal(trained.get_input_embeddings().weight, base.get_input_embeddings().weight)
    saved, original = (
        AutoTokenizer.from_pretrained(at) for at in (result.output_dir, tmp_path / f"base-{family}")
    )
    assert saved.get_vocab() == original.get_vocab()
    assert saved.chat_template == original.chat_template


@pytest.mark.parametrize("schedule", ["precomputed", "live"])
def test_an_adapter_is_continued_and_compared_with_where_it_began(
    tmp_path: Path, shared_data: Path, schedule: str
) -> None:
    first = train(run_config(tmp_path, output_dir=str(tmp_path / "sft"), **real_pairs(shared_data), **LORA))
    result = train(
        run_config(
            tmp_path,
            **real_pairs(shared_data),
            **LORA | {"lora_r": None},
            lora_model_dir=str(first.output_dir),
            reference={"schedule": schedule},
        )
    )
    assert result.plan.source == "frozen_adapter"
    assert step_losses(result)[0] == pytest.approx(0.6931, abs=1e-4)
    assert set(weights_of(result)) == set(weights_of(first))
    assert not (result.output_dir / "reference" / "adapter_config.json").exists()
    assert any(
        not torch.equal(weights_of(first)[name], tensor) for name, tensor in weights_of(result).items()
    )


def same(first: TrainResult, second: TrainResult, tolerance: float) -> None:
    assert step_losses(first) == pytest.approx(step_losses(second), rel=tolerance)
    assert len(step_losses(first)) > 2
    ours, theirs = weights_of(first), weights_of(second)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < tolerance


PAIRS_OF_RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one micro-batch, many": ({"micro_batch_tokens": 10**6}, {"micro_batch_tokens": 1}),
    "live, precomputed": (
        LORA | {"reference": {"schedule": "live"}},
        LORA | {"reference": {"schedule": "precomputed"}},
    ),
    "separate model, initial policy": (
        {"reference": {"source": "separate_model", "schedule": "live"}},
        {"reference": {"source": "initial_policy"}},
    ),
    "accumulated, at once": (
        {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        {"micro_batch_size": 4},
    ),
}


@pytest.mark.parametrize("name", PAIRS_OF_RUNS)
def test_runs_that_must_be_equal_are(tmp_path: Path, name: str) -> None:
    # SGD: Adam turns a rounding of a gradient near zero into a whole step.
    common = {"optimizer": "sgd", "learning_rate": 1e-2, "num_epochs": 2}
    results = [
        train(run_config(tmp_path, **(settings | common), output_dir=str(tmp_path / str(number))))
        for number, settings in enumerate(PAIRS_OF_RUNS[name])
    ]
    same(*results, tolerance=2e-5)


def test_packed_rows_train_as_padded_ones(tmp_path: Path) -> None:
    results = []
    for packing in (True, False):
        folder = str(tmp_path / str(packing))
        cfg = validate_config(run_config(tmp_path, optimizer="sgd", num_epochs=2, output_dir=folder))
        model = cfg.model.model_copy(update={"packing": packing})
        results.append(train(cfg.model_copy(update={"model": model})))
    assert [result.record["layout"]["layout"] for result in results] == ["packed", "padded"]
    same(*results, tolerance=2e-5)


def test_a_run_with_another_batch_is_told_apart(tmp_path: Path) -> None:
    results = [
        train(run_config(tmp_path, micro_batch_size=size, output_dir=str(tmp_path / str(size))))
        for size in (2, 4)
    ]
    with pytest.raises(AssertionError):
        same(*results, tolerance=2e-5)


def test_it_learns_and_leaves_everything_behind(tmp_path: Path) -> None:
    result = train(run_config(tmp_path, rows=24, val_set_size=4, num_epochs=4, learning_rate=3e-3))
    held_out = [
        record
        for _, record in read_metrics_lines(result.output_dir / "metrics.jsonl")
        if "eval_loss" in record
    ]
    assert held_out[0]["eval_rewards/accuracies"] == 0.5
    assert held_out[-1]["eval_rewards/accuracies"] > 0.9
    assert held_out[-1]["eval_loss"] < 0.5 * held_out[0]["eval_loss"]
    assert {*METRICS, *(f"eval_{name}" for name in METRICS)} <= set(result.metrics)
    left = {path.name for path in result.output_dir.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "plan.json",
        "README.md",
    } <= left
    assert not any(name.endswith((".bin", ".pt", ".tmp")) for name in left)
    assert json.loads((result.output_dir / "config.json").read_text())["use_cache"] is True, "as its base's"
    record = json.loads((result.output_dir / "plan.json").read_text())
    assert record["reference"]["source"] == "initial_policy"
    assert record["memory"]["peak_bytes"] > 0
    predicted, measured = record["predicted"], record["measured"]
    assert measured["peak_bytes"] >= 0
    assert predicted["peak_bytes"] == record["memory"]["peak_bytes"]
    assert predicted["scoring_share"] == pytest.approx(1 - 1 / predicted["relative_time"])
    assert {"loading", "scoring", "proof", "training"} == set(measured["seconds"])
    assert min(measured["seconds"].values()) > 0
    assert 0 < measured["scoring_share"] < 1
    assert 0 < predicted["seconds"]["scoring"] < predicted["seconds"]["training"]
    assert set(record["proof"]["log_ratio"]) == {"per_token", "per_sequence"}
    assert record["proof"]["log_ratio"]["per_token"]["max"] <= record["proof"]["tolerance"]
    assert record["proof"]["moved_while_training"] == 0
    assert record["audit"]["train"] == 20
    again = evaluate(run_config(tmp_path, rows=24, val_set_size=4))
    assert again["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)
    assert again["kl"] == pytest.approx(result.metrics["eval_kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("base_model", {"base_model": "{out}"}),
        ("base_model", {"base_model": "{out}/checkpoint-2"}),
        ("base_model", {"base_model": "{out}/checkpoint-2", "output_dir": "{out}/checkpoint-2"}),
        ("lora_model_dir", {"adapter": "lora", "lora_model_dir": "{out}/."}),
        ("reference.model", {"reference": {"model": "{out}"}}),
        ("reference.adapter", {"reference": {"adapter": "{out}/checkpoint-2"}}),
    ],
)
def test_a_run_never_writes_over_what_it_starts_from(
    tmp_path: Path, key: str, settings: dict[str, Any]
) -> None:
    named = json.loads(json.dumps(settings).replace("{out}", str(tmp_path / "out")))
    with pytest.raises(ConfigError, match=rf"output_dir: .* is where {key}: .* would write over it"):
        train(run_config(tmp_path, **named))


def test_an_adapter_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    config = run_config(tmp_path, rows=16, val_set_size=4, **LORA | {"peft_init_lora_weights": "pissa"})
    result = train(config)
    assert evaluate(config)["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def test_preprocessing_scores_what_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, val_set_size=2)
    preprocess(config)
    assert "20 completions scored" in capsys.readouterr().out
    train(config)
    assert "completions scored" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adafactor", "lr_scheduler": "constant_with_warmup", "warmup_steps": 1},
        {"optimizer": "sgd", "optim_args": {"momentum": 0.9}, "lr_scheduler": "linear", "warmup_ratio": 0.5},
        {"rl": "orpo"},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_other_settings_of_transformers_work(tmp_path: Path, settings: dict[str, Any]) -> None:
    result = train(run_config(tmp_path, **settings))
    assert len(step_losses(result)) == 3


def test_tensorboard_gets_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(run_config(tmp_path, use_tensorboard=True))
    (events,) = (tmp_path / "events").rglob("events.out.tfevents.*")
    assert b"rewards/margins" in events.read_bytes()


def test_the_best_checkpoint_is_what_remains(tmp_path: Path) -> None:
    config = run_config(
        tmp_path, rows=16, val_set_size=4, num_epochs=3, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=0.2, **{"early_stopping_patience": 1},
    )  # fmt: skip
    result = train(config)
    losses = [
        record["eval_loss"]
        for _, record in read_metrics_lines(result.output_dir / "metrics.jsonl")
        if record.get("eval_loss") and record["step"]
    ]
    assert losses[-1] == pytest.approx(min(losses[:-1]), rel=1e-5)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not a number at step"):
        train(run_config(tmp_path, learning_rate=1e30, optimizer="sgd", max_grad_norm=0, num_epochs=4))


@pytest.mark.parametrize("missing", ["rl", "datasets"])
def test_what_is_needed_to_train_is_asked_for(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=f"{missing}.*needed to train"):
        train(run_config(tmp_path, **{missing: None}))


FULL_DISK = """
import json, sys
from pathlib import Path
from fiducial.errors import TrainingError
from fiducial.train import train
from fiducial.training.checkpoints import last_complete, missing_from
try:
    train(json.loads(sys.argv[1]))
except TrainingError as error:
    folder = Path(json.loads(sys.argv[1])["output_dir"])
    good = last_complete(folder)
    print("RESULT", json.dumps({"error": str(error), "good": str(good), "missing": missing_from(good)}))
"""


@pytest.mark.parametrize(
    "wrong",
    [{"optimizer": "adan"}, {"tf32": True}, {"resume_from_checkpoint": "nowhere"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_setting_is_told_before_any_data_is_read(tmp_path: Path, wrong: dict[str, Any]) -> None:
    nothing = {"datasets": [{"path": "nothing.jsonl"}]}
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: "):
        train(run_config(tmp_path) | nothing | wrong)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        (
            {"val_set_size": 4, "eval_steps": 2, "metric_for_best_model": "rewards/accuracy"},
            ConfigError,
            "metric_for_best_model: rewards/accuracy is not measured here; write one of loss, rewards/chosen",
        ),
        (
            {"hub_model_id": "some/model"},
            TrainingError,
            "hub_model_id: some/model cannot be pushed to: Cannot re",
        ),
    ],
    ids=["metric", "hub"],
)
def test_what_transformers_refuses_is_told_before_step_1(
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[Exception],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=says):
        train(run_config(tmp_path) | settings)
    assert len(read_metrics_lines(tmp_path / "out" / "metrics.jsonl")) < 2


def test_a_full_disk_stops_the_run_and_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    settings = run_config(tmp_path, output_dir=str(disk / "out"), save_steps=1, num_epochs=4)
    own_disk = 'mount -t tmpfs -o size=1500k tmpfs "$1" && exec "$2" -c "$3" "$4"'
    done = subprocess.run(
        [
            *("unshare", "--map-root-user", "--mount", "sh", "-c", own_disk, "sh"),
            *(str(disk), sys.executable, FULL_DISK, json.dumps(settings)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert "RESULT" in done.stdout, done.stderr[-2000:]
    result = json.loads(done.stdout.partition("RESULT ")[2].splitlines()[0])
    assert f"{disk / 'out'} is full" in result["error"]
    assert "save_total_limit" in result["error"]
    assert result["good"] in result["error"]
    assert result["missing"] == []


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("fiducial.loading.choose_layout", "loading the model"),
        ("fiducial.scoring_ahead.fill", "scoring the reference"),
        ("fiducial.prepare.prove_reference", "proving the reference"),
    ],
)
def test_memory_that_runs_out_before_step_1_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, what: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(where, full)
    with pytest.raises(TrainingError, match=f"Out of memory while {what}, before step 1"):
        train(run_config(tmp_path, reference={"schedule": "precomputed"}))


@pytest.mark.parametrize(("dora", "allowed"), [(True, 0.1), (False, 2e-3)])
def test_records_of_a_dora_switched_off_may_be_rounded_otherwise(
    tmp_path: Path, dora: bool, allowed: float
) -> None:
    keys = LORA | {"peft_use_dora": dora, "bf16": "full", "max_steps": 1}
    result = train(run_config(tmp_path, **keys))
    assert (result.plan.source, result.plan.schedule) == ("adapter_off", "precomputed")
    assert result.record["proof"]["tolerance"] == pytest.approx(allowed)
