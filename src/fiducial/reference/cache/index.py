"""From a completion's key to where its records are: sorted arrays, some forty bytes a record.

Files come one by one while a run scores. Sorting everything anew for each would take longer and longer, so
there are several sorted runs, each at least twice as long as the next: a record is sorted again only when its
run is merged into a longer one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from fiducial.reference.cache.shards import Keys

_Words = npt.NDArray[np.uint64]
_Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Records of some files, sorted by key; equal keys in the order they came."""

    high: _Words
    low: _Words
    shards: _Positions
    rows: _Positions

    @classmethod
    def sort(cls, high: _Words, low: _Words, shards: _Positions, rows: _Positions) -> Self:
        order = np.lexsort((low, high))  # stable
        return cls(high[order], low[order], shards[order], rows[order])

    @classmethod
    def of(cls, files: list[tuple[int, Keys]]) -> Self:
        words = np.concatenate([keys for _, keys in files]).view(">u8").astype(np.uint64)
        sizes = [len(keys) for _, keys in files]
        shards = np.repeat(np.array([shard for shard, _ in files], np.int64), sizes)
        rows = np.concatenate([np.arange(size) for size in sizes])
        return cls.sort(words[:, 0], words[:, 1], shards, rows.astype(np.int64))

    def then(self, later: "_Run") -> "_Run":
        """This run's records and those of a later one."""
        return _Run.sort(
            np.concatenate([self.high, later.high]),
            np.concatenate([self.low, later.low]),
            np.concatenate([self.shards, later.shards]),
            np.concatenate([self.rows, later.rows]),
        )

    def __len__(self) -> int:
        return len(self.high)

    def find(self, high: np.uint64, low: np.uint64) -> Iterator[tuple[int, int]]:
        at = int(np.searchsorted(self.high, high))
        while at < len(self) and self.high[at] == high:
            if self.low[at] == low:
                yield int(self.shards[at]), int(self.rows[at])
            at += 1


class KeyIndex:
    """Finds (file, row) by 16-byte keys, of which several may be equal; the earliest added comes first."""

    def __init__(self) -> None:
        self._files: list[tuple[int, Keys]] = []
        self._in_runs = 0
        self._runs: list[_Run] = []

    def add(self, keys: Keys, shard: int) -> None:
        """Row i of the file numbered `shard` has the key `keys[i]`."""
        self._files.append((shard, keys))

    def remove(self, shard: int) -> None:
        """Forget a file."""
        self._files = [each for each in self._files if each[0] != shard]
        self._runs, self._in_runs = [], 0

    def find(self, key: bytes) -> Iterator[tuple[int, int]]:
        """(file, row) of every record with this key."""
        high, low = np.frombuffer(key, ">u8").astype(np.uint64)
        for run in self._sorted():
            yield from run.find(high, low)

    def __len__(self) -> int:
        """Different keys."""
        runs = self._sorted()
        while len(runs) > 1:
            later = runs.pop()
            runs[-1] = runs[-1].then(later)
        if not runs or not len(runs[0]):
            return 0
        return int(np.count_nonzero((np.diff(runs[0].high) != 0) | (np.diff(runs[0].low) != 0))) + 1

    def _sorted(self) -> list[_Run]:
        if self._in_runs < len(self._files):
            last = _Run.of(self._files[self._in_runs :])
            while self._runs and len(self._runs[-1]) < 2 * len(last):
                last = self._runs.pop().then(last)
            self._runs.append(last)
            self._in_runs = len(self._files)
        return self._runs
