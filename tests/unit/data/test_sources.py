"""Opening data: every kind of file and folder, splits, and what is said when it cannot be opened."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from fiducial.config.schema import DatasetConfig
from fiducial.data.sources import open_dataset
from fiducial.errors import ConfigError, DataError

ROWS = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(6)]


def opened(path: object, *, where: str = "datasets.0", **options: Any) -> list[dict[str, Any]]:
    return list(open_dataset(DatasetConfig(path=str(path), **options), where=where))


def save_as(kind: str, folder: Path) -> Path:
    rows, text = Dataset.from_list(ROWS), "\n".join(map(json.dumps, ROWS))
    path = folder / f"rows.{kind}"
    writers: dict[str, Callable[[], object]] = {
        "jsonl": lambda: path.write_text(text),
        "json": lambda: path.write_text(json.dumps(ROWS)),
        "jsonl.gz": lambda: path.write_bytes(gzip.compress(text.encode())),
        "json.gz": lambda: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
        "csv": lambda: rows.to_csv(path),
        "parquet": lambda: rows.to_parquet(path),
        "arrow": lambda: _arrow(rows, path),
    }
    writers[kind]()
    return path


def _arrow(rows: Dataset, path: Path) -> None:
    rows.save_to_disk(path.parent / "saved")
    [written] = (path.parent / "saved").glob("*.arrow")
    written.rename(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "json.gz", "csv", "parquet", "arrow"])
def test_local_files(kind: str, tmp_path: Path) -> None:
    path = save_as(kind, tmp_path)
    assert opened(path) == ROWS
    assert opened(path, split="train[1:3]") == ROWS[1:3]
    assert opened(f"file://{path}") == ROWS


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


def test_saved_datasets_and_splits(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([5])}).save_to_disk(tmp_path / "two")
    assert opened(tmp_path / "one") == ROWS
    assert opened(tmp_path / "one", split="train[:50%]") == ROWS[:3]
    assert opened(tmp_path / "two") == ROWS
    assert opened(tmp_path / "two", split="test") == ROWS[5:]
    assert opened(tmp_path / "two", split="train[-2:]") == ROWS[-2:]
    with pytest.raises(DataError, match=r"Unknown split 'dev'.*train.*test"):
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
        ('{"prompt": "a"\n{"prompt": "b"}', "cannot be read: JSON parse error"),
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
        ({"path": "owner/name"}, DataError, "no local file or folder, and the hub cannot be reached"),
        ({"path": "owner/name", "trust_remote_code": True}, ConfigError, "no longer runs dataset scripts"),
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


def test_progress_bars_are_left_as_they_were(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = datasets.are_progress_bars_disabled()
    opened(save_as("jsonl", tmp_path))
    assert datasets.are_progress_bars_disabled() is before
    assert capfd.readouterr().err == ""
