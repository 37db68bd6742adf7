"""Records of a reference that moves: of each version, for as long as it stands.

Right after a move, what the steps until the next one will ask is scored, once, in passes as large as the
token budget allows; a row that comes twice before the next move, or is evaluated twice, is not scored again.
Records carry the version by its weights and lie in the run's own folder: those of an older version are
deleted. A resumed run makes the same window of the same passes, so it stays exact with or without them.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fiducial.data.tokenize import TokenizedGroup
from fiducial.processes import from_first, rank
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.cache.home import Tell
from fiducial.reference.cache.places import is_identity
from fiducial.reference.identity import Identity
from fiducial.reference.kept import Kept
from fiducial.reference.moving import Follower, state_digest

Asked = Callable[[int, int], Sequence[TokenizedGroup]]
"""What all processes will ask the reference from one optimizer step up to another, as far as it is known."""


class ReferenceWindow:
    """Keeps `kept` reading the records of the version that stands."""

    def __init__(
        self, kept: Kept, follower: Follower, start: Identity, *, folder: Path, token_budget: int, tell: Tell
    ) -> None:
        """`start` is the identity of the reference before it first moved; `folder` is the run's own."""
        self.kept = kept
        self.follower = follower
        self.scored = 0
        """Completions scored ahead, in all windows."""
        self._start = start
        self._folder = folder
        self._token_budget = token_budget
        self._tell = tell

    def open(self, groups: Sequence[TokenizedGroup]) -> None:
        """The reference has moved, or been put back to where it was: score `groups` under it.

        Raises:
            CacheError: Records cannot be written or read.
            TrainingError: A log-prob is not finite.
        """
        identity = from_first(self._version)
        store = LogpStore(self._folder, identity, tell=self._tell)
        self.kept.store = store
        self.scored += score_reference(
            groups, self.kept.live, self.kept.policy, store, token_budget=self._token_budget
        )
        self._remove(other_than=identity.digest)

    def close(self) -> None:
        """The run is over: nobody reads its records again."""
        self._remove()
        if rank() == 0 and self._folder.exists() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _version(self) -> Identity:
        lines = [self._start.weights, state_digest(self.follower.state())]
        weights = hashlib.blake2b("\n".join(lines).encode(), digest_size=16)
        return replace(self._start, weights=weights.hexdigest(), fingerprint=None)

    def _remove(self, other_than: str = "") -> None:
        if rank() != 0 or not self._folder.exists():
            return
        for path in self._folder.iterdir():
            if is_identity(path.name) and path.name != other_than:
                shutil.rmtree(path, ignore_errors=True)  # what is left is never read, and swept next time
