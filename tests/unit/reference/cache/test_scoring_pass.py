"""The pass that fills a store: what it scores, in which passes, and what an interruption costs."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fiducial.data.batch import Layout
from fiducial.data.micro_batches import COSTS
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError, TrainingError
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference, scoring
from fiducial.reference.cache.passes import Todo, Unfinished, cut_passes, look_up, take
from fiducial.reference.endpoint import Endpoint
from fiducial.reference.identity import Identity
from fiducial.reference.served import ask_for_missing
from fiducial.reference.sources import InitialPolicy, Precomputed
from forks import CONTEXT, fork
from oracles import naive_token_logps
from tiny import random_groups, tiny_model

IDENTITY = Identity("base", "0", "float32", "None")
MIXED = 150
"""A budget that puts several groups in a pass, so that what shares one matters."""


class Counting:
    """The policy as a reference, counting what it is asked."""

    def __init__(self, scorer: Scorer, stop_after: int = 10**9) -> None:
        self.inner, self.stop_after = InitialPolicy(scorer), stop_after
        self.batches: list[tuple[str, ...]] = []

    @property
    def sequences(self) -> list[int]:
        return list(map(len, self.batches))

    def token_logps(self, batch):
        if len(self.sequences) == self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(batch.keys)
        return self.inner.token_logps(batch)


def policy(layout: Layout = "padded") -> Scorer:
    return Scorer(tiny_model(), layout=layout)


def records(store: LogpStore, groups: list[TokenizedGroup]) -> list[list[float]]:
    return [store.get(key).tolist() for group in groups for key in group.keys]


def score(folder: Path, groups, budget: int = 1, **options) -> tuple[LogpStore, list[int]]:
    """The store in `folder` after a pass, and how many sequences each forward pass had."""
    scorer = policy(options.pop("layout", "padded"))
    store, counting = LogpStore(folder, IDENTITY), Counting(scorer, options.pop("stop_after", 10**9))
    score_reference(groups, counting, scorer, store, token_budget=budget, **options)
    return store, counting.sequences


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
    groups, progress = random_groups(5), []
    score(tmp_path, groups[:3], 500)
    score(tmp_path, [TokenizedGroup(groups[4].prompt, groups[4].completions[:1])], 500)
    _, sequences = score(tmp_path, [*groups, groups[3]], progress=lambda *at: progress.append(at))
    assert sorted(sequences) == [1, 2]  # half of the fifth group, all of the fourth, once
    assert progress == [(1, 2), (2, 2)]
    _, again = score(tmp_path, groups)
    assert again == []


def test_appended_rows_alone_are_scored(tmp_path: Path) -> None:
    groups = random_groups(8)
    score(tmp_path, groups[:6], MIXED)
    _, sequences = score(tmp_path, groups, 10_000)
    assert sequences == [4]


def test_a_shorter_limit_on_length_scores_nothing_again(tmp_path: Path) -> None:
    groups = [group for group in random_groups(9) if min(map(len, group.completions)) > 6]
    whole, _ = score(tmp_path, groups, MIXED)
    cut = [TokenizedGroup(group.prompt, tuple(c[:5] for c in group.completions)) for group in groups]
    store, sequences = score(tmp_path, cut, MIXED)
    assert sequences == []
    assert records(store, cut) == [values[:5] for values in records(whole, groups)]
    alone, _ = score(tmp_path / "alone", cut, MIXED)
    np.testing.assert_allclose(records(store, cut), records(alone, cut), atol=1e-4)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_pass_ends_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    groups = random_groups(12)
    whole, sequences = score(tmp_path / "whole", groups, MIXED)
    assert len(sequences) > 3
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "stopped", groups, MIXED, stop_after=stop_after)
    assert len(LogpStore(tmp_path / "stopped", IDENTITY)) == sum(sequences[:stop_after])
    resumed, rest = score(tmp_path / "stopped", groups, MIXED)
    assert sorted(rest) == sorted(sequences[stop_after:]), "nothing is scored twice"
    assert records(resumed, groups) == records(whole, groups)
    assert not list(resumed.folder.glob("unfinished-*")), "nothing is left to remember"


@pytest.mark.slow
@pytest.mark.parametrize("remembered", [True, False])
def test_what_one_of_two_processes_left_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remembered: bool
) -> None:
    groups = random_groups(30)
    scorer = policy("packed")
    passes = Counting(scorer)
    whole = LogpStore(tmp_path / "whole", IDENTITY)
    score_reference(groups, passes, scorer, whole, token_budget=MIXED)
    with monkeypatch.context() as patch:
        # The other process dies before it has written anything.
        patch.setattr(scoring, "num_processes", lambda: 2)
        with pytest.raises(CacheError):
            score(tmp_path / "half", groups, MIXED, layout="packed")
    [memory] = (tmp_path / "half" / IDENTITY.digest).glob("unfinished-*")
    if not remembered:
        memory.unlink()
    resumed, rest = LogpStore(tmp_path / "half", IDENTITY), Counting(scorer)
    score_reference(groups, rest, scorer, resumed, token_budget=MIXED)
    assert (set(rest.batches) < set(passes.batches)) is remembered
    assert records(resumed, groups) == records(whole, groups) or not remembered


def test_a_memory_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    groups = random_groups(6)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, groups, MIXED, stop_after=1)
    [memory] = (tmp_path / IDENTITY.digest).glob("unfinished-*")
    memory.write_bytes(memory.read_bytes()[:-4])
    store, _ = score(tmp_path, groups, MIXED)
    assert all(store.missing(group) is None for group in groups)


def test_data_that_has_changed_since_makes_passes_of_its_own(tmp_path: Path) -> None:
    groups = random_groups(12)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, groups, MIXED, stop_after=2)
    store, _ = score(tmp_path, groups[2:], MIXED)
    assert all(store.missing(group) is None for group in groups[2:])


def test_passes_hold_no_more_than_the_budget_longest_first(tmp_path: Path) -> None:
    groups = random_groups(20)
    todo = look_up(groups, LogpStore(tmp_path, IDENTITY))
    for layout, cost in COSTS.items():
        passes = cut_passes(todo.parts, groups, MIXED, cost)
        taken = [[take(groups, part) for part in parts] for parts in passes]
        lengths = [group.longest for part in taken for group in part]
        assert lengths == sorted(lengths, reverse=True)
        for part in taken:
            tokens = sum(group.num_tokens for group in part)
            rows = sum(len(group.completions) for group in part) * max(group.longest for group in part)
            assert len(part) == 1 or (tokens if layout == "packed" else rows) <= MIXED
        assert sorted(index for parts in passes for index, _ in parts) == list(range(20))


def test_it_is_flushed_on_the_way(tmp_path: Path) -> None:
    store, _ = score(tmp_path, random_groups(6), flush_every=0)
    assert len(list(store.folder.glob("*.arrow"))) == 6


def test_no_more_than_the_interval_waits_to_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, unwritten = iter(range(0, 1000, 4)), []

    class Watching(LogpStore):
        def flush(self) -> None:
            unwritten.append(len(self._pending))
            super().flush()

    groups, scorer = random_groups(8), policy()
    store = Watching(tmp_path, IDENTITY)
    monkeypatch.setattr(scoring.time, "monotonic", lambda: next(clock))  # a pass takes 4 seconds
    score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=1, flush_every=10)
    assert len(groups) > 6
    assert max(unwritten) == 2 * 3, "three passes of two completions: the first moment beyond ten seconds"
    assert sum(unwritten) == 16


def test_what_another_run_scores_meanwhile_is_not_scored_again(tmp_path: Path) -> None:
    groups, scorer = random_groups(6), policy()
    store = LogpStore(tmp_path, IDENTITY)

    class Joined(Counting):
        def token_logps(self, batch):
            if not self.sequences:
                score(tmp_path, groups[:5])
            return super().token_logps(batch)

    joined = Joined(scorer)
    score_reference(groups, joined, scorer, store, token_budget=1, flush_every=0)
    assert len(joined.sequences) <= 2
    assert all(store.missing(group) is None for group in groups)


def test_two_runs_at_once_begin_at_opposite_ends(tmp_path: Path) -> None:
    groups, scorer = random_groups(6), policy()
    seen: list[tuple[str, ...]] = []

    class Other(Counting):
        def token_logps(self, batch):
            seen.append(batch.keys)
            return super().token_logps(batch)

    class First(Counting):
        def token_logps(self, batch):
            if not self.sequences:
                seen.append(batch.keys)
                other = Other(scorer, stop_after=1)
                with pytest.raises(KeyboardInterrupt):
                    score_reference(groups, other, scorer, LogpStore(tmp_path, IDENTITY), token_budget=1)
            return super().token_logps(batch)

    score_reference(groups, First(scorer), scorer, LogpStore(tmp_path, IDENTITY), token_budget=1)
    by_length = sorted(groups, key=lambda group: group.longest)
    assert seen[:2] == [by_length[-1].keys, by_length[0].keys]


def test_a_run_that_ends_while_another_begins_leaves_it_nothing_to_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, ended = random_groups(12), []

    def meanwhile(groups, store):
        todo = look_up(groups, store)
        if not ended:
            ended.append(True)
            score(tmp_path, groups, MIXED)
        return todo

    with pytest.raises(KeyboardInterrupt):
        score(tmp_path, groups, MIXED, stop_after=2)
    monkeypatch.setattr(scoring, "look_up", meanwhile)
    _, sequences = score(tmp_path, groups, MIXED)
    assert sequences == [], "other passes than the first run's would give other bits"


def test_log_probs_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    groups, scorer = random_groups(2), policy()
    torch.nn.init.constant_(scorer.model.lm_head.weight, torch.nan)
    store = LogpStore(tmp_path, IDENTITY)
    with pytest.raises(TrainingError, match="not finite"):
        score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=500)
    assert len(LogpStore(tmp_path, IDENTITY)) == 0


def test_records_that_another_machine_kept_to_itself_are_missed(tmp_path: Path) -> None:
    groups, scorer = random_groups(2), policy()
    store = LogpStore(tmp_path, IDENTITY)
    store.flush = store._pending.clear  # what was written cannot be seen from here
    with pytest.raises(CacheError, match="Every machine must load the same weights and see the same"):
        score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=500)


def _score_as(rank: int, folder: Path, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    groups, scorer = random_groups(5), policy()
    store, counting = LogpStore(folder / "store", IDENTITY), Counting(scorer)
    score_reference(groups, counting, scorer, store, token_budget=1)
    results.put((rank, counting.sequences, records(store, groups)))
    dist.destroy_process_group()


def _read_shortened_as(rank: int, folder: Path, by: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    groups, scorer = shortened(random_groups(5)), policy()
    store = LogpStore(folder / "store", IDENTITY)
    if by == "scoring":
        assert score_reference(groups, Counting(scorer), scorer, store, token_budget=500) == 0
    else:
        assert ask_for_missing(groups, Endpoint("http://nobody.invalid", "name"), store, flush_every=1) == 0
    results.put((rank, records(store, groups)))
    dist.destroy_process_group()


def shortened(groups: list[TokenizedGroup]) -> list[TokenizedGroup]:
    return [TokenizedGroup(group.prompt, tuple(c[:1] for c in group.completions[:1])) for group in groups]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["scoring", "asking"])
def test_every_process_finds_a_shortened_completion_in_the_whole_one(tmp_path: Path, by: str) -> None:
    score(tmp_path / "store", random_groups(5))
    results = CONTEXT.Queue()
    workers = [fork(_read_shortened_as, rank, tmp_path, by, results) for rank in range(2)]
    (_, first), (_, second) = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert first == second
    assert all(len(values) == 1 for values in first)


def test_what_is_left_of_another_run_is_no_hindrance_in_a_cache_one_may_only_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = random_groups(4)
    store, _ = score(tmp_path, groups)
    todo = Todo([(0, (0,))], look_up(groups, store).dataset)
    Unfinished.of(store, todo, f"500 {policy().layout}").begin(todo.parts)
    assert list(tmp_path.glob("*/unfinished-*"))

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    reading = policy()
    assert (
        score_reference(groups, Counting(reading), reading, LogpStore(tmp_path, IDENTITY), token_budget=500)
        == 0
    )


@pytest.mark.slow
def test_two_processes_share_the_work_and_see_all_of_it(tmp_path: Path) -> None:
    results = CONTEXT.Queue()
    workers = [fork(_score_as, rank, tmp_path, results) for rank in range(2)]
    (_, first, seen), (_, second, also_seen) = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    assert first == [2, 2, 2]
    assert second == [2, 2, 0], "both must run as many passes; the last is empty"
    alone, _ = score(tmp_path / "alone", random_groups(5))
    assert seen == also_seen == records(alone, random_groups(5))
