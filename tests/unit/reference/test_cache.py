import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fiducial.config.schema import AdapterConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError, TrainingError
from fiducial.model.adapters import new_adapter
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.identity import Identity, fingerprint, identify
from fiducial.reference.plan import Checkpoint, ReferencePlan, Schedule, Source
from fiducial.reference.sources import InitialPolicy, Precomputed
from oracles import naive_token_logps
from tiny import random_groups, tiny_model

IDENTITY = Identity("base", "0", "float32", "None")
KEY = "ab" * 16


class Counting:
    """The policy as a reference, counting what it is asked."""

    def __init__(self, scorer: Scorer, stop_after: int = 10**9) -> None:
        self.inner, self.stop_after = InitialPolicy(scorer), stop_after
        self.sequences: list[int] = []

    def token_logps(self, batch):
        if len(self.sequences) == self.stop_after:
            raise KeyboardInterrupt
        self.sequences.append(batch.num_sequences)
        return self.inner.token_logps(batch)


def policy() -> Scorer:
    return Scorer(tiny_model(), layout="padded")


def records(store: LogpStore, groups: list[TokenizedGroup]) -> list[list[float]]:
    return [store.get(key).tolist() for group in groups for key in group.keys]


def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, IDENTITY)
    values = np.array([-1.5, -0.25], np.float32)
    store.put(KEY, values)
    store.flush()
    again = LogpStore(tmp_path, IDENTITY)
    assert len(again) == 1
    assert np.array_equal(again.get(KEY), values)
    assert again.get("cd" * 16) is None


def test_another_reference_finds_nothing(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, IDENTITY)
    store.put(KEY, np.ones(1, np.float32))
    store.flush()
    for change in ({"weights": "1"}, {"dtype": "bfloat16"}, {"autocast": "bfloat16"}, {"format": 2}):
        other = Identity(
            **{"checkpoint": "base", "weights": "0", "dtype": "float32", "autocast": "None"} | change
        )
        assert len(LogpStore(tmp_path, other)) == 0
    moved = Identity("elsewhere", "0", "float32", "None")
    assert len(LogpStore(tmp_path, moved)) == 1


def test_a_foreign_identity_in_the_folder_is_named(tmp_path: Path) -> None:
    store = LogpStore(tmp_path, IDENTITY)
    path = store.folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    with pytest.raises(CacheError, match="dtype differ"):
        LogpStore(tmp_path, IDENTITY)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    store = LogpStore(tmp_path, IDENTITY)
    store.put(KEY, np.linspace(-3, 0, 50, dtype=np.float32))
    store.flush()
    [file] = store.folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    file.write_bytes(content[:-20] if damage == "truncate" else content)
    with pytest.raises(CacheError, match=f"{file.name} is damaged"):
        LogpStore(tmp_path, IDENTITY)


def test_a_full_disk_is_reported_and_costs_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LogpStore(tmp_path, IDENTITY)
    store.put(KEY, np.ones(1, np.float32))
    store.flush()
    store.put("cd" * 16, np.ones(1, np.float32))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CacheError, match="No space left"):
            store.flush()
    assert len(LogpStore(tmp_path, IDENTITY)) == 1
    store.flush()
    assert len(LogpStore(tmp_path, IDENTITY)) == 2
    assert [file.name for file in store.folder.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_the_pass_scores_what_the_naive_twin_scores(tmp_path: Path, budget: int) -> None:
    groups, scorer = random_groups(7), policy()
    store = LogpStore(tmp_path, IDENTITY)
    count = score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=budget)
    assert count == 14
    batch = scorer.pack(groups)
    stored = Precomputed(store).token_logps(batch).values
    expected = naive_token_logps(scorer.model, groups)
    torch.testing.assert_close(stored, expected.detach(), atol=1e-4, rtol=0)
    shifted = Precomputed(store).token_logps(scorer.pack(groups[::-1])).values
    assert (shifted - expected).abs().max() > 0.1


def test_only_what_is_missing_is_scored(tmp_path: Path) -> None:
    groups, scorer = random_groups(5), policy()
    store = LogpStore(tmp_path, IDENTITY)
    score_reference(groups[:3], InitialPolicy(scorer), scorer, store, token_budget=500)
    half = TokenizedGroup(groups[4].prompt, groups[4].completions[:1])
    score_reference([half], InitialPolicy(scorer), scorer, store, token_budget=500)
    counting, progress = Counting(scorer), []
    score_reference(
        [*groups, groups[3]],
        counting,
        scorer,
        store,
        token_budget=1,
        progress=lambda *at: progress.append(at),
    )
    assert sorted(counting.sequences) == [1, 2]  # half of the fifth group, all of the fourth, once
    assert progress == [(1, 2), (2, 2)]


def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path: Path) -> None:
    groups, scorer = random_groups(6), policy()
    with pytest.raises(KeyboardInterrupt):
        score_reference(
            groups, Counting(scorer, stop_after=4), scorer, LogpStore(tmp_path, IDENTITY), token_budget=1
        )
    resumed, counting = LogpStore(tmp_path, IDENTITY), Counting(scorer)
    assert len(resumed) == 8
    score_reference(groups, counting, scorer, resumed, token_budget=1)
    assert counting.sequences == [2, 2]
    fresh = LogpStore(tmp_path / "fresh", IDENTITY)
    score_reference(groups, InitialPolicy(scorer), scorer, fresh, token_budget=1)
    assert records(resumed, groups) == records(fresh, groups)


def test_it_is_flushed_on_the_way(tmp_path: Path) -> None:
    groups, scorer = random_groups(6), policy()
    store = LogpStore(tmp_path, IDENTITY)
    score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=1, flush_every=0)
    assert len(list(store.folder.glob("*.safetensors"))) == 6


def test_log_probs_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    groups, scorer = random_groups(2), policy()
    torch.nn.init.constant_(scorer.model.lm_head.weight, torch.nan)
    store = LogpStore(tmp_path, IDENTITY)
    with pytest.raises(TrainingError, match="not finite"):
        score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=500)
    assert len(LogpStore(tmp_path, IDENTITY)) == 0


def _score_as(rank: int, folder: Path, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    groups, scorer = random_groups(5), policy()
    store, counting = LogpStore(folder / "store", IDENTITY), Counting(scorer)
    score_reference(groups, counting, scorer, store, token_budget=1)
    results.put((rank, counting.sequences, records(store, groups)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_the_work_and_see_all_of_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_score_as, args=(rank, tmp_path, results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    (_, first, seen), (_, second, also_seen) = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert first == [2, 2, 2]
    assert second == [2, 2, 0], "both must run as many passes; the last is empty"
    alone = LogpStore(tmp_path / "alone", IDENTITY)
    score_reference(random_groups(5), InitialPolicy(policy()), policy(), alone, token_budget=1)
    assert seen == also_seen == records(alone, random_groups(5))


def fingerprints_with(**adapter: object) -> tuple[str, str]:
    cfg = AdapterConfig.model_validate({"kind": "lora", "r": 4, **adapter})
    torch.manual_seed(0)
    model = new_adapter(tiny_model(), cfg, float32=True)
    return fingerprint(model, with_adapter=False), fingerprint(model)


def test_the_base_under_any_adapter_is_the_base() -> None:
    plain = fingerprint(tiny_model())
    for adapter in ({}, {"r": 2}, {"modules_to_save": ("lm_head",)}, {"trainable_token_indices": (1, 2)}):
        off, on = fingerprints_with(**adapter)
        assert off == plain
        assert on != plain


def test_what_changes_the_answers_changes_the_fingerprint() -> None:
    plain = fingerprint(tiny_model())
    one_bit = tiny_model()
    with torch.no_grad():
        one_bit.lm_head.weight[-1, -1] = torch.nextafter(one_bit.lm_head.weight[-1, -1], torch.tensor(9.0))
    others = [one_bit, tiny_model().bfloat16(), tiny_model(rms_norm_eps=0.5), tiny_model(seed=1)]
    assert len({plain, *map(fingerprint, others)}) == 5
    _, first = fingerprints_with(alpha=8)
    _, second = fingerprints_with(alpha=16)
    assert first != second
    renamed = tiny_model()
    renamed.config.pad_token_id, renamed.config._name_or_path = 3, "elsewhere"
    assert fingerprint(renamed) == plain


def test_the_identity_follows_the_plans_source() -> None:
    model = new_adapter(tiny_model(), AdapterConfig(kind="lora", r=4), float32=True)
    scorer = Scorer(model, layout="padded", autocast=torch.bfloat16)
    off, on = (
        identify(ReferencePlan(source, Schedule.PRECOMPUTED, Checkpoint("here"), "a test"), scorer)
        for source in (Source.ADAPTER_OFF, Source.FROZEN_ADAPTER)
    )
    assert off.weights == fingerprint(tiny_model()) != on.weights
    assert (off.checkpoint, off.dtype, off.autocast) == ("here", "float32", "bfloat16")
    assert off.digest != on.digest
