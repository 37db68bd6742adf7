"""How many rows local datasets have, without loading them.

Lines of jsonl, entries of json, records of csv, and what parquet and arrow files say of themselves. A
dataset on the hub, a compressed or a very large file, or a folder whose files `datasets` would sort into
splits is counted when it is loaded: None here, never a guess.
"""

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiducial.config.schema import DatasetConfig, RunConfig

_LONGEST_READ = 100_000_000
"""Bytes of text that are counted in a blink; larger files are counted when they are loaded."""
_SLICE = re.compile(r"(?P<name>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True, slots=True)
class DataCounts:
    """Rows of each dataset, in the config's order; None where they are counted when loaded."""

    datasets: tuple[int | None, ...] = ()
    test_datasets: tuple[int | None, ...] = ()

    @property
    def training(self) -> int | None:
        """Rows of all training datasets together, if all are known."""
        known = [rows for rows in self.datasets if rows is not None]
        return sum(known) if known and len(known) == len(self.datasets) else None


def count_data(cfg: RunConfig) -> DataCounts:
    """Rows of every dataset of the run, as far as they can be told without loading it."""
    if cfg.data is None:
        return DataCounts()
    return DataCounts(
        tuple(count_rows(dataset) for dataset in cfg.data.datasets),
        tuple(count_rows(dataset) for dataset in cfg.data.test_datasets),
    )


def count_rows(config: DatasetConfig) -> int | None:
    """Rows this dataset contributes, its `split` slice and `shards` applied."""
    total = 0
    for file, kind in _local_files(config) or ((None, ""),):
        rows = None if file is None else _rows_of_file(file, kind)
        if rows is None:
            return None
        total += rows
    sliced = _apply_slice(total, config.split)
    return sliced if sliced is None or config.shards is None else -(-sliced // config.shards)


def _local_files(config: DatasetConfig) -> Sequence[tuple[Path, str]] | None:
    """The dataset's files and their kinds; None where `datasets` decides."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [(path, _kind(path, config))]
    names = [config.data_files] if isinstance(config.data_files, str) else list(config.data_files or ())
    if names and config.path in _COUNTERS and not path.exists():
        files = [Path(name).expanduser() for name in names]
        return [(file, config.path) for file in files] if all(file.is_file() for file in files) else None
    if not path.is_dir():
        return None
    if (path / "state.json").is_file():
        return [(file, "arrow") for file in sorted(path.glob("data-*.arrow"))]
    if config.ds_type is None:
        return None
    files = [path / name for name in names] if names else sorted(path.iterdir())
    return [(file, config.ds_type) for file in files] if all(file.is_file() for file in files) else None


def _kind(path: Path, config: DatasetConfig) -> str:
    return config.ds_type or {"jsonl": "json", "ndjson": "json"}.get(path.suffix[1:], path.suffix[1:])


def _rows_of_file(file: Path, kind: str) -> int | None:
    counter = _COUNTERS.get(kind)
    too_large = kind in {"json", "csv"} and file.stat().st_size > _LONGEST_READ
    return None if counter is None or too_large else counter(file)


def _json_rows(file: Path) -> int | None:
    """Lines of JSON Lines, whatever the ending says, or entries of one JSON array."""
    try:
        if file.suffix == ".json":
            content: Any = json.loads(file.read_text(encoding="utf-8"))
            return len(content) if isinstance(content, list) else None
    except ValueError:
        pass  # several documents: JSON Lines under a .json name
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _csv_rows(file: Path) -> int | None:
    with file.open(newline="", encoding="utf-8", errors="replace") as text:
        return max(sum(1 for record in csv.reader(text) if record) - 1, 0)


def _parquet_rows(file: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.ParquetFile(file).metadata.num_rows)
    except pa.ArrowException:
        return None  # damaged: loading it says so


def _arrow_rows(file: Path) -> int | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            return sum(int(batch.num_rows) for batch in pa.ipc.open_stream(source))
    except pa.ArrowException:
        return None  # a file that is no stream, or damaged: loading it says so


_COUNTERS: dict[str, Callable[[Path], int | None]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}


def _apply_slice(rows: int, split: str | None) -> int | None:
    """Rows of `train`, `train[:100]`, `train[10%:]`; None for anything more elaborate."""
    match = _SLICE.fullmatch(split or "train")
    if match is None:
        return None
    bounds = [_bound(match[key], rows) for key in ("start", "stop")]
    return len(range(rows)[bounds[0] : bounds[1]])


def _bound(text: str | None, rows: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) / 100 * rows) if text.endswith("%") else int(text)
