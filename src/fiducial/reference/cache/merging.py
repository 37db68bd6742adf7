"""Many small files of records made into few: each flush of a scoring pass leaves one, and months leave many.

Records are copied, never changed, and none is lost to a run that reads or writes meanwhile: a merged file is
whole before the files it replaces are deleted; a reader keeps what it has open, and looks again if a file was
gone that it had seen. Of equal keys the record that was read before is kept, so results do not change.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from fiducial.reference.cache.filesystems import explained, open_location, put_whole
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.inventory import CachedReference, modified
from fiducial.reference.cache.names import ShardName
from fiducial.reference.cache.places import default_cache, is_remote, shown
from fiducial.reference.cache.shards import DamagedShardError, Record, Shard, encode_shard

SMALL_BYTES = 16 * 2**20
"""A file below this is merged with others."""
FULL_BYTES = 64 * 2**20
"""A merged file is closed when its records take this."""
_OVERHEAD = 64
"""Bytes of a record beside its tokens and log-probs."""


def merge(location: str | None, reference: CachedReference) -> tuple[int, int]:
    """Rewrite a reference's small files; returns how many there were, and how many took their place.

    Raises:
        CacheError: The cache cannot be read or written. Nothing is lost.
    """
    place = str(default_cache()) if location is None else location
    with explained(shown(place), "merged"):
        return _Merge(place, reference.identity).run()


class _Merge:
    """The files of one reference while they are merged."""

    def __init__(self, location: str, identity: str) -> None:
        self._fs, root = open_location(location)
        self._folder = f"{root.rstrip('/')}/{identity}"
        self._identity = identity
        self._local = None if is_remote(location) else RecordFolder(Path(self._folder))

    def run(self) -> tuple[int, int]:
        entries = self._entries()
        small = [name for name, entry in entries.items() if int(entry["size"]) < SMALL_BYTES]
        if len(small) < 2:
            return 0, 0
        last_change = max(modified(self._fs, entries[name]) for name in small)
        opened: list[str] = []
        made = [self._write(part, last_change) for part in self._parts(list(entries), set(small), opened)]
        for name in opened:
            self._delete(name)
        return len(opened), len(made)

    def _entries(self) -> dict[str, dict[str, Any]]:
        """What is told of each file of records, oldest first."""
        self._fs.invalidate_cache()
        try:
            listed = self._fs.ls(self._folder, detail=True)
        except FileNotFoundError:  # of a file that has gone since the listing began, or of the folder
            return self._entries() if self._fs.exists(self._folder) else {}
        entries = {entry["name"].rpartition("/")[2]: entry for entry in listed}
        names = sorted(name for each in entries if (name := ShardName.parse(each)))
        return {str(name): entries[str(name)] for name in names}

    def _parts(self, names: list[str], small: set[str], opened: list[str]) -> Iterator[list[Record]]:
        """Records of the small files that a reader of all files would use, in parts that fill a file."""
        part: list[Record] = []
        held, seen = 0, set[bytes]()
        for name in names:
            shard = self._open(name)
            if shard is None:
                continue
            if name in small:
                opened.append(name)
            for record in _records(shard):
                if record.key in seen:
                    continue
                seen.add(record.key)
                if name not in small:
                    continue
                part.append(record)
                held += record.values.nbytes + record.tokens.nbytes + _OVERHEAD
            if held >= FULL_BYTES:
                yield part
                part, held = [], 0
        if part:
            yield part

    def _open(self, name: str) -> Shard | None:
        """None where the file is gone, merged by another process, or damaged, which a run will find."""
        try:
            content = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        try:
            return Shard.decode(pa.py_buffer(content), Path(name), self._identity)
        except (DamagedShardError, pa.ArrowException, OSError):  # OSError: Arrow's word for such content
            return None

    def _write(self, records: list[Record], last_change: float) -> str:
        content = memoryview(encode_shard(records, self._identity))
        name = str(ShardName.of(content, len(records)))
        if self._local is None:
            put_whole(self._fs, self._path(name), bytes(content))
            return name
        self._local.write(name, content)
        with suppress(FileNotFoundError):  # another process has merged it by now
            os.utime(self._path(name), (last_change, last_change))  # merging is no use of the records
        return name

    def _delete(self, name: str) -> None:
        try:
            self._fs.rm_file(self._path(name))
        except FileNotFoundError:  # another process has merged it too
            return

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def _records(shard: Shard) -> Iterator[Record]:
    """The intact ones; of those put without tokens nothing but the key is known."""
    for row in range(len(shard)):
        values, tokens = shard.values(row), shard.tokens(row)
        key, prompt = shard.keys[row].tobytes(), shard.prompts[row].tobytes()
        if values is not None:
            yield Record(key, values, prompt) if tokens is None else Record(key, values, prompt, tokens)
