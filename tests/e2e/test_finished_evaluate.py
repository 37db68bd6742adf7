"""Finished runs are evaluated, on what they held out and on any other data."""

import json
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fiducial.errors import DataError
from fiducial.evaluate import evaluate
from fiducial.train import TrainResult, train
from finishing import KINDS, QUIET, Finished, fiducial_command, settings_of
from run_configs import run_config, write_pairs


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_evaluated_as_it_was_while_training(
    kind: str, finished: Finished, reference_cache: Path
) -> None:
    folder, result = finished(kind)
    from_settings = evaluate(settings_of(folder, kind), console=QUIET)
    for name in ("loss", "kl", "rewards/margins", "rewards/accuracies"):
        assert from_settings[name] == pytest.approx(result.metrics[f"eval_{name}"], rel=1e-4, abs=1e-6), name
    assert abs(from_settings["kl"]) > 1e-3


def test_what_the_loss_carried_from_step_to_step_is_evaluated_with(tmp_path: Path) -> None:
    running = {"dpo_loss_type": "beta_dpo", "beta_dpo_momentum": 0.5, "learning_rate": 1e-2}
    settings = run_config(tmp_path, rows=16, val_set_size=4, save_steps=2, eval_steps=2, **running)
    evaluations = train(settings, console=QUIET)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    at_checkpoint = next(line["eval_loss"] for line in logged if "eval_loss" in line and line["step"] == 2)
    for folder, loss in {"out": evaluations.metrics["eval_loss"], "out/checkpoint-2": at_checkpoint}.items():
        found = evaluate(settings, tmp_path / folder, console=QUIET)
        assert found["loss"] == pytest.approx(loss, rel=1e-4), folder


def test_the_best_weights_are_evaluated_with_what_the_loss_carried_then(tmp_path: Path) -> None:
    running = {"dpo_loss_type": ["bco_pair", "beta_dpo"], "rl_beta": 0.3, "learning_rate": 1e-2}
    # The first checkpoint is the best one: margins only grow.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "rewards/margins"}
    every = {"save_steps": 1, "eval_steps": 1, "greater_is_better": False}
    settings = run_config(tmp_path, rows=16, val_set_size=4, **running, **best, **every)
    result = train(settings, console=QUIET)
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    measured = next(line["eval_loss"] for line in logged if "eval_loss" in line and line["step"] == 1)
    assert result.metrics["eval_loss"] == pytest.approx(measured, rel=1e-4)
    assert evaluate(settings, console=QUIET)["loss"] == pytest.approx(measured, rel=1e-4)


def test_what_was_trained_on_is_not_evaluated_as_held_out(finished: Finished, tmp_path: Path) -> None:
    folder, _ = finished("full")
    appended = write_pairs(tmp_path / "more.jsonl", 20)
    settings = settings_of(folder, "full")
    for change in ({"datasets": [{"path": str(appended)}]}, {"val_set_size": 5}, {"seed": 3}):
        with pytest.raises(DataError, match="what it holds out now is not what was kept"):
            evaluate(settings | change, console=QUIET)
    told = Console(record=True, width=300)
    elsewhere = {"resume_from_checkpoint": str(folder / "out" / "checkpoint-2"), "output_dir": str(tmp_path)}
    train(settings | elsewhere | {"seed": 3, "max_steps": 3}, console=told)
    text = told.export_text()
    assert "what val_set_size holds out is not what it was when that was saved" in text
    assert "the training data or its order is not what it was when that was saved" in text
    given = fiducial_command("evaluate", folder / "out", f"datasets.0.path={appended}")
    assert given.exit_code == 0, "whoever names the pairs knows what they are"


@pytest.mark.parametrize("kind", KINDS)
def test_new_data_is_compared_with_the_starting_policy(kind: str, finished: Finished, tmp_path: Path) -> None:
    folder, result = finished(kind)
    new = write_pairs(tmp_path / "new.jsonl", 6)
    done = fiducial_command("evaluate", folder / "out", f"datasets.0.path={new}")
    assert done.exit_code == 0, done.output
    assert "on 6 pairs" in " ".join(done.output.split()), "a title as long as the folder's name may wrap"
    shown = re.search(r"kl +│ +(\S+)", done.output)
    assert shown is not None, done.output
    expected = log_ratio_by_hand(folder, result, new)
    assert float(shown[1]) == pytest.approx(expected, rel=2e-3)


def log_ratio_by_hand(folder: Path, result: TrainResult, data: Path) -> float:
    """The mean log-ratio, of models loaded with transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, base = folder / "out", folder / "base-llama"
    tokenizer = AutoTokenizer.from_pretrained(base)

    def model(adapter: Path | None = None, weights: Path | None = None) -> Any:
        loaded = AutoModelForCausalLM.from_pretrained(base)
        if weights is not None:
            loaded.load_state_dict(load_file(weights), strict=False)
        return loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter)

    kept = out / "moved_reference" / "reference_state.safetensors"
    if (out / "adapter_config.json").is_file():
        policy = model(adapter=out)
        reference = model(adapter=folder / "sft" if (folder / "sft").exists() else None)
        if kept.exists():
            reference = model(adapter=out)
            named = {
                name.replace(".reference.", ".default."): value for name, value in load_file(kept).items()
            }
            assert not reference.load_state_dict(named, strict=False).unexpected_keys
    else:
        policy = model(weights=out / "model.safetensors")
        reference = model(weights=kept if kept.exists() else None)

    def logps(scored: Any, prompt: str, completion: str) -> float:
        given, answer = (tokenizer(text).input_ids for text in (prompt, completion))
        answer.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = scored(torch.tensor([given + answer])).logits[0, len(given) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    ratios = [
        logps(policy, row["prompt"], row[key]) - logps(reference, row["prompt"], row[key])
        for row in rows
        for key in ("chosen", "rejected")
    ]
    return sum(ratios) / len(ratios)


@pytest.mark.parametrize(
    "changed",
    [
        "lora_alpha=64",
        "peft_use_rslora=true",
        "lora_r=8",
        "lora_alpha_pattern.q_proj=64",
        "peft_use_dora=true",
    ],
)
def test_an_adapter_is_not_evaluated_under_other_settings_than_it_was_trained_with(
    changed: str, finished: Finished
) -> None:
    done = fiducial_command("evaluate", finished("lora")[0] / "out", changed)
    assert done.exit_code == 2, done.output
    assert "under these it would be another policy" in done.output.lower()
    assert changed.partition("=")[0].partition(".")[0] in done.output


def test_an_adapter_on_other_modules_is_not_evaluated(
    finished: Finished,
) -> None:
    done = fiducial_command("evaluate", finished("lora")[0] / "out", "lora_target_linear=true")
    assert done.exit_code == 2, done.output
    assert "other weights than this run trains" in done.output


def test_a_reference_that_had_moved_and_is_left_out_is_told(
    finished: Finished,
) -> None:
    done = fiducial_command("evaluate", finished("synced")[0] / "out")
    assert "compared with what training began from" not in done.output
    settings = settings_of(finished("synced")[0], "synced") | {"reference": {}}
    told = StringIO()
    evaluate(settings, console=Console(file=told, width=250))
    assert "compared with what training began from" in told.getvalue()
