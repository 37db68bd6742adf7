"""A cache at a URL: in memory, and on an FTP server that the test starts."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from rich.console import Console

from fiducial.errors import CacheError
from fiducial.reference.cache import LogpStore, remote
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.cache.places import is_remote, local_folder, shown
from fiducial.reference.identity import Identity
from fiducial.train import preprocess
from run_configs import run_config
from tiny import random_groups

IDENTITY = Identity("base", "0", "float32", "None")
GROUPS = random_groups(4)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://team/references"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "served"
    folder.mkdir()
    command = [sys.executable, "-m", "pyftpdlib", "-i", "127.0.0.1", "-p", str(port), "-w", "-d", str(folder)]
    server = subprocess.Popen([*command, "-u", "u", "-P", "secret"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield f"ftp://u:secret@127.0.0.1:{port}/references"
    server.kill()
    server.wait()


@pytest.fixture(params=["memory", "ftp"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue(request.param)
    return found


def open_at(url: str, mirror: Path, told: list[str] | None = None) -> LogpStore:
    return LogpStore(mirror, IDENTITY, url=url, tell=[].append if told is None else told.append)


def fill(store: LogpStore, groups: list[Any] = GROUPS) -> None:
    for group in groups:
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, -np.arange(len(completion), dtype=np.float32), group)
    store.flush()


def test_another_machine_finds_what_this_one_has_scored(url: str, tmp_path: Path) -> None:
    told: list[str] = []
    fill(open_at(url, tmp_path / "one", told), GROUPS[:2])
    second = open_at(url, tmp_path / "two", told)
    assert [second.missing(group) is None for group in GROUPS] == [True, True, False, False]
    fill(second, GROUPS[2:])
    assert len(open_at(url, tmp_path / "three", told)) == 8
    third = open_at(url, tmp_path / "one", told)
    assert len(third) == 8, "a mirror catches up"
    assert third.get(GROUPS[3].keys[0]).tolist() == second.get(GROUPS[3].keys[0]).tolist()
    assert told == []


def test_it_is_listed_verified_and_pruned_like_any_other(url: str, tmp_path: Path) -> None:
    fill(open_at(url, tmp_path / "one"))
    inventory = Inventory(url)
    [found] = inventory.references()
    assert (found.identity, found.records, found.files) == (IDENTITY.digest, 8, 1)
    assert found.checkpoint == "base"
    assert found.bytes > 1000
    assert time.time() - found.last_used < 3600
    assert inventory.verify(found) == []
    inventory.remove(found)
    assert inventory.references() == []
    assert len(open_at(url, tmp_path / "two")) == 0


def test_half_a_file_on_the_other_machine_is_not_taken(memory: str, tmp_path: Path) -> None:
    fill(open_at(memory, tmp_path / "one"))
    filesystem = fsspec.filesystem("memory")
    [path] = filesystem.glob("/team/references/*/*.arrow")
    whole = filesystem.cat_file(path)
    filesystem.pipe_file(path, whole[: len(whole) // 2])
    told: list[str] = []
    store = open_at(memory, tmp_path / "two", told)
    assert len(store) == 0
    store.reload()
    assert len(told) == 1
    assert path.rpartition("/")[2] in told[0]
    assert "damaged, or still being written" in told[0]
    assert len(Inventory(memory).verify(Inventory(memory).references()[0])) == 1
    filesystem.pipe_file(path, whole)
    assert len(open_at(memory, tmp_path / "two")) == 8


def test_what_could_not_be_sent_is_kept_and_sent_by_the_next_run(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store = open_at(memory, tmp_path / "one", told)
    with monkeypatch.context() as patch:

        def unreachable(*arguments: object) -> None:
            raise ConnectionResetError("the line is cut")

        patch.setattr(remote, "put_whole", unreachable)
        fill(store, GROUPS[:2])
        fill(store, GROUPS[2:])
    assert all(store.missing(group) is None for group in GROUPS), "the run goes on"
    assert len(told) == 1
    assert "ConnectionResetError" in told[0]
    assert "a later one sends" in told[0]
    assert len(open_at(memory, tmp_path / "two")) == 0
    open_at(memory, tmp_path / "one")
    assert len(open_at(memory, tmp_path / "three")) == 8
    assert not list(tmp_path.glob("*/*/*.unsent"))


def test_a_mirror_deleted_under_a_run_is_made_again(url: str, tmp_path: Path) -> None:
    told: list[str] = []
    store = open_at(url, tmp_path / "one", told)
    fill(store, GROUPS[:2])
    shutil.rmtree(tmp_path / "one")
    store.reload()
    fill(store, GROUPS[2:])
    assert all(store.missing(group) is None for group in GROUPS), "the run goes on"
    assert all("cannot be" not in sentence for sentence in told)
    assert len(open_at(url, tmp_path / "two")) == len(open_at(url, tmp_path / "one")) == 8


def test_where_the_mirror_may_only_be_read_records_are_sent_from_the_run_s_own_folder(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    store = LogpStore(tmp_path / "one", IDENTITY, own=tmp_path / "own", url=memory, tell=told.append)
    write = RecordFolder.write

    def read_only(self: RecordFolder, name: str, content: bytes) -> None:
        if self.path.is_relative_to(tmp_path / "one"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path / name))
        write(self, name, content)

    monkeypatch.setattr(RecordFolder, "write", read_only)
    fill(store)
    assert len(told) == 1
    assert "cannot be written" in told[0]
    assert len(open_at(memory, tmp_path / "two")) == 8


def test_a_file_that_is_not_trusted_is_gone_for_all(memory: str, tmp_path: Path) -> None:
    store = open_at(memory, tmp_path / "one")
    fill(store)
    store.distrust(store.origin(GROUPS[0].keys[0]))
    assert len(open_at(memory, tmp_path / "two")) == 0
    assert len(open_at(memory, tmp_path / "one")) == 0


@pytest.mark.parametrize(
    ("wrong", "why"),
    [("nowhere://x", "Protocol not known: nowhere"), ("ftp://u:secret@127.0.0.1:1/x", "Connection refused")],
)
def test_a_cache_that_does_not_answer_is_an_error_without_the_password(
    tmp_path: Path, wrong: str, why: str
) -> None:
    with pytest.raises(CacheError, match=why) as error:
        open_at(wrong, tmp_path)
    assert "reference.cache" in str(error.value)
    assert "secret" not in str(error.value)


def test_addresses(reference_cache: Path) -> None:
    assert is_remote("s3://bucket/x")
    assert not is_remote("file:///x")
    assert local_folder(None) == reference_cache
    assert local_folder("file:///x/y") == local_folder("/x/y") == Path("/x/y")
    assert local_folder("s3://bucket/x").parent == reference_cache / "mirrors"
    assert local_folder("s3://bucket/x") == local_folder("s3://bucket/x/") != local_folder("s3://bucket/y")
    assert shown("ftp://u:secret@host/x") == "ftp://host/x"


@pytest.mark.slow
def test_two_runs_on_two_machines_share_one_cache(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for machine in ("one", "two"):
        monkeypatch.setenv("FIDUCIAL_CACHE", str(tmp_path / machine))
        console = Console(record=True, width=200)
        preprocess(run_config(tmp_path, reference={"cache": memory}), console=console)
        said.append(console.export_text())
    assert "24 completions scored" in said[0]
    assert "known from an earlier run" in said[1]
