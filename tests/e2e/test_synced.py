"""A reference that follows the policy: where it stands after each move, and after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fiducial.errors import TrainingError
from fiducial.reference.cache.scoring import _Worker
from fiducial.reference.kept import Kept
from fiducial.reference.kinds import Sync
from fiducial.reference.moving import STATE_FILE, ModelFollower
from fiducial.train import train
from fiducial.training.interruption import Interrupted
from launching import two_processes
from resuming import interrupt_after, left_behind
from run_configs import run_config
from tiny import tiny_model

SOFT = {"schedule": "synced", "mixup_alpha": 0.25, "sync_steps": 2}
COPY = {"schedule": "synced", "mixup_alpha": 1.0, "sync_steps": 2}
LORA = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2}


def run(folder: Path, reference: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """Six steps, each of them saved."""
    chosen = {"num_epochs": 2, "save_steps": 1, "rows": 12, "reference": reference, "learning_rate": 1e-2}
    return run_config(folder, **(chosen | overrides))


def weights(checkpoint: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(checkpoint / name)


def test_full_fine_tuning_averages_the_weights(tmp_path: Path) -> None:
    result = train(run(tmp_path, SOFT))
    expected = weights(tmp_path / "base-llama")
    start = expected
    for step in range(1, 7):
        policy = weights(tmp_path / "out" / f"checkpoint-{step}")
        if step % 2 == 0:
            expected = {name: 0.25 * policy[name] + 0.75 * value for name, value in expected.items()}
        held = weights(tmp_path / "out" / f"checkpoint-{step}", STATE_FILE)
        assert held.keys() == expected.keys()
        torch.testing.assert_close(held, expected, rtol=1e-6, atol=1e-7)
    assert any((expected[name] - start[name]).abs().max() > 1e-3 for name in start)
    moves = json.loads((tmp_path / "out" / "plan.json").read_text())["proof"]["moves"]
    assert [move["step"] for move in moves] == [2, 4, 6]
    assert all(move["moved_before"] < 1e-4 < move["distance_to_policy"] for move in moves)
    assert result.metrics["rewards/margins"] != 0


def test_an_adapter_is_copied(tmp_path: Path) -> None:
    train(run(tmp_path, COPY, **LORA, max_steps=5, num_epochs=None))
    adapter = weights(tmp_path / "out" / "checkpoint-4", "adapter_model.safetensors")
    held = weights(tmp_path / "out" / "checkpoint-5", STATE_FILE)
    found = {name.replace(".reference.", "."): value for name, value in held.items()}
    assert adapter.keys() == found.keys()
    assert all(torch.equal(adapter[name], found[name]) for name in adapter)
    assert any(adapter[name].abs().max() > 1e-3 for name in adapter if "lora_B" in name)
    assert not (tmp_path / "out" / "reference").exists()


def test_a_copy_held_in_another_precision_goes_on(tmp_path: Path) -> None:
    result = train(run(tmp_path, COPY | {"dtype": "bfloat16"}, max_steps=4, num_epochs=None))
    proof = result.record["proof"]
    assert [move["step"] for move in proof["moves"]] == [2, 4]
    assert all(1e-4 < move["distance_to_policy"] < 0.2 for move in proof["moves"]), "bfloat16 rounds"
    held, policy = (
        weights(tmp_path / "out" / "checkpoint-4", name) for name in (STATE_FILE, "model.safetensors")
    )
    assert all(torch.equal(held[name], value.bfloat16()) for name, value in policy.items())


def test_rewards_start_anew_at_a_copy(tmp_path: Path) -> None:
    train(run(tmp_path, COPY, num_epochs=1, lr_scheduler="constant"))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["rewards/chosen"] for line in lines if "rewards/chosen" in line]
    assert rewards[0] == pytest.approx(0, abs=1e-5)
    assert abs(rewards[1]) > 1e-3
    assert rewards[2] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", [{"reference": SOFT}, {"reference": COPY} | LORA], ids=["full", "lora"])
@pytest.mark.parametrize("stop", [2, 3])
def test_resumes_exactly(
    kind: dict[str, Any], stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (str(tmp_path / name) for name in ("whole", "cut"))
    settings = run(tmp_path, **kind)
    train(settings | {"output_dir": whole})
    with monkeypatch.context() as patch:
        interrupt_after(stop, patch)
        with pytest.raises(Interrupted):
            train(settings | {"output_dir": cut})
    train(settings | {"output_dir": cut, "auto_resume_from_checkpoints": True})

    (logs, final), (resumed_logs, resumed) = left_behind(Path(whole)), left_behind(Path(cut))
    assert resumed_logs == logs
    assert all(torch.equal(final[name], resumed[name]) for name in final)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many completions each pass of the reference had: of a window, and beside the policy."""
    found: dict[str, list[int]] = {"window": [], "beside": []}
    score_ahead, score_beside = _Worker._score, Kept._score

    def ahead(self: _Worker, parts: Any) -> None:
        before = self.scored
        score_ahead(self, parts)
        found["window"].append(self.scored - before)

    def beside(self: Kept, wanted: Any, batch: Any) -> None:
        found["beside"].append(sum(len(group.completions) for group in wanted))
        score_beside(self, wanted, batch)

    monkeypatch.setattr(_Worker, "_score", ahead)
    monkeypatch.setattr(Kept, "_score", beside)
    return found


@pytest.mark.parametrize("rl", ["dpo", "kto"])
def test_what_the_next_window_needs_is_scored_once(
    tmp_path: Path, passes: dict[str, list[int]], rl: str
) -> None:
    four = COPY | {"sync_steps": 4}
    train(run(tmp_path, four, rl=rl, micro_batch_size=4 if rl == "dpo" else 8, save_steps=None))
    assert passes["beside"] == [], "nothing is left to be scored in a step"
    if rl == "dpo":  # twelve rows make three steps: the fourth sees rows again, and two are left
        assert sum(passes["window"]) == 24 + 16
        assert len(passes["window"]) < 6, "in larger passes than those of a step"
    else:
        assert sum(passes["window"]) > 24 + 16, "mismatched completions too"


def test_what_is_evaluated_twice_between_two_moves_is_scored_once(
    tmp_path: Path, passes: dict[str, list[int]]
) -> None:
    evaluated = {"val_set_size": 4, "eval_steps": 1, "eval_batch_size": 2, "rows": 16, "save_steps": None}
    train(run(tmp_path, SOFT | {"sync_steps": 3}, **evaluated))
    assert sum(passes["beside"]) == 8 * 3, "once before the first move, after it, and after the second"


def test_a_window_trains_as_a_live_reference(tmp_path: Path, passes: dict[str, list[int]]) -> None:
    order = {"shuffle_merged_datasets": False, "optimizer": "sgd", "max_steps": 6, "num_epochs": None}
    order["learning_rate"] = 0.1
    for name, settings in {
        "window": {"reference": SOFT},
        "live": {"reference": SOFT, "streaming": True},
        "later": {"reference": SOFT | {"sync_steps": 3}},
    }.items():
        train(run(tmp_path, **settings, **order, save_steps=None, output_dir=str(tmp_path / name)))
        if name == "live":
            assert sum(passes["beside"]) == 6 * 8, "scored in the steps' own passes"
    (windowed, final), (live, same), (later, other) = (
        left_behind(tmp_path / name) for name in ("window", "live", "later")
    )
    for ours, theirs in zip(windowed, live, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert max((final[name] - same[name]).abs().max() for name in final) < 1e-5
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(windowed, later, strict=True)) > 1e-3
    assert max((final[name] - other[name]).abs().max() for name in final) > 1e-5


@pytest.mark.parametrize("lost", [False, True])
def test_records_of_the_version_that_stands_are_kept_for_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: dict[str, list[int]], lost: bool
) -> None:
    settings = run(tmp_path, SOFT | {"sync_steps": 3})
    train(settings | {"output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(Interrupted):
            train(settings)
    records = tmp_path / "out" / "reference"
    [version] = records.iterdir()
    assert len(list(version.glob("*.arrow"))) == 1, "of an older version nothing is left"
    if lost:
        shutil.rmtree(records)
    before = sum(passes["window"])
    train(settings | {"auto_resume_from_checkpoints": True})
    assert sum(passes["window"]) - before == (24 if lost else 0)
    (_, whole), (_, resumed) = left_behind(tmp_path / "whole"), left_behind(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not records.exists()


def test_two_processes_share_a_window(tmp_path: Path) -> None:
    half = run(tmp_path, SOFT, micro_batch_size=2, optimizer="sgd", output_dir=str(tmp_path / "two"))
    (tmp_path / "runs.json").write_text(json.dumps([{"settings": half, "stop_after": None}]))
    two_processes(Path(__file__).parents[1] / "run_worker.py", str(tmp_path / "runs.json"))
    train(run(tmp_path, SOFT, optimizer="sgd"))
    (_, two), (_, one) = left_behind(tmp_path / "two"), left_behind(tmp_path / "out")
    assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-5
    assert not (tmp_path / "two" / "reference").exists()


def test_a_checkpoint_without_its_reference_is_refused(tmp_path: Path) -> None:
    settings = run(tmp_path, SOFT, max_steps=3, num_epochs=None)
    train(settings)
    (tmp_path / "out" / "checkpoint-3" / STATE_FILE).unlink()
    again = settings | {"max_steps": 4, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-3")}
    with pytest.raises(TrainingError, match=STATE_FILE):
        train(again)


@pytest.mark.parametrize("kind", [{"reference": SOFT}, {"reference": COPY} | LORA], ids=["full", "lora"])
def test_the_reference_of_another_checkpoint_is_refused(tmp_path: Path, kind: dict[str, Any]) -> None:
    settings = run(tmp_path, **kind, num_epochs=None, max_steps=4)
    train(settings)
    shutil.copy(tmp_path / "out" / "checkpoint-2" / STATE_FILE, tmp_path / "out" / "checkpoint-4")
    resumed = settings | {"max_steps": 6, "auto_resume_from_checkpoints": True}
    with pytest.raises(TrainingError, match=r"checkpoint-4 is not the one this run had moved to .*Put its"):
        train(resumed)


def test_small_moves_are_not_lost_in_bfloat16() -> None:
    policy, reference = tiny_model(), tiny_model().to(torch.bfloat16)
    follower = ModelFollower(policy, reference, Sync(1, mixup_alpha=0.001))
    name = "model.layers.0.self_attn.q_proj.weight"
    start = reference.get_parameter(name).float().clone()
    with torch.no_grad():
        policy.get_parameter(name).copy_(start + 0.5 * start.abs())
    for _ in range(200):
        follower.move()
    moved = (reference.get_parameter(name).float() - start) / (0.5 * start.abs())
    assert moved.median().item() == pytest.approx(1 - 0.999**200, abs=0.02)
