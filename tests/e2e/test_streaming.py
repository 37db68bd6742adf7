"""Streamed runs: what stored data would have given, in one process or two, with a live reference or none."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fiducial.as_then import verify_finished
from fiducial.finished import from_folder
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.kept import Kept
from fiducial.train import TrainResult, train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.interruption import Interrupted
from fiducial.training.trainer import PreferenceTrainer
from launching import two_processes
from resuming import interrupt_after
from run_configs import run_config
from tiny import save_adapter, save_checkpoint

WORKER = Path(__file__).parents[1] / "run_worker.py"
STREAMED = {"streaming": True, "max_steps": 6, "streaming_multipack_buffer_size": 5}


def run(folder: Path, output: str, **settings: Any) -> TrainResult:
    return train(run_config(folder, **settings, output_dir=str(folder / output)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many completions each pass of a reference whose answers are kept has had to score."""
    found: list[int] = []
    score = Kept._score

    def counting(self: Kept, wanted: Any, batch: Any) -> None:
        found.append(sum(len(group.completions) for group in wanted))
        score(self, wanted, batch)

    monkeypatch.setattr(Kept, "_score", counting)
    return found


def logged(folder: Path, *names: str) -> list[float]:
    lines = [record for _, record in read_metrics_lines(folder / "metrics.jsonl")]
    return [line[name] for line in lines for name in names if name in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_rows_in_their_own_order_train_as_stored_ones(tmp_path: Path) -> None:
    order = {"shuffle_merged_datasets": False, "learning_rate": 1e-2}
    stored = run(tmp_path, "stored", num_epochs=2, **order)
    streamed = run(tmp_path, "streamed", streaming=True, max_steps=6, **order)
    assert (str(stored.plan.schedule), str(streamed.plan.schedule)) == ("precomputed", "live")
    assert logged(tmp_path / "streamed", "loss") == pytest.approx(
        logged(tmp_path / "stored", "loss"), abs=1e-5
    )
    ours, theirs = weights(tmp_path / "streamed"), weights(tmp_path / "stored")
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5
    shuffled = run(tmp_path, "shuffled", **STREAMED, learning_rate=1e-2)
    assert shuffled.metrics["loss"] != streamed.metrics["loss"]


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, "separate_model"),
        ({"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}, "adapter_off"),
        ({"rl": "orpo"}, "none"),
    ],
)
def test_the_reference_of_a_streamed_run(tmp_path: Path, settings: dict[str, Any], source: str) -> None:
    result = run(tmp_path, "out", **STREAMED, **settings, val_set_size=3, eval_steps=3)
    assert str(result.plan.source) == source
    assert result.record["reference"]["schedule"] == ("live" if source != "none" else None)
    assert not (tmp_path / "out" / "reference").exists()
    assert result.metrics["step"] == 6
    assert len(logged(tmp_path / "out", "loss")) == 6
    assert len(logged(tmp_path / "out", "eval_loss")) == 3
    account = json.loads((tmp_path / "out" / "plan.json").read_text())["audit"]
    assert (account["train"], account["evaluation"]) == (9, 3)
    assert account["notes"][0].startswith("streamed: read 3 times")


def test_a_finished_run_is_not_trained_on(tmp_path: Path) -> None:
    run(tmp_path, "out", **STREAMED, save_steps=3)
    before = weights(tmp_path / "out")
    run(tmp_path, "out", **STREAMED, save_steps=3, auto_resume_from_checkpoints=True)
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "out").items())


def test_two_processes_read_disjoint_rows_and_resume_exactly(tmp_path: Path) -> None:
    options = STREAMED | {"val_set_size": 3, "optimizer": "sgd", "learning_rate": 1e-2}
    half = run_config(tmp_path, rows=13, micro_batch_size=2, **options)
    broken = half | {"output_dir": str(tmp_path / "broken")}
    runs = [
        {"settings": half | {"output_dir": str(tmp_path / "whole")}, "stop_after": None},
        {"settings": broken, "stop_after": 4},
        {"settings": broken | {"auto_resume_from_checkpoints": True}, "stop_after": None},
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    two_processes(WORKER, str(tmp_path / "runs.json"))
    run(tmp_path, "alone", rows=13, micro_batch_size=4, **options)
    whole, resumed, alone = (weights(tmp_path / name) for name in ("whole", "broken", "alone"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert max((whole[name] - alone[name]).abs().max().item() for name in whole) < 1e-5
    together, one = (logged(tmp_path / name, "loss", "eval_loss") for name in ("whole", "alone"))
    assert together == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("adapter", [{}, {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}])
def test_a_row_is_scored_when_it_is_first_seen_and_never_again(
    tmp_path: Path, asked: list[int], adapter: dict[str, Any]
) -> None:
    settings = STREAMED | adapter | {"rows": 12, "max_steps": 9}
    result = run(tmp_path, "first", **settings)
    assert result.plan.writes_through
    assert asked == [8, 8, 8], "three passes over twelve pairs: only the first asks the reference"
    again = run(tmp_path, "again", **settings)
    assert asked == [8, 8, 8]
    first, second = weights(tmp_path / "first"), weights(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert logged(tmp_path / "first", "loss") == logged(tmp_path / "again", "loss")
    assert again.record["proof"]["moved_while_training"] <= again.record["proof"]["tolerance"]

    run(tmp_path, "longer", **settings | {"rows": 16, "max_steps": 4})
    assert sum(asked) == 24 + 8, "of a longer stream only the new rows"
    run(tmp_path, "other", **settings, bf16="full")
    assert sum(asked) > 32, "another reference has records of its own"


@pytest.mark.parametrize("kind", ["named adapter", "offloaded"])
def test_the_rows_of_another_reference_are_kept_too(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    settings = STREAMED | {"rows": 12, "save_steps": 2}
    if kind == "named adapter":
        settings |= {"adapter": "lora", "lora_r": 4, "learning_rate": 1e-2}
        named = {"adapter": str(save_adapter(tmp_path / "sft", base(tmp_path)))}
    else:
        named = {"model": str(save_checkpoint(tmp_path / "other", seed=1)), "offload": "disk"}
    whole = run(tmp_path, "whole", **settings, reference=named)
    assert (whole.plan.writes_through, whole.plan.equals_starting_policy) == (True, False)
    assert asked == [8, 8, 8], "of two passes over twelve pairs only the first asks the reference"
    assert ("the adapter that was named is held" in whole.plan.why) == (kind == "named adapter")

    with monkeypatch.context() as patched:
        interrupt_after(3, patched)
        with pytest.raises(Interrupted):
            run(tmp_path, "broken", **settings, reference=named)
    run(tmp_path, "broken", **settings, reference=named, auto_resume_from_checkpoints=True)
    told = Console(record=True, width=200, file=io.StringIO())
    stored = settings | {"streaming": False, "streaming_multipack_buffer_size": None}
    train(run_config(tmp_path, **stored, reference=named, output_dir=str(tmp_path / "stored")), console=told)
    assert sum(asked) == 24, "one identity: resumed, and of stored data, all are known"
    assert "training data: known from an earlier run" in told.export_text()
    findings = verify_finished(from_folder(tmp_path / "whole"), console=Console(quiet=True))
    assert findings["cached records"].startswith("24; 8 of this data scored again")

    run(tmp_path, "live", **settings, reference=named | {"schedule": "live"})
    assert sum(asked) == 24
    first, resumed, live = (weights(tmp_path / name) for name in ("whole", "broken", "live"))
    assert all(torch.equal(first[name], resumed[name]) for name in first)
    assert max((first[name] - live[name]).abs().max().item() for name in first) < 1e-5


def base(folder: Path) -> Path:
    return Path(run_config(folder, rows=12)["base_model"])


def test_a_live_reference_that_was_asked_for_is_scored_at_every_step(
    tmp_path: Path, asked: list[int], reference_cache: Path
) -> None:
    live = run(tmp_path, "live", **STREAMED, reference={"schedule": "live"})
    assert not live.plan.writes_through
    assert not reference_cache.exists()
    run(tmp_path, "kept", **STREAMED)
    assert sum(asked) == 24
    ours, theirs = weights(tmp_path / "kept"), weights(tmp_path / "live")
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


def test_what_is_stored_and_what_is_streamed_share_their_records(tmp_path: Path, asked: list[int]) -> None:
    run(tmp_path, "stored", num_epochs=1)
    run(tmp_path, "streamed", **STREAMED)
    assert asked == []


def test_a_checkpoint_finds_on_disk_all_that_was_scored_before_it(
    tmp_path: Path, reference_cache: Path, monkeypatch: pytest.MonkeyPatch, asked: list[int]
) -> None:
    written: list[int] = []
    save = PreferenceTrainer._save_callbacks_files

    def saved(self: PreferenceTrainer, trial: Any) -> None:
        [reference] = Inventory(str(reference_cache)).references()
        written.append(reference.records - sum(asked))
        save(self, trial)

    monkeypatch.setattr(PreferenceTrainer, "_save_callbacks_files", saved)
    run(tmp_path, "out", **STREAMED, save_steps=1)
    assert written == [0] * 6
    assert sum(asked) > 0
