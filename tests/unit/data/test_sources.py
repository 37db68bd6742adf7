"""Opening data: every kind of file and folder, splits, and what is said when it cannot be opened."""

import errno
import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from data_files import KINDS, ROWS, save_as
from fiducial.config.schema import DatasetConfig
from fiducial.data.row_stream import open_stream
from fiducial.data.sources import open_dataset
from fiducial.errors import ConfigError, DataError


def opened(path: object, *, where: str = "datasets.0", **options: Any) -> list[dict[str, Any]]:
    return list(open_dataset(DatasetConfig(path=str(path), **options), where=where))


@pytest.mark.parametrize("kind", KINDS)
def test_local_files(kind: str, tmp_path: Path) -> None:
    path = save_as(kind, tmp_path)
    assert opened(path) == ROWS
    assert opened(path, split="train[1:3]") == ROWS[1:3]
    assert opened(f"file://{path}") == ROWS


@pytest.mark.parametrize("read", [open_dataset, open_stream])
def test_nobody_is_told_of_local_files(
    read: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address) or [])
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_UPDATE_DOWNLOAD_COUNTS", True)):
        monkeypatch.setattr(datasets.config, name, value)
    (tmp_path / "rows").mkdir()
    for path in (save_as("jsonl", tmp_path / "rows"), tmp_path / "rows"):
        read(DatasetConfig(path=str(path)), where="datasets.0")
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


def test_folders_data_files_and_ds_type(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = save_as("jsonl", folder)
    assert opened(folder) == ROWS
    assert opened(folder, data_files="rows.jsonl") == ROWS
    assert opened(folder, ds_type="json") == ROWS
    assert opened("json", data_files=str(path)) == ROWS
    odd_name = path.rename(folder / "rows.data")
    assert opened(odd_name, ds_type="json") == ROWS
    with pytest.raises(DataError, match=r"ds_type to json, csv, parquet or arrow"):
        opened(odd_name)
    with pytest.raises(ConfigError, match=r"datasets\.0\.ds_type: contradicts datasets\.0\.path: 'json'"):
        opened("json", data_files=str(odd_name), ds_type="csv")


def test_saved_datasets_and_splits(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(tmp_path / "two")
    assert opened(tmp_path / "one") == ROWS
    assert opened(tmp_path / "one", split="train[:50%]") == ROWS[:3]
    assert opened(tmp_path / "two") == ROWS
    assert opened(tmp_path / "two", split="test") == ROWS[5:]
    assert opened(tmp_path / "two", split="train[-2:]") == ROWS[-2:]
    assert opened(tmp_path / "two", split="train[:2]+test[:1]") == [*ROWS[:2], ROWS[5]]
    assert opened(tmp_path / "two", split="test+train") == [ROWS[5], *ROWS]
    with pytest.raises(DataError, match=r"has no rows in split 'train\[3:2\]'"):
        opened(tmp_path / "two", split="train[3:2]")
    with pytest.raises(DataError, match=r'Unknown split "dev".*train.*test'):
        opened(tmp_path / "two", split="dev")
    with pytest.raises(DataError, match=r"splits train, test.*test_datasets\.0\.split"):
        opened(tmp_path / "two", where="test_datasets.0")


def test_shards(tmp_path: Path) -> None:
    path = save_as("jsonl", tmp_path)
    assert opened(path, shards=3) == ROWS[:2]
    with pytest.raises(DataError, match="7 shards of 6 rows"):
        opened(path, shards=7)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ('{"prompt": "a"\n{"prompt": "b"}', "cannot be read: line 1 of bad.json is no JSON object"),
        ('{"a": 1}\n\n["b"]', "cannot be read: line 3 of bad.json .*it is another value"),
        (
            '[{"prompt": "a"},\n{"prompt" "b"}]',
            r"cannot be read: bad.json is no JSON document .*line 2, column 11",
        ),
    ],
)
def test_bad_files(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"datasets\.0\.path: '.*bad\.json' {says}"):
        opened(path)


def test_a_column_of_two_types_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.csv"
    # The reader takes the first block for numbers and meets text in a later one.
    lines = ["prompt,chosen", *(f"{n},x" for n in range(200_000)), "text,x"]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"mixed\.csv' cannot be read"):
        opened(path)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"path": "no/such/rows.jsonl"}, DataError, r"no/such/rows\.jsonl' does not exist"),
        ({"path": "./folder"}, DataError, "does not exist"),
        (
            {"path": "owner/name"},
            DataError,
            "is not here and not cached, and the hub cannot be reached",
        ),
        (
            {"path": "owner/name", "ds_type": "json"},
            ConfigError,
            "ds_type: has no effect on a dataset on the hub",
        ),
    ],
)
def test_mistakes(
    options: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=says):
        opened(**options)


def test_options_without_effect_on_a_file(tmp_path: Path) -> None:
    path = save_as("jsonl", tmp_path)
    for options in ({"revision": "main"}, {"name": "config"}, {"data_files": "x.jsonl"}):
        with pytest.raises(
            ConfigError, match=f"datasets.0.{next(iter(options))}: has no effect on a single file"
        ):
            opened(path, **options)
    assert len(opened(path, data_files=[str(path)])) == len(opened(path))


def test_progress_bars_are_left_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = datasets.are_progress_bars_disabled()
    opened(save_as("jsonl", tmp_path))
    assert datasets.are_progress_bars_disabled() is before
    assert capfd.readouterr().err == ""


BAD_BYTES = {
    "latin.csv": ("prompt,chosen\njä,b\n".encode("latin-1"), "can't decode byte.*Save it as UTF-8"),
    "ragged.csv": (b"prompt,chosen\na,b\na,b,c,d\n", "Expected 2 fields in line 3, saw 4.*must be quoted"),
    "rows.parquet": (b"PAR1 and no more", "Parquet.*Fetch it again"),
    "rows.jsonl.gz": (b"{}", "Not a gzipped file.*Fetch it again"),
    "rows.jsonl": (b'\xef\xbb\xbf{"a": 1}\n{"a": }', "line 2 of rows.jsonl is no JSON object .*column 7"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` leaves it to the collector
def test_unreadable_files_name_the_place_and_a_remedy(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content, says = BAD_BYTES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"datasets\.0\.path: '.*{name}' cannot be read: .*{says}"):
        opened(tmp_path / name)
    assert capfd.readouterr().err == ""
    gc.collect()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_cache_of_datasets_that_cannot_be_written_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("datasets.load_dataset", failing)
    says = rf"cannot be read: \[Errno {code}\] {os.strerror(code)}\. .*HF_DATASETS_CACHE"
    with pytest.raises(DataError, match=says):
        open_dataset(DatasetConfig(path=str(save_as("jsonl", tmp_path))), where="datasets.0")


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    for name, text in (("a.csv", "prompt,chosen\np,c\n"), ("a.jsonl", '{"prompt": "p", "chosen": "c"}\n')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert opened(tmp_path / name) == [{"prompt": "p", "chosen": "c"}]


def test_a_folder_is_never_read_in_part_without_a_word(tmp_path: Path) -> None:
    path = save_as("jsonl", tmp_path)
    (tmp_path / "more.csv").write_text("prompt,chosen,rejected\np,c,r\n")
    with pytest.raises(DataError, match=r"holds \.csv, \.jsonl files.*datasets\.0\.data_files"):
        opened(tmp_path)
    assert opened(tmp_path, data_files="*.jsonl") == ROWS
    with pytest.raises(DataError, match=r"datasets\.0\.data_files: 'nope\.jsonl' is not in the folder"):
        opened(tmp_path, data_files=["nope.jsonl", path.name])


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = save_as("jsonl", tmp_path)
    with pytest.raises(DataError, match=r'Unknown split "dev".*train.*Name one that is there'):
        opened(path, split="dev")
    with pytest.raises(DataError, match=r"train\[a:b\]\. Write a split as in"):
        opened(path, split="train[a:b]")
