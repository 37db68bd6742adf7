"""What a cache holds, reference by reference, wherever it is: to list, to check, to make room.

Imports no torch.
"""

import json
import shutil
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from fiducial.reference.cache.filesystems import explained, open_location
from fiducial.reference.cache.names import ShardName, checksum
from fiducial.reference.cache.places import MANIFEST, MIRRORS, default_cache, is_identity, shown
from fiducial.reference.identity import digest_of

_LEFTOVER_SECONDS = 24 * 3600
"""A file still being written, or still to be sent, is younger than that."""
_REMOVED = ".removed"
"""Ends the name of a reference's folder that is being deleted."""


@dataclass(frozen=True, slots=True)
class CachedReference:
    """The records of one reference."""

    folder: str
    """Below the cache's address."""
    identity: str
    manifest: dict[str, Any]
    """Empty where it is missing or damaged."""
    records: int
    files: int
    bytes: int
    last_used: float
    """Seconds since 1970: when it was last opened or written to."""

    @property
    def checkpoint(self) -> str:
        """Where the reference was loaded from."""
        return str(self.manifest.get("checkpoint", "unknown"))

    @property
    def is_mirror(self) -> bool:
        """Whether it is of a cache at a URL: it serves the runs that name that alone."""
        return self.folder != self.identity


@dataclass(frozen=True, slots=True)
class Damage:
    """A file that is not what it should be."""

    path: str
    why: str
    records: int


class Inventory:
    """One cache, at a folder or a URL."""

    def __init__(self, location: str | None) -> None:
        """Open the cache at `location`, the user's own by default.

        Raises:
            CacheError: It cannot be opened.
        """
        local = str(default_cache()) if location is None else location
        self.shown = shown(local)
        self._fs, self._root = open_location(local)

    def references(self) -> list[CachedReference]:
        """Every reference with records, the last used first."""
        with explained(self.shown, "read"):
            return self._below("")

    def all_held(self) -> list[CachedReference]:
        """All that takes room here: the references, and then what caches at URLs hold, mirrored."""
        with explained(self.shown, "read"):
            return [each for folder in self._with_mirrors() for each in self._below(folder)]

    def verify(self, reference: CachedReference) -> list[Damage]:
        """Read every file of a reference and compare it with what its name and manifest say."""
        damages = []
        with explained(self.shown, "read"):
            for entry in self._list(reference.folder):
                name = ShardName.parse(_last(entry["name"]))
                path = f"{self._root}/{reference.folder}/{_last(entry['name'])}"
                if name is not None and (why := _damage(self._fs.cat_file(path), name, reference.identity)):
                    damages.append(Damage(path, why, name.records))
            path = f"{self._root}/{reference.folder}/{MANIFEST}"
            if not reference.manifest:
                damages.append(Damage(path, "it is missing or cannot be read", 0))
            elif digest_of(reference.manifest) != reference.identity:
                damages.append(Damage(path, "it is of another reference", 0))
        return damages

    def remove(self, reference: CachedReference) -> None:
        """Delete a reference's records. A run that uses them keeps what it has open, and scores the rest."""
        folder = f"{self._root}/{reference.folder}"
        with explained(self.shown, "written"):
            if isinstance(self._fs, LocalFileSystem):
                _remove_at_once(Path(folder))
            else:
                self._fs.rm(folder, recursive=True)

    def finish_removals(self) -> int:
        """Delete what a `remove` that was killed has left; says of how many references that was."""
        with explained(self.shown, "written"):
            left = [
                f"{self._root}/{folder}/{name}"
                for folder in self._with_mirrors()
                for name in self._folders(folder)
                if name.endswith(_REMOVED)
            ]
            for path in left:
                self._fs.rm(path, recursive=True)
        return len(left)

    def sweep(self, reference: CachedReference) -> int:
        """Delete what was set aside or never finished; says how many files that were."""
        swept = 0
        with explained(self.shown, "written"):
            for entry in self._list(reference.folder):
                name = _last(entry["name"])
                old = time.time() - modified(self._fs, entry) > _LEFTOVER_SECONDS
                aside = name.endswith(".damaged")
                if aside or (old and (name.endswith(".part") or name.startswith("unfinished-"))):
                    self._fs.rm_file(f"{self._root}/{reference.folder}/{name}")
                    swept += 1
        return swept

    def _with_mirrors(self) -> list[str]:
        """Folders that hold references: the cache's own, and the mirrors in it."""
        return ["", *(f"{MIRRORS}/{name}" for name in self._folders(MIRRORS))]

    def _below(self, folder: str) -> list[CachedReference]:
        names = filter(is_identity, self._folders(folder))
        found = [self._describe(f"{folder}/{name}".lstrip("/")) for name in names]
        return sorted(found, key=lambda each: each.last_used, reverse=True)

    def _folders(self, folder: str) -> list[str]:
        """Names of the folders in one; a link may lead to a folder, and is told as neither."""
        return [_last(entry["name"]) for entry in self._list(folder) if entry["type"] != "file"]

    def _describe(self, folder: str) -> CachedReference:
        entries = self._list(folder)
        names = [name for entry in entries if (name := ShardName.parse(_last(entry["name"])))]
        try:
            manifest = json.loads(self._fs.cat_file(f"{self._root}/{folder}/{MANIFEST}"))
        except (FileNotFoundError, ValueError):
            manifest = {}
        return CachedReference(
            folder,
            _last(folder),
            manifest if isinstance(manifest, dict) else {},
            sum(name.records for name in names),
            len(names),
            sum(int(entry["size"] or 0) for entry in entries),
            max((modified(self._fs, entry) for entry in entries), default=0.0),
        )

    def _list(self, folder: str) -> list[dict[str, Any]]:
        path = f"{self._root}/{folder}".rstrip("/")
        self._fs.invalidate_cache()
        try:
            found: list[dict[str, Any]] = self._fs.ls(path, detail=True)
        except FileNotFoundError:  # of the folder, or of a file that has gone since the listing began
            return self._list(folder) if self._fs.exists(path) else []
        return found


def _remove_at_once(folder: Path) -> None:
    """Delete a folder that a run may write to meanwhile: it finds none, and makes a whole one anew."""
    if folder.is_symlink():
        there = folder.resolve()
        folder.unlink()
        if there.exists():
            shutil.rmtree(there)
        return
    aside = folder.with_name(f"{folder.name}{_REMOVED}")
    if aside.exists():  # of a command that was killed
        shutil.rmtree(aside)
    try:
        folder.rename(aside)
    except FileNotFoundError:  # somebody else has removed it
        return
    shutil.rmtree(aside)


def too_old(references: list[CachedReference], seconds: float) -> list[CachedReference]:
    """Those that nobody has used for so long."""
    return [each for each in references if time.time() - each.last_used > seconds]


def too_many(references: list[CachedReference], size: int) -> list[CachedReference]:
    """The least recently used ones, without which the others take no more than `size` bytes."""
    removed, total = [], sum(each.bytes for each in references)
    for each in sorted(references, key=lambda each: each.last_used):
        if total <= size:
            break
        removed.append(each)
        total -= each.bytes
    return removed


def _damage(content: bytes, name: ShardName, identity: str) -> str | None:
    """What is wrong with a file of records in the folder of the reference `identity`."""
    if checksum(content) != name.checksum:
        return "its content has changed since it was written"
    metadata = pa.ipc.open_file(content).schema.metadata or {}
    found = metadata.get(b"identity", b"unknown").decode()
    return None if found == identity else f"its records are of another reference, {found}"


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def modified(filesystem: AbstractFileSystem, entry: dict[str, Any]) -> float:
    """When a file was last changed, in seconds since 1970; now where the file system does not tell."""
    for name in ("mtime", "modified", "LastModified", "last_modified", "modify", "created"):
        value = entry.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str) and value[:14].isdigit():  # FTP's way
            return datetime.strptime(value[:14], "%Y%m%d%H%M%S").replace(tzinfo=UTC).timestamp()
    return time.time()
