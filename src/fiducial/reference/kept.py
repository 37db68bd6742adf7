"""A live reference whose answers are kept: a completion is scored the first time it is asked for.

Streamed rows cannot be scored ahead, so they are scored as they come, in the pass the policy makes, and
written to the cache; later epochs, runs and resumed runs read them. A pass scores what has no record, and
nothing where all have one. Records come from the same passes when a run is resumed, so it stays exact.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError
from fiducial.logps import TokenLogps
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.home import Tell
from fiducial.reference.cache.processes import any_process
from fiducial.reference.cache.scoring import FLUSH_SECONDS, put_logps
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
        wanted = [lacking for group in batch.groups if (lacking := self.store.missing(group)) is not None]
        # A sharded model needs every process in each of its passes, with an empty batch if need be.
        if any_process(bool(wanted), batch.target.device):
            self._score(wanted, batch)
        answer = Precomputed(self.store).token_logps(batch)
        if time.monotonic() - self._written > self._flush_seconds:
            self.write()
        return answer

    def write(self) -> None:
        """Write what is new, and read what others have written.

        A cache that cannot be written costs later runs the records, and not this one its training.
        """
        if self._writable:
            try:
                self.store.flush()
                self.store.reload()
            except CacheError as error:
                self._writable = False
                self._tell(f"{error} The run goes on and keeps no more of them.")
        if not self._writable:
            self.store.forget_unwritten()
        self._written = time.monotonic()

    def _score(self, wanted: list[TokenizedGroup], batch: PackedBatch) -> None:
        whole = sum(len(group.completions) for group in wanted) == batch.num_sequences
        asked = batch if whole else self.policy.pack(wanted).to(batch.target.device)
        logps = self.live.token_logps(asked)
        assert logps is not None, "there is no reference to keep"
        self.scored += put_logps(wanted, logps, self.store, self.policy)


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
