"""Finished runs: evaluated on any data afterwards, and asked whether their reference is still what it was."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from fiducial.as_then import verify_finished
from fiducial.config.load import validate_config
from fiducial.errors import DataError
from fiducial.evaluate import evaluate
from fiducial.finished import from_folder
from fiducial.run_record import RECORD_FILE, read_record
from fiducial.train import TrainResult, train
from finishing import change_one_weight, copied, fiducial_command
from run_configs import run_config, write_pairs
from tiny import save_adapter, save_checkpoint

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}
SYNCED = {"schedule": "synced", "mixup_alpha": 0.5, "sync_steps": 2}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full, live": {"reference": {"source": "separate_model", "schedule": "live"}},
    "lora": LORA,
    "resumed adapter": LORA | {"lora_r": None, "lora_model_dir": "sft"},
    "synced": {"reference": SYNCED, "learning_rate": 1e-2},
    "synced lora": LORA | {"reference": SYNCED | {"mixup_alpha": 1.0}},
}
QUIET = Console(quiet=True)


def settings_of(folder: Path, kind: str) -> dict[str, Any]:
    settings = run_config(folder, rows=16, val_set_size=4, save_steps=2, **KINDS[kind])
    if "lora_model_dir" in settings:
        if not (folder / "sft").exists():
            save_adapter(folder / "sft", folder / "base-llama")
        settings["lora_model_dir"] = str(folder / "sft")
    return settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, TrainResult]]:
    """A trained run of each kind, made once, and its folder."""
    made: dict[str, tuple[Path, TrainResult]] = {}

    def make(kind: str) -> tuple[Path, TrainResult]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("run")
            made[kind] = folder, train(settings_of(folder, kind), console=QUIET)
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_evaluated_as_it_was_while_training(
    kind: str, finished: Callable[[str], tuple[Path, TrainResult]], reference_cache: Path
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


def test_what_was_trained_on_is_not_evaluated_as_held_out(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
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
def test_new_data_is_compared_with_the_starting_policy(
    kind: str, finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["out", "out/checkpoint-2"])
def test_the_reference_of_a_finished_run_is_still_what_it_was(
    kind: str,
    place: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
) -> None:
    folder, _ = finished(kind)
    done = fiducial_command("verify", folder / place)
    assert done.exit_code == 0, done.output
    assert "the same as when the run started" in done.output
    assert "as then: " in done.output
    assert ("moved reference" in done.output) == kind.startswith("synced")


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_base_is_named_by_verify_and_refused_by_evaluate(
    kind: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
    tmp_path: Path,
) -> None:
    folder = copied(finished(kind)[0], tmp_path / "copy")
    change_one_weight(folder / "base-llama" / "model.safetensors")
    for command in ("verify", "evaluate"):
        done = fiducial_command(command, folder / "out")
        assert done.exit_code == 2
        assert "is not the reference this run was started with" in done.output
        assert "1 of " in done.output
        assert "q_proj" in done.output


def test_a_changed_adapter_is_named(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
    folder = copied(finished("resumed adapter")[0], tmp_path / "copy")
    change_one_weight(folder / "sft" / "adapter_model.safetensors")
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "1 of " in done.output
    assert "lora_A" in done.output


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
    changed: str, finished: Callable[[str], tuple[Path, TrainResult]]
) -> None:
    done = fiducial_command("evaluate", finished("lora")[0] / "out", changed)
    assert done.exit_code == 2, done.output
    assert "under these it would be another policy" in done.output.lower()
    assert changed.partition("=")[0].partition(".")[0] in done.output


def test_an_adapter_on_other_modules_is_not_evaluated(
    finished: Callable[[str], tuple[Path, TrainResult]],
) -> None:
    done = fiducial_command("evaluate", finished("lora")[0] / "out", "lora_target_linear=true")
    assert done.exit_code == 2, done.output
    assert "other weights than this run trains" in done.output


def test_a_changed_config_of_the_base_is_named(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
    folder = copied(finished("full")[0], tmp_path / "copy")
    config = folder / "base-llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "rms_norm_eps of the config: 1e-06 then, 0.5 now" in done.output


@pytest.mark.parametrize("kind", ["synced", "synced lora"])
@pytest.mark.parametrize("command", ["verify", "evaluate"])
@pytest.mark.parametrize("place", ["moved_reference", "checkpoint-2"])
def test_another_moved_reference_is_found(
    kind: str,
    command: str,
    place: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
    tmp_path: Path,
) -> None:
    folder = copied(finished(kind)[0], tmp_path / "copy")
    (folder / "pairs-16.jsonl").rename(folder / "other.jsonl")  # rows are not needed to see it
    change_one_weight(folder / "out" / place / "reference_state.safetensors")
    of = folder / "out" if place == "moved_reference" else folder / "out" / place
    rows = [f"datasets.0.path={folder / 'other.jsonl'}"] if command == "evaluate" else []
    done = fiducial_command(command, of, *rows)
    assert done.exit_code == 2
    assert f"{place} is not the one this run had moved to" in done.output


def test_a_reference_that_had_moved_and_is_left_out_is_told(
    finished: Callable[[str], tuple[Path, TrainResult]],
) -> None:
    done = fiducial_command("evaluate", finished("synced")[0] / "out")
    assert "compared with what training began from" not in done.output
    settings = settings_of(finished("synced")[0], "synced") | {"reference": {}}
    told = StringIO()
    evaluate(settings, console=Console(file=told, width=250))
    assert "compared with what training began from" in told.getvalue()


def test_a_moved_reference_that_answers_differently_is_found(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
    folder = copied(finished("synced")[0], tmp_path / "copy")
    record = read_record(folder / "out")
    replace(record, moved_weights="").write(folder / "out")  # as older versions did
    change_one_weight(folder / "out" / "moved_reference" / "reference_state.safetensors")
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "answers differently" in done.output


def test_other_log_probs_from_the_same_weights_are_found(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
    folder = copied(finished("lora")[0], tmp_path / "copy")
    path = folder / "out" / RECORD_FILE
    record = json.loads(path.read_text())
    record["start"]["logps"][0][0] += 0.01
    path.write_text(json.dumps(record))
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "answers differently" in done.output


def test_without_its_data_the_weights_alone_are_compared(
    finished: Callable[[str], tuple[Path, TrainResult]], tmp_path: Path
) -> None:
    folder = copied(finished("full")[0], tmp_path / "copy")
    (folder / "pairs-16.jsonl").unlink()
    findings = verify_finished(from_folder(folder / "out"), console=QUIET)
    assert "the same as when the run started" in findings["weights"]
    assert "not compared" in findings["log-probs"]


def test_the_cached_records_are_looked_at(tmp_path: Path, reference_cache: Path) -> None:
    train(run_config(tmp_path, rows=8), console=QUIET)
    findings = verify_finished(from_folder(tmp_path / "out"), console=QUIET)
    assert "16; " in findings["cached records"]
    assert "scored again" in findings["cached records"]
    shutil.rmtree(reference_cache)
    assert "none" in verify_finished(from_folder(tmp_path / "out"), console=QUIET)["cached records"]


def test_verify_proves_a_run_before_it_trains(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path)))
    done = fiducial_command("verify", path)
    assert done.exit_code == 0, done.output
    assert "loaded bit for bit as in" in done.output
    assert "equal: at most" in done.output
    assert "median" in done.output
    assert not (tmp_path / "out").exists()
    other = save_checkpoint(tmp_path / "other", seed=1)
    done = fiducial_command("verify", path, f"reference.model={other}")
    assert done.exit_code == 0, done.output
    assert "another policy, as asked" in done.output
    done = fiducial_command("verify", path, "rl=orpo")
    assert done.exit_code == 0, done.output
    assert "nothing to prove" in done.output
    done = fiducial_command(
        "verify", path, "adapter=lora", "peft_init_lora_weights=pissa", "reference.source=adapter_off"
    )
    assert done.exit_code == 2
    assert "pissa" in done.output


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_what_is_no_run_is_said_to_be_none(
    command: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
    tmp_path: Path,
) -> None:
    folder = finished("full")[0]
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "empty": "holds no run.json",
        tmp_path / "nowhere": "does not exist",
        folder: "holds out; name one of those",
        folder / "base-llama": "holds no run.json",
    }
    for target, words in cases.items():
        done = fiducial_command(command, target)
        assert done.exit_code == 2, target
        assert words in done.output
        assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_half_written_checkpoint_is_told(
    command: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
    tmp_path: Path,
) -> None:
    checkpoint = copied(finished("full")[0], tmp_path / "copy") / "out" / "checkpoint-2"
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = fiducial_command(command, checkpoint)
    assert done.exit_code == 2
    assert "is damaged: it has" in done.output
    (checkpoint / "trainer_state.json").unlink()
    done = fiducial_command(command, checkpoint)
    assert "was cut off while it was written" in done.output
    (checkpoint / "model.safetensors").unlink()
    done = fiducial_command(command, checkpoint)
    assert "holds no trained model" in done.output
    (checkpoint / RECORD_FILE).write_text("{")
    done = fiducial_command(command, checkpoint)
    assert "is damaged or was not written by Fiducial" in done.output


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_base_is_refused(
    kind: str,
    finished: Callable[[str], tuple[Path, TrainResult]],
    tmp_path: Path,
) -> None:
    folder = finished(kind)[0]
    wider = save_checkpoint(tmp_path / "wider", hidden_size=64)
    for command in ("verify", "evaluate"):
        done = fiducial_command(command, folder / "out", f"base_model={wider}")
        assert done.exit_code == 2
        assert "does not fit base_model" in done.output or "was not trained from base_model" in done.output


def test_a_resumed_run_refuses_another_base(tmp_path: Path) -> None:
    settings = run_config(tmp_path, save_steps=1, max_steps=2)
    train(settings, console=QUIET)
    change_one_weight(tmp_path / "base-llama" / "model.safetensors")
    resumed = settings | {"max_steps": 3, "auto_resume_from_checkpoints": True}
    with pytest.raises(Exception, match="is not the reference this run was started with"):
        train(resumed, console=QUIET)


def test_without_its_record_a_run_is_said_to_be_compared_with_nothing_that_is_known(tmp_path: Path) -> None:
    settings = run_config(tmp_path, val_set_size=2, save_steps=1, max_steps=2)
    train(settings, console=QUIET)
    for record in (tmp_path / "out").rglob(RECORD_FILE):
        record.unlink()
    console = Console(record=True, width=400, force_terminal=False)
    evaluate(settings, console=console)
    assert f"{tmp_path / 'out'} has no run.json: whether the reference" in console.export_text()
    train(settings | {"max_steps": 3, "auto_resume_from_checkpoints": True}, console=console)
    assert f"{tmp_path / 'out' / 'checkpoint-2'} has no run.json: whether" in console.export_text()


def test_the_record_says_what_was_run_and_gives_no_rows_away(
    finished: Callable[[str], tuple[Path, TrainResult]],
) -> None:
    folder, _ = finished("full")
    record = read_record(folder / "out" / "checkpoint-2")
    assert record.settings == settings_of(folder, "full")
    assert record.run.model.dtype == "float32"
    assert record.run.model.autocast is None
    assert record.run.method == validate_config(settings_of(folder, "full")).method
    assert "Question" not in (folder / "out" / RECORD_FILE).read_text()


def test_a_record_of_python_takes_no_overrides(tmp_path: Path) -> None:
    train(validate_config(run_config(tmp_path, rows=8)), console=QUIET)
    done = fiducial_command("verify", tmp_path / "out", "seed=2")
    assert done.exit_code == 2
    assert "started from Python with a RunConfig" in done.output
    assert fiducial_command("verify", tmp_path / "out").exit_code == 0
