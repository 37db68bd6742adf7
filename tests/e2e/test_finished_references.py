"""Finished runs whose reference is another policy than their start: is it still what it was?"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console

from fiducial.as_then import verify_finished
from fiducial.config.load import validate_config
from fiducial.errors import ModelError
from fiducial.evaluate import evaluate
from fiducial.finished import from_folder
from fiducial.merge import merge_adapter
from fiducial.train import TrainResult, train
from finishing import change_one_weight, copied, fiducial_command
from run_configs import run_config
from served_model import ModelServer, serve
from tiny import save_adapter, save_checkpoint, tiny_model

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "beside the policy's": (LORA, {"adapter": "sft"}, "frozen_adapter"),
    "merged": ({}, {"adapter": "sft"}, "separate_model"),
    "offloaded": ({}, {"model": "other", "offload": "disk"}, "separate_model"),
    "served": ({}, {"endpoint": "", "model": "tiny"}, "endpoint"),
}
"""Settings of the run, its reference, and the source that is expected."""
OF_FILES = [kind for kind in KINDS if kind != "served"]
QUIET = Console(quiet=True)


class Finished(NamedTuple):
    folder: Path
    settings: dict[str, Any]
    result: TrainResult


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    with serve(tiny_model(seed=1)) as served:
        yield served


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, server: ModelServer) -> Callable[[str], Finished]:
    """A trained run of each kind, made once."""
    made: dict[str, Finished] = {}

    def make(kind: str) -> Finished:
        if kind not in made:
            folder = tmp_path_factory.mktemp("run")
            keys, reference, _ = KINDS[kind]
            settings = run_config(folder, rows=12, val_set_size=4, max_steps=2, **keys)
            save_checkpoint(folder / "other", seed=1)
            save_adapter(folder / "sft", folder / "base-llama")
            places = {name: str(folder / name) for name in ("sft", "other")} | {"": server.url}
            settings["reference"] = {key: places.get(value, value) for key, value in reference.items()}
            made[kind] = Finished(folder, settings, train(settings, console=QUIET))
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_still_what_it_was(kind: str, finished: Callable[[str], Finished]) -> None:
    folder, settings, result = finished(kind)
    assert (str(result.plan.source), result.plan.equals_starting_policy) == (KINDS[kind][2], False)
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 0, done.output
    assert "as then: " in done.output
    assert ("the same as when the run started" in done.output) == (kind in OF_FILES)
    again = evaluate(settings, console=QUIET)
    for name in ("loss", "kl"):
        assert again[name] == pytest.approx(result.metrics[f"eval_{name}"], rel=1e-4), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_proved_before_training(kind: str, finished: Callable[[str], Finished], tmp_path: Path) -> None:
    run = tmp_path / "run.json"  # YAML too
    run.write_text(json.dumps(finished(kind).settings))
    done = fiducial_command("verify", run)
    assert done.exit_code == 0, done.output
    assert "another policy, as asked" in done.output
    assert "loaded bit for bit" not in done.output, "no file has been compared with what was loaded"


@pytest.mark.parametrize("kind", KINDS)
def test_without_its_data_what_was_named_is_compared(
    kind: str, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    folder = copied(finished(kind).folder, tmp_path / "copy")
    (folder / "pairs-12.jsonl").unlink()
    run = from_folder(folder / "out")
    findings = verify_finished(run, console=QUIET)
    assert "not compared" in findings["log-probs"]
    assert ("the same as when the run started" in findings["weights"]) == (kind in OF_FILES)
    if kind in OF_FILES:
        change_one_weight(changed_file(folder, kind))
        with pytest.raises(ModelError, match="is not the reference this run was started with: 1 of "):
            verify_finished(run, console=QUIET)


def changed_file(folder: Path, kind: str) -> Path:
    if kind == "offloaded":
        return folder / "other" / "model.safetensors"
    return folder / "sft" / "adapter_model.safetensors"


@pytest.mark.parametrize("kind", OF_FILES)
def test_changed_weights_are_another_reference(
    kind: str, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    folder = copied(finished(kind).folder, tmp_path / "copy")
    change_one_weight(changed_file(folder, kind))
    for command in ("verify", "evaluate"):
        done = fiducial_command(command, folder / "out")
        assert done.exit_code == 2
        assert "is not the reference this run was started with: 1 of " in done.output
        assert "(base_model, model_revision, reference.adapter)" in done.output or kind == "offloaded"


@pytest.mark.parametrize("kind", OF_FILES)
def test_another_name_is_another_reference(
    kind: str, finished: Callable[[str], Finished], tmp_path: Path
) -> None:
    folder = finished(kind).folder
    if kind == "offloaded":
        key, named = "model", save_checkpoint(tmp_path / "third", seed=2)
    else:
        key, named = "adapter", save_adapter(tmp_path / "dpo", folder / "base-llama", lora_alpha=3)
    done = fiducial_command("verify", folder / "out", f"reference.{key}={named}")
    assert done.exit_code == 2
    assert "is not the reference this run was started with" in done.output


def test_another_name_on_the_server_is_another_reference(finished: Callable[[str], Finished]) -> None:
    done = fiducial_command("verify", finished("served").folder / "out", "reference.model=larger")
    assert done.exit_code == 2
    assert "model of the server: tiny then, larger now" in done.output
    assert "(reference.model, reference.endpoint)" in done.output


def test_another_model_under_the_same_name_is_noticed(
    finished: Callable[[str], Finished], server: ModelServer
) -> None:
    out, right = finished("served").folder / "out", server.model
    server.shift = -0.01  # what a server's batches round
    assert fiducial_command("verify", out).exit_code == 0
    server.shift, server.model = 0.0, tiny_model(seed=2)
    done = fiducial_command("verify", out)
    server.model = right
    assert done.exit_code == 2
    assert "the server, the model's name and its revision are those of then, and it answers" in done.output


@pytest.mark.parametrize("keys", [{"rl": "orpo"}, {"reference": {"model": "other"}}], ids=["none", "another"])
def test_an_adapter_on_another_base_is_found_where_the_reference_is_not_over_it(
    tmp_path: Path, keys: dict[str, Any]
) -> None:
    save_checkpoint(tmp_path / "other", seed=1)
    if "reference" in keys:
        keys = {"reference": {"model": str(tmp_path / "other")}}
    settings = run_config(tmp_path, rows=12, val_set_size=4, max_steps=2, save_steps=1, **LORA, **keys)
    train(settings, console=QUIET)
    evaluate(settings, console=QUIET)
    merge_adapter(validate_config(settings), tmp_path / "merged")
    change_one_weight(tmp_path / "base-llama" / "model.safetensors")
    resumed = settings | {"max_steps": 3, "auto_resume_from_checkpoints": True}
    for again in (
        lambda: evaluate(settings, console=QUIET),
        lambda: merge_adapter(validate_config(settings), tmp_path / "merged"),
        lambda: train(resumed, console=QUIET),
    ):
        with pytest.raises(
            ModelError,
            match=r"not the base this run's adapter .*: 1 of .*q_proj.*\(base_model, model_revision\)",
        ):
            again()
