"""Many small files made into few: the same records to the bit, whoever reads or writes meanwhile."""

import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from fiducial.data.tokenize import TokenizedGroup
from fiducial.reference.cache import LogpStore, merging
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.cache.merging import merge
from fiducial.reference.identity import Identity
from tiny import random_groups

IDENTITY = Identity("base", "0", "float32", "None")
OTHER = Identity("base", "1", "float32", "None")
GROUPS = random_groups(12)


def open_store(folder: Path, told: list[str] | None = None, identity: Identity = IDENTITY) -> LogpStore:
    return LogpStore(folder, identity, tell=[].append if told is None else told.append)


def fill(store: LogpStore, groups: list[TokenizedGroup] = GROUPS, *, shift: float = 0.0) -> None:
    """A file for each group."""
    for number, group in enumerate(groups):
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, -np.arange(len(completion), dtype=np.float32) - 100 * number - shift, group)
        store.flush()


def everything(store: LogpStore) -> list[list[float] | None]:
    found = [store.get(key) for group in GROUPS for key in group.keys]
    return [None if values is None else values.tolist() for values in found]


def files(folder: Path) -> list[Path]:
    return sorted((folder / IDENTITY.digest).glob("*.arrow"))


def merge_all(folder: Path | str) -> list[tuple[int, int]]:
    return [merge(str(folder), each) for each in Inventory(str(folder)).references()]


def test_few_files_hold_the_same_records(tmp_path: Path) -> None:
    fill(open_store(tmp_path))
    fill(open_store(tmp_path, identity=OTHER), GROUPS[:1])
    before = everything(open_store(tmp_path))
    assert None not in before
    assert sorted(merge_all(tmp_path)) == [(0, 0), (12, 1)], "one file is not merged with itself"
    store = open_store(tmp_path, told := [])
    assert len(files(tmp_path)) == 1
    assert everything(store) == before
    assert len(store) == 24
    cut = [TokenizedGroup(group.prompt, tuple(c[:1] for c in group.completions)) for group in GROUPS]
    assert all(store.missing(group) is None for group in cut), "their tokens are there too"
    assert told == []
    assert merge_all(tmp_path)[0] == (0, 0)


def test_large_files_stay_and_merged_ones_are_closed_when_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    for group in GROUPS[:6]:
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, np.zeros(len(completion), np.float32), group)
    store.flush()
    [large] = files(tmp_path)
    fill(store, GROUPS[6:])
    before = everything(store)
    monkeypatch.setattr(merging, "SMALL_BYTES", large.stat().st_size)
    monkeypatch.setattr(merging, "FULL_BYTES", 600)
    [(merged, made)] = merge_all(tmp_path)
    assert merged == 6
    assert 1 < made < 6
    assert large in files(tmp_path)
    assert everything(open_store(tmp_path)) == before


def test_of_two_records_the_one_that_was_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_store(tmp_path), open_store(tmp_path)
    fill(first, GROUPS[:2])
    fill(second, GROUPS, shift=0.5)
    before = everything(open_store(tmp_path))
    merge_all(tmp_path)
    assert everything(open_store(tmp_path)) == before
    [merged] = files(tmp_path)
    assert len(open_store(tmp_path)) == 24
    assert merged.name.split("-")[2] == "24", "none is there twice"


def test_what_is_damaged_is_left_for_a_run_to_find(tmp_path: Path) -> None:
    fill(open_store(tmp_path))
    damaged = files(tmp_path)[3]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert merge_all(tmp_path) == [(11, 1)]
    store = open_store(tmp_path, told := [])
    assert [store.missing(group) is not None for group in GROUPS] == [number == 3 for number in range(12)]
    assert damaged.name in told[0]


def test_merging_is_no_use_of_the_records(tmp_path: Path) -> None:
    fill(open_store(tmp_path))
    for path in (tmp_path / IDENTITY.digest).iterdir():
        os.utime(path, (1000, 1000))
    merge_all(tmp_path)
    assert Inventory(str(tmp_path)).references()[0].last_used == 1000


def test_who_has_listed_the_old_files_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(open_store(tmp_path))
    names, merged = RecordFolder.names, []

    def meanwhile(self: RecordFolder) -> list[str]:
        found = names(self)
        if not merged:
            merged.extend(merge_all(tmp_path))
        return found

    monkeypatch.setattr(RecordFolder, "names", meanwhile)
    assert None not in everything(open_store(tmp_path))
    assert merged == [(12, 1)]


def test_who_had_them_open_keeps_them(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store, GROUPS[:6])
    merge_all(tmp_path)
    fill(store, GROUPS[6:])
    assert None not in everything(store)
    assert None not in everything(open_store(tmp_path))


def test_a_merge_that_stops_before_it_deletes_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(open_store(tmp_path))
    before = everything(open_store(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(merging._Merge, "_delete", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_all(tmp_path)
    assert len(files(tmp_path)) == 13
    assert everything(open_store(tmp_path)) == before
    assert merge_all(tmp_path) == [(13, 1)]
    assert everything(open_store(tmp_path)) == before


def test_writers_and_other_mergers_lose_nothing(tmp_path: Path) -> None:
    groups, stop, failed = random_groups(150, seed=5), threading.Event(), []

    def merging_on() -> None:
        try:
            while not stop.is_set():
                merge_all(tmp_path)
        except BaseException as error:
            failed.append(error)

    mergers = [threading.Thread(target=merging_on) for _ in range(2)]
    open_store(tmp_path)
    for merger in mergers:
        merger.start()
    try:
        fill(open_store(tmp_path), groups[:75])
        second = open_store(tmp_path)
        fill(second, groups[75:])
        second.reload()
    finally:
        stop.set()
        for merger in mergers:
            merger.join()
    assert failed == []
    merge_all(tmp_path)
    assert len(files(tmp_path)) == 1
    again = open_store(tmp_path, told := [])
    assert all(again.missing(group) is None for group in groups)
    assert told == []


def test_a_cache_at_a_url_is_merged_there(tmp_path: Path) -> None:
    url = "memory://merging/references"
    store = LogpStore(tmp_path / "mirror", IDENTITY, url=url)
    fill(store)
    assert merge_all(url) == [(12, 1)]
    there = [name for name in fsspec.filesystem("memory").find("/merging") if name.endswith(".arrow")]
    assert len(there) == 1
    elsewhere = LogpStore(tmp_path / "elsewhere", IDENTITY, url=url)
    assert everything(elsewhere) == everything(store)
    assert len(files(tmp_path / "elsewhere")) == 1
