"""Streamed rows: the same as stored ones, in the same order, and read no further than asked for."""

import gc
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from data_files import KINDS, ROWS, save_as
from fiducial.config.schema import DatasetConfig
from fiducial.data.row_stream import RowStream, open_stream
from fiducial.errors import ConfigError, DataError


def streamed(path: object, *, where: str = "datasets.0", **options: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in open_stream(DatasetConfig(path=str(path), **options), where=where)]


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # `datasets` leaves it to the collector
@pytest.mark.parametrize("kind", KINDS)
def test_local_files(kind: str, tmp_path: Path) -> None:
    path = save_as(kind, tmp_path)
    assert streamed(path) == ROWS
    assert streamed(path, split="train[1:3]") == ROWS[1:3]
    assert streamed(f"file://{path}", split="train[4:]") == ROWS[4:]
    gc.collect()


def test_folders_saved_datasets_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = save_as("parquet", folder)
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(tmp_path / "two")
    assert streamed(folder) == ROWS
    assert streamed("parquet", data_files=str(path)) == ROWS
    assert streamed(tmp_path / "two") == ROWS
    assert streamed(tmp_path / "two", split="train[:50%]") == ROWS[:3]
    with pytest.raises(DataError, match=r"splits train, test.*test_datasets\.0\.split"):
        streamed(tmp_path / "two", where="test_datasets.0")


def test_every_iteration_begins_at_the_first_row(tmp_path: Path) -> None:
    stream = open_stream(DatasetConfig(path=str(save_as("jsonl", tmp_path))), where="datasets.0")
    assert stream.first(2) == ROWS[:2]
    assert list(stream) == list(stream) == ROWS


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "train[:50%]"}, r"datasets\.0\.split: 'train\[:50%\]' needs the number of rows"),
        ({"split": "train[-2:]"}, "needs the number of rows"),
        ({"split": "train+test"}, "needs the number of rows"),
        ({"shards": 2}, r"datasets\.0\.shards: .*train\[:1000\]"),
        ({"revision": "main"}, r"datasets\.0\.revision: has no effect on a single file"),
    ],
)
def test_options_a_stream_cannot_honour(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        streamed(save_as("jsonl", tmp_path), **options)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.json", "[]", "has no rows"),
        ("rows.csv", "", "cannot be read: No columns to parse"),
        ("rows.csv", "prompt,chosen,rejected\n", "has no rows"),
        ("rows.jsonl", json.dumps(ROWS[0]) + "\n{bad\n", "cannot be read: line 2 of rows.jsonl"),
    ],
)
def test_bad_files(name: str, content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=rf"datasets\.0\.path: '.*{name}' {says}"):
        streamed(path)


def test_splits_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Bad split: dev.*train"):
        streamed(save_as("jsonl", tmp_path), split="dev")
    with pytest.raises(DataError, match=r"has no rows in split 'train\[9:\]'"):
        streamed(save_as("jsonl", tmp_path), split="train[9:]")


def test_a_file_cut_off_says_how_far_it_could_be_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    noise = random.Random(0)  # several times what `datasets` reads at once, and hard to compress
    text = "\n".join(
        json.dumps({**ROWS[0], "n": n, "noise": noise.randbytes(1000).hex()}) for n in range(9_000)
    )
    path.write_bytes(gzip.compress(text.encode())[:-1000])
    stream = open_stream(DatasetConfig(path=str(path)), where="datasets.0")
    with pytest.raises(DataError, match=r"cannot be read: .*\d{4,} rows came before"):
        list(stream)


def test_what_a_lost_connection_raises_names_the_dataset() -> None:
    def rows():
        yield ROWS[0]
        raise ConnectionError("Server Disconnected")

    with pytest.raises(DataError, match=r"datasets\.0\.path: 'hub/name' cannot be read: Server Disc.*1 rows"):
        list(RowStream(rows(), "datasets.0.path: 'hub/name'"))
