"""The pass that fills a store: everything that has no record, scored once, by all processes together."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from fiducial.agreement import all_or_none
from fiducial.data.batch import PackedBatch
from fiducial.data.micro_batches import COSTS
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError
from fiducial.logps import TokenLogps
from fiducial.model.scoring import Scorer
from fiducial.processes import barrier, from_first, in_all, num_processes, rank
from fiducial.reference.cache.one_folder import require_one_folder
from fiducial.reference.cache.passes import (
    Groups,
    Pass,
    Unfinished,
    cut_passes,
    look_up,
    require_all,
    take,
)
from fiducial.reference.cache.shards import Logps
from fiducial.reference.cache.store import LogpStore

FLUSH_SECONDS = 10.0

Progress = Callable[[int, int], None]


@runtime_checkable
class ScoringReference(Protocol):
    """What is asked for log-probs: a `Reference` of `sources`, which imports this package."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs aligned with `batch.target`."""
        ...


def score_reference(
    groups: Groups,
    reference: ScoringReference,
    scorer: Scorer,
    store: LogpStore,
    *,
    token_budget: int,
    progress: Progress | None = None,
    flush_every: float = FLUSH_SECONDS,
) -> int:
    """Score every completion the store has no record of, and return how many that were in all processes.

    Each process scores a share (all run equally many forward passes, which sharded models need) and
    afterwards sees every record. `progress(done, total)` counts groups. Written every `flush_every` seconds
    and on the way out, so a process killed at any moment loses no more than that.

    Raises:
        CacheError: Records cannot be written or read, or not by all processes in one folder.
        TrainingError: A log-prob is not finite.
    """
    barrier()
    store.reload()
    barrier()  # nobody writes before all have read
    passes, unfinished = _plan(groups, scorer, store, token_budget, flush_every)
    if passes:
        require_one_folder(store)
    worker = _Worker(groups, reference, scorer, store, unfinished, flush_every)
    try:
        worker.run(passes, progress)
    except BaseException:
        store.flush()  # what was scored before is not lost
        raise
    with all_or_none():
        store.flush()
    barrier()
    store.reload()
    if passes or num_processes() > 1:
        with all_or_none():
            require_all(groups, store)
    if rank() == 0 and unfinished is not None:
        unfinished.end()
    return in_all(worker.scored)


def _plan(
    groups: Groups, scorer: Scorer, store: LogpStore, budget: int, flush_every: float
) -> tuple[list[Pass], Unfinished | None]:
    def decide() -> tuple[list[Pass], str | None]:
        todo = look_up(groups, store)
        unfinished = Unfinished.of(store, todo, f"{budget} {scorer.layout}")
        begun = unfinished.resume(todo)
        # A run that has ended since the records were read took its memory along, and left its records.
        while todo.parts and begun is None and store.reload():
            todo = look_up(groups, store)
            begun = unfinished.resume(todo)
        if not todo.parts:
            unfinished.end()
            return [], None
        passes = cut_passes(begun or todo.parts, groups, budget, COSTS[scorer.layout])
        if begun is None:
            unfinished.begin(todo.parts)
        elif unfinished.touched(within_seconds=max(3 * flush_every, 30)):
            passes.reverse()  # another run may be at it: meet it half-way
        return passes, unfinished.name

    passes, name = from_first(decide)
    return passes, None if name is None else Unfinished(store, name)


class _Worker:
    """This process's share of the passes."""

    def __init__(
        self,
        groups: Groups,
        reference: ScoringReference,
        scorer: Scorer,
        store: LogpStore,
        unfinished: Unfinished | None,
        flush_every: float,
    ) -> None:
        self.scored = 0
        self._groups = groups
        self._reference = reference
        self._scorer = scorer
        self._store = store
        self._unfinished = unfinished
        self._flush_every = flush_every

    def run(self, passes: list[Pass], progress: Progress | None) -> None:
        together = num_processes()
        done, total, written = 0, sum(map(len, passes)), time.monotonic()
        for start in range(0, len(passes), together):
            mine = start + rank()
            with all_or_none():  # the others would wait for this process at the end
                self._score(passes[mine] if mine < len(passes) else [])
                if time.monotonic() - written > self._flush_every:
                    self._store.flush()
                    self._see_others()
                    written = time.monotonic()
            done += sum(map(len, passes[start : start + together]))
            if progress is not None:
                progress(done, total)

    def _see_others(self) -> None:
        """Another run may fill the same cache: what it has scored is not scored again."""
        self._store.reload()
        if self._unfinished is not None:
            self._unfinished.touch()

    def _score(self, parts: Pass) -> None:
        wanted = [
            lacking
            for part in parts
            if (lacking := self._store.missing(take(self._groups, part))) is not None
        ]
        if not wanted and num_processes() == 1:
            return  # several processes run equally many passes, empty ones too
        batch = self._scorer.pack(wanted)
        logps = self._reference.token_logps(batch)
        assert logps is not None, "there is no reference to score"
        self.scored += put_logps(wanted, logps, self._store, self._scorer)


def put_logps(groups: Sequence[TokenizedGroup], logps: TokenLogps, store: LogpStore, scorer: Scorer) -> int:
    """Keep what one forward pass gave for `groups`; returns how many completions they are.

    Raises:
        TrainingError: A log-prob is not finite. Those before it are kept.
    """
    values: Logps = logps.values.float().cpu().numpy()
    end = 0
    for group in groups:
        for key, completion in zip(group.keys, group.completions, strict=True):
            start, end = end, end + len(completion)
            if not np.isfinite(values[start:end]).all():
                raise TrainingError(
                    f"the reference's log-probs of completion {key} are not finite. Its numbers overflow in "
                    f"{scorer.autocast or scorer.model.dtype}: use bf16 instead of fp16, or check the "
                    "checkpoint."
                )
            store.put(key, values[start:end].copy(), group)
    return sum(len(group.completions) for group in groups)
