"""Rows of local datasets, against what `datasets` loads."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from fiducial.config.methods import APOZeroUnpairedConfig, DPOConfig, KTOConfig
from fiducial.config.schema import DataConfig, DatasetConfig, ModelConfig, RunConfig
from fiducial.reference import row_counts
from fiducial.reference.row_counts import DataCounts, count_data, count_rows

ROWS = [{"prompt": f"line\n{i}", "chosen": 'a "quoted", word', "rejected": "b"} for i in range(23)]


def written(folder: Path, name: str) -> Path:
    """The rows in the format that `name` ends with."""
    file = folder / name
    rows = Dataset.from_list(ROWS)
    match file.suffix:
        case ".jsonl":
            file.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        case ".json":
            file.write_text(json.dumps(ROWS))
        case ".csv":
            rows.to_csv(file)
        case ".parquet":
            rows.to_parquet(file)
        case _:
            rows.save_to_disk(file)
    return file


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"])
def test_every_local_format_is_counted(name: str, tmp_path: Path) -> None:
    assert count_rows(DatasetConfig(path=str(written(tmp_path, name)))) == len(ROWS)


def test_an_arrow_file_and_a_misnamed_jsonl_are_counted(tmp_path: Path) -> None:
    arrow = next(written(tmp_path, "saved").glob("*.arrow"))
    assert count_rows(DatasetConfig(path=str(arrow))) == len(ROWS)
    misnamed = written(tmp_path, "rows.jsonl").rename(tmp_path / "rows.json")
    assert count_rows(DatasetConfig(path=str(misnamed))) == len(ROWS)


@pytest.mark.parametrize(
    "split", ["train", "train[:5]", "train[5:]", "train[-5:]", "train[10%:]", "train[:33%]", "train[10%:60%]"]
)
def test_slices_are_those_datasets_takes(split: str, tmp_path: Path) -> None:
    file = written(tmp_path, "rows.json")
    loaded = load_dataset("json", data_files=str(file), split=split, cache_dir=str(tmp_path / "cache"))
    assert count_rows(DatasetConfig(path=str(file), split=split)) == len(loaded)


def test_shards_are_those_datasets_takes(tmp_path: Path) -> None:
    file = written(tmp_path, "rows.jsonl")
    expected = len(Dataset.from_list(ROWS).shard(num_shards=4, index=0))
    assert count_rows(DatasetConfig(path=str(file), shards=4)) == expected


def test_several_files_are_summed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        written(tmp_path, name)
    folder = DatasetConfig(path=str(tmp_path), ds_type="json")
    assert count_rows(folder) == 2 * len(ROWS)
    assert count_rows(folder.model_copy(update={"data_files": "a.jsonl"})) == len(ROWS)
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"))
    assert count_rows(DatasetConfig(path="json", data_files=files)) == 2 * len(ROWS)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "team/pairs"},
        {"path": "https://example.org/pairs.jsonl"},
        {"path": "rows.jsonl", "split": "train[:5]+train[10:]"},
        {"path": "rows.jsonl.gz"},
        {"path": "damaged.parquet"},
        {"path": "object.json"},
        {"path": "."},
    ],
    ids=str,
)
def test_what_cannot_be_told_cheaply_is_left_open(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "rows.jsonl")
    (tmp_path / "rows.jsonl.gz").write_bytes(b"compressed")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "object.json").write_text('{"rows": []}')
    monkeypatch.chdir(tmp_path)
    assert count_rows(DatasetConfig(**settings)) is None


def test_large_text_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, "rows.jsonl")
    monkeypatch.setattr(row_counts, "_LONGEST_READ", 10)
    assert count_rows(DatasetConfig(path=str(file))) is None


def test_a_total_needs_every_dataset(tmp_path: Path) -> None:
    known = DatasetConfig(path=str(written(tmp_path, "rows.jsonl")))
    model = ModelConfig(base_model="base")
    both = RunConfig(model=model, data=DataConfig(datasets=(known, known), test_datasets=(known,)))
    assert count_data(both) == DataCounts((23, 23), (23,), groups=46)
    assert count_data(both).training == 46
    unknown = DatasetConfig(path="team/pairs")
    assert count_data(RunConfig(model=model, data=DataConfig(datasets=(known, unknown)))).training is None
    assert count_data(RunConfig(model=model)).training is None


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"])
def test_pairs_are_two_completions_where_they_are_taken_apart(name: str, tmp_path: Path) -> None:
    data = DataConfig(datasets=(DatasetConfig(path=str(written(tmp_path, name))),))
    run = RunConfig(model=ModelConfig(base_model="base"), data=data)

    assert count_data(run.model_copy(update={"method": DPOConfig()})).groups == 23
    for method in (KTOConfig(), APOZeroUnpairedConfig()):
        counts = count_data(run.model_copy(update={"method": method}))
        assert (counts.training, counts.groups) == (23, 46)


@pytest.mark.parametrize(
    ("row", "field", "groups"),
    [
        ({"prompt": "a", "completion": "b", "label": True}, None, 3),
        ({"messages": [], "kto_tag": False}, None, 3),
        ({"prompt": "a", "completion": "b", "good": 1}, "good", 3),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": 1}, None, 6),
    ],
)
def test_labelled_rows_stay_one_completion(
    tmp_path: Path, row: dict[str, Any], field: str | None, groups: int
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(3 * (json.dumps(row) + "\n"))

    def counted(**options: Any) -> int | None:
        data = DataConfig(datasets=(DatasetConfig(path=str(file), **options),))
        return count_data(
            RunConfig(model=ModelConfig(base_model="base"), data=data, method=KTOConfig())
        ).groups

    assert counted(field_label=field) == groups
    assert counted(type={"field_label": field}) == groups


def test_a_first_line_that_is_no_json_is_left_to_loading(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{\n{}\n")
    assert count_rows(DatasetConfig(path=str(file))) == 2
