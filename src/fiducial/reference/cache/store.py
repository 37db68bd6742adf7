"""Per-token reference log-probs of completions, found by content, under one reference.

Records that are not yet written are held in memory; all others stay on disk and are read one by one. What is
damaged is not there: it is told, and scored again.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fiducial.data.tokenize import TokenIds, TokenizedGroup
from fiducial.errors import CacheError
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.home import Home, Tell
from fiducial.reference.cache.index import KeyIndex
from fiducial.reference.cache.names import ShardName
from fiducial.reference.cache.remote import UNSENT, RemoteFolder
from fiducial.reference.cache.shards import (
    DamagedShardError,
    Logps,
    Record,
    Shard,
    encode_shard,
    prompt_digest,
)
from fiducial.reference.identity import Identity

_logger = logging.getLogger("fiducial")


class LogpStore:
    """The records of one reference in a cache."""

    def __init__(
        self,
        folder: Path | str,
        identity: Identity,
        *,
        own: Path | str | None = None,
        url: str | None = None,
        tell: Tell = _logger.warning,
    ) -> None:
        """Open what `folder` holds of the reference `identity`, among others' records.

        `own` is written to where `folder` may only be read; `url` is a cache elsewhere that `folder` mirrors.
        `tell` is given a sentence for whatever is found wrong and mended.

        Raises:
            CacheError: There is nowhere to write, or the cache elsewhere does not answer.
        """
        self.folder = Path(folder) / identity.digest
        """Where this reference's records are; `folder` may hold other references' beside them."""
        self.identity = identity
        self._tell = tell
        self._told: set[str] = set()
        own_folder = None if own is None else RecordFolder(Path(own) / identity.digest)
        self._home = Home(RecordFolder(self.folder), own_folder, identity, tell)
        self._remote = None if url is None else RemoteFolder(url, identity.digest)
        self._shards: list[Shard] = []
        self._seen: set[Path] = set()
        self._by_key = KeyIndex()
        self._by_prompt = KeyIndex()
        self._pending: dict[str, Record] = {}
        self._shortened: dict[str, tuple[str, int]] = {}
        if self._remote is not None:
            self._pull(self._remote)
        self._read_folders()

    def __len__(self) -> int:
        return len(self._by_key) + len(self._pending)

    @property
    def home(self) -> Path:
        """Where new records are written."""
        return self._home.folder.path

    @property
    def is_mirror(self) -> bool:
        """Whether the records lie elsewhere, and machines that mirror them need no common folder."""
        return self._remote is not None

    def get(self, key: str) -> Logps | None:
        """The log-probs of the completion `key`, or None."""
        if key in self._pending:
            return self._pending[key].values
        found = self._written(key)
        return None if found is None else found[1]

    def put(self, key: str, values: Logps, group: TokenizedGroup | None = None) -> None:
        """Keep a completion's log-probs; `flush` writes them.

        With the group it belongs to, a run that cuts the completion shorter finds it too.
        """
        assert values.dtype == np.float32
        assert values.ndim == 1
        if self.get(key) is not None:
            return
        record = Record(bytes.fromhex(key), values)
        if group is not None:
            tokens = group.completions[group.keys.index(key)]
            record = Record(record.key, values, prompt_digest(group.prompt), tokens)
        self._pending[key] = record

    def missing(self, group: TokenizedGroup) -> TokenizedGroup | None:
        """The group with only the completions that have no record, or None if all have one."""
        completions = tuple(
            completion
            for key, completion in zip(group.keys, group.completions, strict=True)
            if self.get(key) is None and not self._find_longer(key, group.prompt, completion)
        )
        return TokenizedGroup(group.prompt, completions) if completions else None

    def knows_prompt(self, prompt: TokenIds) -> bool:
        """Whether there is a written record of any completion after this prompt."""
        return next(self._by_prompt.find(prompt_digest(prompt)), None) is not None

    def origin(self, key: str) -> Path | None:
        """The file that holds the completion's record; None if there is none, or it is not written yet."""
        found = self._written(key)
        return None if found is None else found[0].path

    def distrust(self, path: Path) -> None:
        """Use no record of a file again, and set it aside so that no other run does."""
        for number, shard in enumerate(self._shards):
            if shard.path == path:
                self._by_key.remove(number)
                self._by_prompt.remove(number)
        self._set_aside(path)

    def flush(self) -> None:
        """Write what is new to a file of its own, whole or not at all.

        Raises:
            CacheError: It cannot be written. What was written before is kept.
        """
        if not self._pending:
            return
        content = encode_shard(list(self._pending.values()), self.identity.digest)
        name = str(ShardName.of(memoryview(content), len(self._pending)))
        if self._remote is not None:  # so that a later run sends it if this one cannot
            self._home.write(f"{name}{UNSENT}", b"")
        self._home.write(name, memoryview(content))
        path = self.home / name
        self._seen.add(path)
        try:
            self._add(Shard.open(path, self.identity.digest))
        except FileNotFoundError:  # somebody removes the folder while we write; memory has it all
            self._add(Shard.decode(content, path, self.identity.digest))
        self._pending.clear()
        self._without_stopping(lambda remote: remote.push(self._home.folder, name))

    def forget_unwritten(self) -> None:
        """Drop what `flush` has not written: it is scored again where it is asked for."""
        self._pending.clear()

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file beside the records, wherever this run may write.

        Raises:
            CacheError: It cannot be written.
        """
        self._home.write(name, content)

    def holds(self, name: str) -> bool:
        """Whether a file lies beside the records, wherever this run may read."""
        return any((folder.path / name).exists() for folder in self._home.folders)

    def remove(self, name: str) -> None:
        """Delete a file that `write` has written, if it is still there."""
        for folder in self._home.folders:
            (folder.path / name).unlink(missing_ok=True)

    def reload(self) -> bool:
        """Read what other processes have written since; says whether there was anything.

        Raises:
            CacheError: The folder cannot be read.
        """
        self._without_stopping(self._pull)
        before = len(self._shards)
        self._read_folders()
        return len(self._shards) > before

    def _pull(self, remote: RemoteFolder) -> None:
        remote.pull(self._home.shared)
        for file in remote.passed_over:
            self._tell_once(
                f"{file} does not hold what its name says: it is damaged, or still being written. It is "
                "not used; its completions are scored again."
            )

    def _read_folders(self) -> None:
        for folder in self._home.folders:
            # What has gone since it was listed may have been merged into a file that the list lacks.
            while self._read(folder):
                pass

    def _read(self, folder: RecordFolder) -> bool:
        """Open the files of a folder that are new; says whether one of them was gone by then."""
        try:
            names = folder.names()
        except OSError as error:
            raise CacheError(f"reference log-probs cannot be read from {folder.path}: {error}.") from error
        new = [path for name in names if (path := folder.path / name) not in self._seen]
        return not all([self._open(path) for path in new])

    def _open(self, path: Path) -> bool:
        """Take a file in, or say why not; False where it is gone."""
        self._seen.add(path)
        try:
            shard = Shard.open(path, self.identity.digest)
        except FileNotFoundError:
            return False
        except OSError as error:
            self._tell(f"{path} cannot be read: {error.strerror}. Its completions are scored again.")
            return True
        except DamagedShardError as error:
            self._tell(f"{path} is damaged: {error}. It is set aside; its completions are scored again.")
            self._set_aside(path)
            return True
        self._add(shard)
        return True

    def _add(self, shard: Shard) -> None:
        self._by_key.add(shard.keys, len(self._shards))
        self._by_prompt.add(shard.prompts, len(self._shards))
        self._shards.append(shard)

    def _written(self, key: str) -> tuple[Shard, Logps] | None:
        """A completion's own record, or else the beginning of a longer one's."""
        own = self._intact(key)
        if own is not None or key not in self._shortened:
            return own
        longer, length = self._shortened[key]
        found = self._intact(longer)
        return None if found is None else (found[0], found[1][:length])

    def _intact(self, key: str) -> tuple[Shard, Logps] | None:
        """The first record of a completion that is, to the bit, what was written."""
        damaged: Path | None = None
        for number, row in self._by_key.find(bytes.fromhex(key)):
            shard = self._shards[number]
            values = shard.values(row)
            if values is not None:
                return shard, values
            damaged = shard.path
        if damaged is not None:
            self._tell_once(f"{damaged} is damaged: records of it are not used, and scored again.")
        return None

    def _find_longer(self, key: str, prompt: TokenIds, completion: TokenIds) -> bool:
        """Look for a record of a completion that begins with this one after the same prompt.

        A token's log-prob depends on nothing after it, so the beginning of that record is this one's.
        """
        length = len(completion)
        for number, row in self._by_prompt.find(prompt_digest(prompt)):
            tokens = self._shards[number].tokens(row)
            if tokens is None or not np.array_equal(tokens[:length], completion):
                continue
            longer = self._shards[number].keys[row].tobytes().hex()
            if self._intact(longer) is not None:
                self._shortened[key] = (longer, length)
                return True
        return False

    def _set_aside(self, path: Path) -> None:
        RecordFolder(path.parent).set_aside(path.name)
        if path.parent == self.folder:
            self._without_stopping(lambda remote: remote.remove(path.name))

    def _without_stopping(self, send: Callable[[RemoteFolder], None]) -> None:
        """A cache elsewhere that stops answering costs the others this run's records, and not this run."""
        if self._remote is None:
            return
        try:
            send(self._remote)
        except CacheError as error:
            self._tell_once(f"{error} The run goes on; a later one sends what is kept in {self.folder}.")

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._tell(sentence)
