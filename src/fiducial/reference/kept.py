"""A live reference whose answers are kept: a completion is scored the first time it is asked for.

Streamed rows cannot be scored ahead, so they are scored as they come, in the pass the policy makes, and
written to the cache; later epochs, runs and resumed runs read them. A pass scores what has no record, and
nothing where all have one. Records come from the same passes when a run is resumed, so it stays exact.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError
from fiducial.logps import TokenLogps
from fiducial.model.scoring import Scorer
from fiducial.processes import any_process
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.home import Tell
from fiducial.reference.cache.scoring import FLUSH_SECONDS, put_logps
from fiducial.reference.one_pass import Answer, BesidePolicy
from fiducial.reference.sources import Precomputed, Reference


class Kept:
    """Asks `live` for what `store` has no record of, and keeps the answers."""

    def __init__(
        self,
        live: Reference,
        policy: Scorer,
        store: LogpStore,
        *,
        tell: Tell,
        flush_seconds: float | None = None,
    ) -> None:
        """`policy` lays out what is asked of `live`; `tell` is given a sentence if nothing can be written."""
        self.live = live
        self.policy = policy
        self.store = store
        self.scored = 0
        """Completions that had no record."""
        self._tell = tell
        self._flush_seconds = flush_seconds or FLUSH_SECONDS
        self._written = time.monotonic()
        self._writable = True

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """The log-probs of the batch's completions, as they were first scored.

        Raises:
            TrainingError: A log-prob is not finite.
        """
        wanted = self._wanted(batch)
        # A sharded model needs every process in each of its passes, with an empty batch if need be.
        if any_process(bool(wanted), batch.target.device):
            self._score(wanted, batch)
        return self._read(batch)

    @contextmanager
    def beside_policy(self, batch: PackedBatch) -> Iterator[Answer]:
        """Inside, the policy scores `batch`, which `live` may look at where every process must score all.

        Raises:
            TrainingError: A log-prob is not finite.
        """
        wanted = self._wanted(batch)
        if not any_process(bool(wanted), batch.target.device):
            logps = self._read(batch)
            yield lambda: logps
        elif isinstance(self.live, BesidePolicy) and self._all_wanted_everywhere(wanted, batch):
            with self.live.beside_policy(batch) as answer:
                yield lambda: self._kept(wanted, answer(), batch)
        else:
            self._score(wanted, batch)
            logps = self._read(batch)
            yield lambda: logps

    def write(self) -> None:
        """Write what is new, and read what others have written.

        A cache that cannot be written costs later runs the records, and not this one its training.
        """
        self._or_keep_no_more(self.store.flush, self.store.reload)
        self._written = time.monotonic()

    def flush(self) -> None:
        """Write what is new, as `write` does, and look at nothing else: what is read stays as it is."""
        self._or_keep_no_more(self.store.flush)

    def _or_keep_no_more(self, *ways: Callable[[], object]) -> None:
        if self._writable:
            try:
                for way in ways:
                    way()
            except CacheError as error:
                self._writable = False
                self._tell(f"{error} The run goes on and keeps no more of them.")
        if not self._writable:
            self.store.forget_unwritten()

    def _wanted(self, batch: PackedBatch) -> list[TokenizedGroup]:
        return [lacking for group in batch.groups if (lacking := self.store.missing(group)) is not None]

    def _all_wanted_everywhere(self, wanted: list[TokenizedGroup], batch: PackedBatch) -> bool:
        # Where weights are sharded, every process must gather them for the same passes.
        return not any_process(not _is_all(wanted, batch), batch.target.device)

    def _score(self, wanted: list[TokenizedGroup], batch: PackedBatch) -> None:
        asked = batch if _is_all(wanted, batch) else self.policy.pack(wanted).to(batch.target.device)
        self._keep(wanted, self.live.token_logps(asked))

    def _keep(self, wanted: list[TokenizedGroup], logps: TokenLogps | None) -> None:
        assert logps is not None, "there is no reference to keep"
        self.scored += put_logps(wanted, logps, self.store, self.policy)

    def _kept(self, wanted: list[TokenizedGroup], logps: TokenLogps | None, batch: PackedBatch) -> TokenLogps:
        self._keep(wanted, logps)
        return self._read(batch)

    def _read(self, batch: PackedBatch) -> TokenLogps:
        answer = Precomputed(self.store).token_logps(batch)
        if time.monotonic() - self._written > self._flush_seconds:
            self.write()
        return answer


def _is_all(wanted: list[TokenizedGroup], batch: PackedBatch) -> bool:
    return sum(len(group.completions) for group in wanted) == batch.num_sequences


@contextmanager
def written_at_the_end(reference: Reference) -> Iterator[None]:
    """However the block ends, what `reference` keeps is written then."""
    try:
        yield
    finally:
        if isinstance(reference, Kept):
            reference.write()


def measured(reference: Reference) -> Reference:
    """The reference itself, where its answers are kept: records cannot show that it has moved."""
    return reference.live if isinstance(reference, Kept) else reference
