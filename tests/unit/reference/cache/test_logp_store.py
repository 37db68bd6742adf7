"""The store: what is put is found again, by whom it should be, and damage is named and passed over."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import CacheError
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.cache.names import SUFFIX
from fiducial.reference.identity import Fingerprint, Identity
from tiny import random_groups

IDENTITY = Identity("base", "0", "float32", "None")
KEY = "ab" * 16
OTHER = "cd" * 16
GROUPS = random_groups(4)


def open_store(folder: Path, told: list[str] | None = None, **options: object) -> LogpStore:
    return LogpStore(folder, IDENTITY, tell=[].append if told is None else told.append, **options)


def fill(store: LogpStore, groups: list[TokenizedGroup] = GROUPS) -> None:
    """Log-probs that say where they belong."""
    for number, group in enumerate(groups):
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, -np.arange(len(completion), dtype=np.float32) - 100 * number, group)
    store.flush()


def files(store: LogpStore) -> list[Path]:
    return sorted(store.folder.glob(f"*{SUFFIX}"))


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, folder: Path) -> None:
    """Writing below `folder` fails as the operating system would fail it."""
    write = RecordFolder.write

    def failing(self: RecordFolder, name: str, content: bytes) -> None:
        if self.path.is_relative_to(folder):
            raise OSError(code, "refused by the test", str(self.path))
        write(self, name, content)

    monkeypatch.setattr(RecordFolder, "write", failing)


def test_what_is_put_is_there_after_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    values = np.array([-1.5, -0.25], np.float32)
    store.put(KEY, values)
    assert store.get(KEY) is values, "not written yet, and already there"
    store.flush()
    assert store.get(KEY).tolist() == values.tolist()
    again = open_store(tmp_path)
    assert len(again) == 1
    assert again.get(KEY).tolist() == values.tolist()
    again.put(KEY, values + 1)
    assert again.get(KEY).tolist() == values.tolist(), "what was there stays, so that results do not change"
    assert again.get(OTHER) is None


def test_another_reference_finds_nothing(tmp_path: Path) -> None:
    fill(open_store(tmp_path))
    fields = {"checkpoint": "base", "weights": "0", "dtype": "float32", "autocast": "None"}
    for change in (
        *({"weights": "1"}, {"dtype": "bfloat16"}, {"autocast": "bfloat16"}, {"matmul": "tf32"}),
        *({"format": 3}, {"scoring": 2}),
    ):
        assert len(LogpStore(tmp_path, Identity(**(fields | change)))) == 0
    assert len(LogpStore(tmp_path, Identity(**(fields | {"checkpoint": "elsewhere"})))) == 8


def test_a_manifest_of_another_model_is_named_and_set_aside(tmp_path: Path) -> None:
    store, told = open_store(tmp_path), []
    fill(store)
    path = store.folder / "identity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert len(open_store(tmp_path, told)) == 8, "every file of records names its reference itself"
    assert len(told) == 1
    assert "precision: bfloat16 there, float32 here" in told[0]
    assert json.loads(path.read_text())["dtype"] == "float32"
    path.write_text("{")
    open_store(tmp_path, told)
    assert "is damaged" in told[1]


def test_records_of_another_model_are_named_and_never_used(tmp_path: Path) -> None:
    other = LogpStore(tmp_path, Identity("other", "1", "float32", "None"))
    fill(other)
    store, told = open_store(tmp_path), []
    shutil.copy(*files(other), store.folder)
    assert len(open_store(tmp_path, told)) == 0
    assert "of another reference" in told[0]
    assert files(store) == []
    assert len(open_store(tmp_path, told)) == 0
    assert len(told) == 1, "it was set aside"


def test_a_truncated_file_is_named_and_only_it_is_lost(tmp_path: Path) -> None:
    store, told = open_store(tmp_path), []
    fill(store, GROUPS[:2])
    fill(store, GROUPS[2:])
    first, _ = files(store)
    first.write_bytes(first.read_bytes()[:-9])
    again = open_store(tmp_path, told)
    assert len(again) == 4
    assert str(first) in told[0]
    assert [again.missing(group) is None for group in GROUPS] == [False, False, True, True]


def test_a_flipped_bit_costs_its_record_alone(tmp_path: Path) -> None:
    store, told = open_store(tmp_path), []
    fill(store)
    [file] = files(store)
    content = bytearray(file.read_bytes())
    at = content.index(store.get(GROUPS[1].keys[0])[-4:].tobytes())
    content[at + 2] ^= 4
    file.write_bytes(content)
    again = open_store(tmp_path, told)
    lacking = [again.missing(group) for group in GROUPS]
    assert [part is None for part in lacking] == [True, False, True, True]
    assert lacking[1].keys == GROUPS[1].keys[:1]
    assert len(told) == 1
    assert file.name in told[0]
    again.put(GROUPS[1].keys[0], np.ones(3, np.float32))
    again.flush()
    assert open_store(tmp_path, told).get(GROUPS[1].keys[0]).tolist() == [1, 1, 1]
    assert len(told) == 1, "there is a whole record now: nothing to tell"


def test_a_removed_file_is_a_miss_and_nothing_else(tmp_path: Path) -> None:
    store, told = open_store(tmp_path), []
    fill(store)
    files(store)[0].unlink()
    assert len(open_store(tmp_path, told)) == 0
    assert told == []
    assert store.get(GROUPS[0].keys[0]) is not None, "who had it open keeps it"


def test_a_full_disk_is_reported_and_costs_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path, own=tmp_path / "own")
    fill(store, GROUPS[:1])
    store.put(KEY, np.ones(1, np.float32))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
        with pytest.raises(CacheError, match=r"No space.*Make room"):
            store.flush()
    assert len(open_store(tmp_path)) == 2
    assert [file.name for file in store.folder.iterdir() if file.name.startswith(".")] == []
    store.flush()
    assert len(open_store(tmp_path)) == 3


def test_a_full_disk_is_no_reason_to_write_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path / "shared", own=tmp_path / "own")
    refuse(monkeypatch, errno.ENOSPC, tmp_path / "shared")
    with pytest.raises(CacheError, match="Make room"):
        fill(store)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_cache_one_may_only_read_is_read_and_the_run_s_own_folder_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shared, own, told = tmp_path / "shared", tmp_path / "own", []
    fill(open_store(shared), GROUPS[:2])
    refuse(monkeypatch, code, shared)
    store = open_store(shared, told, own=own)
    fill(store, GROUPS)
    assert len(files(store)) == 1
    assert store.home.is_relative_to(own)
    assert len(told) == 1
    assert str(own) in told[0]
    again = open_store(shared, own=own)
    assert all(again.missing(group) is None for group in GROUPS)
    with pytest.raises(CacheError, match="cannot be kept"):
        fill(open_store(shared), GROUPS)


def test_a_cache_that_cannot_be_made_is_the_run_s_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, errno.EACCES, tmp_path / "shared")
    told: list[str] = []
    fill(open_store(tmp_path / "shared", told, own=tmp_path / "own"))
    assert len(told) == 1
    assert len(open_store(tmp_path / "own")) == 8


def test_a_folder_deleted_under_a_run_is_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    store = open_store(tmp_path, told)
    fill(store, GROUPS[:2])
    shutil.rmtree(store.folder)
    fill(store, GROUPS[2:])
    assert all(store.missing(group) is None for group in GROUPS), "the run has lost nothing"
    assert len(open_store(tmp_path)) == 4
    assert len(told) == 1
    assert "was removed while" in told[0]
    shutil.rmtree(store.folder)
    store.reload()
    assert store.missing(GROUPS[3]) is None


def test_a_run_that_writes_while_its_records_are_removed_is_left_with_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    fill(store, GROUPS[:2])
    inventory = Inventory(str(tmp_path))
    [found] = inventory.references()
    remove, writes = os.rmdir, [GROUPS[2:]]

    def rmdir(*where: Any, **options: Any) -> None:
        if writes:
            fill(store, writes.pop())
        remove(*where, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    inventory.remove(found)
    [left] = inventory.references()
    assert (left.records, left.checkpoint) == (4, "base")
    assert inventory.verify(left) == []
    assert [path.name for path in tmp_path.iterdir()] == [IDENTITY.digest]


def test_two_stores_on_one_folder_see_each_other_after_a_reload(tmp_path: Path) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    fill(first, GROUPS[:2])
    fill(second, GROUPS[1:])
    assert len(second) == 6
    assert second.reload()
    assert first.reload()
    assert len(first) == len(second) == 8
    assert len(files(first)) == 2
    assert not first.reload(), "there is nothing that another process has written since"


def test_of_equal_records_the_oldest_is_read(tmp_path: Path) -> None:
    stores = [open_store(tmp_path) for _ in range(3)]
    for number, store in enumerate(stores):
        store.put(KEY, np.full(2, number, np.float32))
    for store in stores:
        store.flush()
    assert [open_store(tmp_path).get(KEY).tolist() for _ in range(3)] == [[0, 0]] * 3


def test_a_file_the_machine_does_not_read_is_left_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told = open_store(tmp_path), []
    fill(store)

    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr("fiducial.reference.cache.shards.pa.memory_map", refused)
        assert len(open_store(tmp_path, told)) == 0
    assert "cannot be read: Permission denied" in told[0]
    assert len(open_store(tmp_path)) == 8


def test_opening_a_cache_notes_its_use_where_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    fill(store)
    for path in store.folder.iterdir():
        os.utime(path, (0, 0))

    def last_used() -> float:
        [found] = Inventory(str(tmp_path)).references()
        return found.last_used

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", lambda path: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only")))
        assert len(open_store(tmp_path)) == 8
    assert last_used() == 0
    open_store(tmp_path)
    assert last_used() > 0, "what is in use is not pruned"


def test_a_completion_that_was_cut_is_found_in_the_whole_one(tmp_path: Path) -> None:
    group = next(group for group in GROUPS if min(map(len, group.completions)) > 4)
    fill(open_store(tmp_path), [group])
    store = open_store(tmp_path)
    cut = TokenizedGroup(group.prompt, tuple(completion[:3] for completion in group.completions))
    assert store.missing(cut) is None
    assert [store.get(key).tolist() for key in cut.keys] == [[0, -1, -2]] * 2
    assert store.origin(cut.keys[0]) == files(store)[0]
    other_prompt = TokenizedGroup(group.prompt[1:], cut.completions)
    other_end = TokenizedGroup(group.prompt, (np.append(cut.completions[0], 299).astype(np.int32),))
    longer = TokenizedGroup(group.prompt, (np.append(group.completions[0], 1).astype(np.int32),))
    for different in (other_prompt, other_end, longer):
        assert store.missing(different) is not None


def test_a_record_of_its_own_goes_before_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    group = next(group for group in GROUPS if min(map(len, group.completions)) > 4)
    cut = TokenizedGroup(group.prompt, tuple(completion[:3] for completion in group.completions))
    fill(open_store(tmp_path), [group])
    store = open_store(tmp_path)
    assert store.missing(cut) is None
    [longer] = files(store)
    other = open_store(tmp_path)
    other.put(cut.keys[0], np.ones(3, np.float32), cut)
    other.flush()
    store.reload()
    assert store.get(cut.keys[0]).tolist() == [1, 1, 1]
    assert store.origin(cut.keys[0]) in set(files(store)) - {longer}, "where the numbers come from"
    assert store.origin(cut.keys[1]) == longer


def test_a_file_that_is_not_trusted_serves_nobody(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, GROUPS[:2])
    fill(store, GROUPS[2:])
    path = store.origin(GROUPS[0].keys[0])
    store.distrust(path)
    assert [store.missing(group) is None for group in GROUPS] == [False, False, True, True]
    assert [store.knows_prompt(group.prompt) for group in GROUPS] == [False, False, True, True]
    assert len(open_store(tmp_path)) == 4
    fill(store, GROUPS[:2])
    assert store.origin(GROUPS[0].keys[0]) not in (None, path)


def test_a_manifest_tells_what_the_weights_are(tmp_path: Path) -> None:
    found = Fingerprint({"head": "1"}, {"eps": 0.1})
    store = LogpStore(tmp_path, Identity("base", found.digest, "float32", "None", fingerprint=found))
    manifest = json.loads((store.folder / "identity.json").read_text())
    assert manifest["fingerprint"] == {"tensors": {"head": "1"}, "settings": {"eps": 0.1}}
    assert store.folder.name == Identity("base", found.digest, "float32", "None").digest
