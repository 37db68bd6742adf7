"""Which completions are scored in which forward pass.

What shares a pass decides the last bits of its log-probs. So passes are cut from what was missing when the
scoring began, and that is kept in a file until all of it is scored: an interrupted run makes the same passes
again, whole or not at all, and ends with the same numbers as one that was never interrupted.
"""

import hashlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from fiducial.data.micro_batches import Cost, Load
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError
from fiducial.reference.cache.folder import READ_ONLY
from fiducial.reference.cache.store import LogpStore


@runtime_checkable
class Groups(Protocol):
    """A dataset of groups."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TokenizedGroup: ...


Part = tuple[int, tuple[int, ...]]
"""Index of a group, and which of its completions are scored."""
Pass = list[Part]


@dataclass(frozen=True, slots=True)
class Todo:
    """What the store lacks of a dataset."""

    parts: list[Part]
    dataset: str
    """Hash of every content key in order: equal for the same groups, whatever file they came from."""


def look_up(groups: Groups, store: LogpStore) -> Todo:
    """Every completion without a record, once."""
    parts: list[Part] = []
    seen: set[str] = set()
    digest = hashlib.blake2b(digest_size=16)
    for index in range(len(groups)):
        group = groups[index]
        digest.update("".join(group.keys).encode())
        lacking = store.missing(group)
        if lacking is None:
            continue
        wanted = set(lacking.keys) - seen
        seen |= wanted
        positions = tuple(number for number, key in enumerate(group.keys) if key in wanted)
        if positions:
            parts.append((index, _once(positions, group)))
    return Todo(parts, digest.hexdigest())


def require_all(groups: Groups, store: LogpStore) -> None:
    """Look every completion up in this process: what serves a shortened one is found by looking.

    Raises:
        CacheError: One has no record. Processes on several machines may keep theirs on different disks.
    """
    if look_up(groups, store).parts:
        raise CacheError(
            f"reference log-probs that another process scored are not in {store.home}. Every machine must "
            "load the same weights and see the same folder: name a shared one as reference.cache."
        )


def cut_passes(parts: Sequence[Part], groups: Groups, budget: int, cost: Cost) -> list[Pass]:
    """Passes of at most `budget`, longest first.

    So too large a budget shows at once, and a pass holds completions of like length.
    """
    taken = [(take(groups, part), part) for part in parts]
    taken.sort(key=lambda item: (item[0].longest, item[1]), reverse=True)
    return list(_cut(taken, budget, cost))


def take(groups: Groups, part: Part) -> TokenizedGroup:
    """The group with only the part's completions."""
    index, positions = part
    group = groups[index]
    return TokenizedGroup(group.prompt, tuple(group.completions[number] for number in positions))


class Unfinished:
    """The file that remembers what was missing when the scoring of a dataset began."""

    def __init__(self, store: LogpStore, name: str) -> None:
        self.name = name
        self._store = store

    @classmethod
    def of(cls, store: LogpStore, todo: Todo, settings: str) -> "Unfinished":
        """The file for one dataset; `settings` is what passes are cut by: another budget makes others."""
        name = hashlib.blake2b(f"{todo.dataset} {settings}".encode(), digest_size=8).hexdigest()
        return cls(store, f"unfinished-{name}.npy")

    @property
    def _path(self) -> Path:
        return self._store.home / self.name  # which may move while the run writes

    def resume(self, todo: Todo) -> list[Part] | None:
        """What was missing when it began, if all that is missing now was missing then."""
        try:
            rows = np.load(self._path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        begun: dict[int, list[int]] = {}
        for index, position in rows.tolist():
            begun.setdefault(index, []).append(position)
        if all(set(positions) <= set(begun.get(index, ())) for index, positions in todo.parts):
            return [(index, tuple(positions)) for index, positions in begun.items()]
        return None

    def begin(self, parts: Sequence[Part]) -> None:
        """Remember `parts`.

        Raises:
            CacheError: Nothing can be written.
        """
        content = io.BytesIO()
        rows = [(index, position) for index, positions in parts for position in positions]
        np.save(content, np.array(rows, np.int32).reshape(-1, 2), allow_pickle=False)
        self._store.write(self.name, content.getbuffer())

    def touched(self, within_seconds: float) -> bool:
        """Whether a process has been at it lately."""
        try:
            return time.time() - self._path.stat().st_mtime < within_seconds
        except OSError:
            return False

    def touch(self) -> None:
        """Say that a process is at it; best effort, for others' convenience."""
        if self._path.exists():
            try:
                self._path.touch()
            except OSError:  # it was removed in between, with the folder or because another run has finished
                return

    def end(self) -> None:
        """Forget: all is scored."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:  # another run's, in a cache one may only read
            if error.errno not in READ_ONLY:
                raise


def _once(positions: tuple[int, ...], group: TokenizedGroup) -> tuple[int, ...]:
    """Positions of different completions: a group may hold the same one twice."""
    first = {group.keys[number]: number for number in reversed(positions)}
    return tuple(sorted(first.values()))


def _cut(taken: Sequence[tuple[TokenizedGroup, Part]], budget: int, cost: Cost) -> Iterator[Pass]:
    current: Pass = []
    load = Load()
    for group, part in taken:
        load = load.add(group)
        if current and cost(load) > budget:
            yield current
            current, load = [], Load().add(group)
        current.append(part)
    if current:
        yield current
