"""How many rows local datasets have, and how many groups a method makes of them, without loading them.

Lines of jsonl, entries of json, records of csv, and what parquet and arrow files say of themselves. A
dataset on the hub, a compressed or a very large file, or a folder whose files `datasets` would sort into
splits is counted when it is loaded: None here, never a guess.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from fiducial.config.file_kinds import KIND_OF, KINDS
from fiducial.config.schema import DatasetConfig, RunConfig
from fiducial.data.formats.shape import look_at

_LONGEST_READ = 100_000_000
"""Bytes of text that are counted in a blink; larger files are counted when they are loaded."""
_SLICE = re.compile(r"(?P<name>\w+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True, slots=True)
class DataCounts:
    """Rows of each dataset, in the config's order; None where they are counted when loaded."""

    datasets: tuple[int | None, ...] = ()
    test_datasets: tuple[int | None, ...] = ()
    groups: int | None = None
    """What the method makes of all training rows, if all are known: of a pair it takes apart, two."""

    @property
    def training(self) -> int | None:
        """Rows of all training datasets together, if all are known."""
        known = [rows for rows in self.datasets if rows is not None]
        return sum(known) if known and len(known) == len(self.datasets) else None


def count_data(cfg: RunConfig) -> DataCounts:
    """Rows of every dataset of the run, as far as they can be told without loading it."""
    if cfg.data is None:
        return DataCounts()
    takes_apart = cfg.method is not None and not cfg.method.paired
    training = [_count(dataset) for dataset in cfg.data.datasets]
    known = [found for found in training if found is not None]
    counts = DataCounts(
        tuple(None if found is None else found.rows for found in training),
        tuple(count_rows(dataset) for dataset in cfg.data.test_datasets),
    )
    if counts.training is None:
        return counts
    groups = (
        found.rows * (2 if takes_apart and not _labelled(found, dataset) else 1)
        for found, dataset in zip(known, cfg.data.datasets, strict=True)
    )
    return replace(counts, groups=sum(groups))


def count_rows(config: DatasetConfig) -> int | None:
    """Rows this dataset contributes, its `split` slice and `shards` applied."""
    found = _count(config)
    return None if found is None else found.rows


def first_rows(config: DatasetConfig, number: int) -> list[Mapping[str, Any]]:
    """The first rows of the dataset's first local file; none where only loading tells them."""
    for file, kind in _local_files(config) or ():
        look = _FIRST_ROWS.get(kind)
        return [] if look is None else [row for row in look(file, number) if isinstance(row, dict)]
    return []


def _count(config: DatasetConfig) -> "_Found | None":
    files = _local_files(config)
    found = [_look_into(file, kind) for file, kind in files or ()]
    known = [each for each in found if each is not None]
    if files is None or len(known) < len(found):
        return None
    rows = _apply_slice(sum(each.rows for each in known), config.split)
    if rows is not None and config.shards is not None:
        rows = -(-rows // config.shards)
    return None if rows is None else _Found(rows, known[0].columns if known else ())


def _labelled(found: "_Found", config: DatasetConfig) -> bool:
    """Whether rows hold single labelled completions, and not pairs."""
    return look_at((), found.columns, config).is_labelled


def _local_files(config: DatasetConfig) -> Sequence[tuple[Path, str]] | None:
    """The dataset's files and their kinds; None where `datasets` decides."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [(path, _kind(path, config))]
    names = [config.data_files] if isinstance(config.data_files, str) else list(config.data_files or ())
    if names and config.path in KINDS and not path.exists():
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
    return config.ds_type or KIND_OF.get(path.suffix, "")


@dataclass(frozen=True, slots=True)
class _Found:
    """What a file says of itself."""

    rows: int
    columns: tuple[str, ...]


def _look_into(file: Path, kind: str) -> _Found | None:
    look = _LOOKS.get(kind)
    too_large = kind in {"json", "csv"} and file.stat().st_size > _LONGEST_READ
    return None if look is None or too_large else look(file)


def _json(file: Path) -> _Found | None:
    """Lines of JSON Lines, whatever the ending says, or entries of one JSON array."""
    try:
        if file.suffix == ".json":
            content: Any = json.loads(file.read_text(encoding="utf-8"))
            return _Found(len(content), _keys(content[:1])) if isinstance(content, list) else None
    except ValueError:
        pass  # several documents: JSON Lines under a .json name
    with file.open("rb") as lines:
        written = (line for line in lines if line.strip())
        first = list(islice(written, 1))
        return _Found(len(first) + sum(1 for _ in written), _keys(map(_parsed, first)))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None  # damaged: loading it says so


def _keys(first: Iterable[Any]) -> tuple[str, ...]:
    """Columns of the first row, if there is one."""
    return tuple(key for row in first if isinstance(row, dict) for key in row)


def _csv(file: Path) -> _Found | None:
    with file.open(newline="", encoding="utf-8", errors="replace") as text:
        records = (record for record in csv.reader(text) if record)
        header = next(records, [])
        return _Found(sum(1 for _ in records), tuple(header))


def _parquet(file: Path) -> _Found | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowException:
        return None  # damaged: loading it says so
    return _Found(int(parquet.metadata.num_rows), tuple(parquet.schema_arrow.names))


def _arrow(file: Path) -> _Found | None:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            stream = pa.ipc.open_stream(source)
            return _Found(sum(int(batch.num_rows) for batch in stream), tuple(stream.schema.names))
    except pa.ArrowException:
        return None  # a file that is no stream, or damaged: loading it says so


_LOOKS: dict[str, Callable[[Path], _Found | None]] = {
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
}


def _first_of_json(file: Path, number: int) -> list[Any]:
    if file.suffix == ".json":
        if file.stat().st_size > _LONGEST_READ:
            return []
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
            return content[:number] if isinstance(content, list) else []
        except ValueError:
            pass  # several documents: JSON Lines under a .json name
    with file.open("rb") as lines:
        return list(map(_parsed, islice((line for line in lines if line.strip()), number)))


def _first_of_parquet(file: Path, number: int) -> list[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batch = next(pq.ParquetFile(file).iter_batches(batch_size=number), None)
    except pa.ArrowException:
        return []  # damaged: loading it says so
    rows: list[Any] = [] if batch is None else batch.to_pylist()
    return rows


def _first_of_arrow(file: Path, number: int) -> list[Any]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            batch = next(iter(pa.ipc.open_stream(source)), None)
            rows: list[Any] = [] if batch is None else batch.slice(0, number).to_pylist()
            return rows
    except pa.ArrowException:
        return []  # a file that is no stream, or damaged: loading it says so


_FIRST_ROWS: dict[str, Callable[[Path, int], list[Any]]] = {
    "json": _first_of_json,
    "parquet": _first_of_parquet,
    "arrow": _first_of_arrow,
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
