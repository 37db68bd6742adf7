"""Rows of one dataset read as they are needed, in order; what has been read is not kept.

A stream's length is not known, so a `split` slice counts rows from the beginning and `shards` is refused.
Files with a single JSON array are no stream: `datasets` reads each of them whole.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from fiducial.config.schema import DatasetConfig
from fiducial.data.sources import load, load_arguments, open_saved, pick_split
from fiducial.data.unreadable import UNREADABLE, explained, local_files, quiet, unreadable
from fiducial.errors import ConfigError, DataError

Row = Mapping[str, Any]

BLOCK = 64
"""Rows that are read together."""

_SLICE = re.compile(r"(?P<name>[^\[\]+]+)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


@dataclass(frozen=True, slots=True)
class RowStream:
    """The rows of one dataset; every iteration begins at the first one."""

    rows: Iterable[Row]
    place: str
    """YAML path and value, for messages."""
    files: Sequence[Path] = ()
    """The local files that are read."""

    def __iter__(self) -> Iterator[Row]:
        """The rows, in order.

        Raises:
            DataError: a row cannot be read; it says how many rows could.
        """
        rows, number = iter(self.rows), 0
        while True:
            with quiet():
                block, failure = _read(rows)
            yield from block
            number += len(block)
            if failure is not None:
                raise unreadable(failure, self.place, self.files, after=number) from failure
            if len(block) < BLOCK:
                return

    def first(self, number: int) -> list[Row]:
        """The first rows."""
        return list(islice(self, number))


def open_stream(config: DatasetConfig, *, where: str) -> RowStream:
    """The rows of one dataset, read as they are needed.

    Raises:
        ConfigError: an option that cannot have an effect, or that needs the number of rows.
        DataError: no such file, folder, hub name or split; data that cannot be read; no rows.
    """
    place = f"{where}.path: '{config.path}'"
    files = local_files(config)
    if config.shards is not None:
        raise ConfigError(
            f"{where}.shards: a stream's length is not known, and so not a share of it. Write, for example, "
            f"{where}.split: train[:1000], or streaming: false."
        )
    with quiet(), explained(place, files):
        saved = open_saved(config, where)
        if saved is None:
            rows = _load(config, where, place)
        else:
            rows = pick_split(saved, where, place).to_iterable_dataset()
    stream = RowStream(rows, place, files)
    if not stream.first(1):
        raise DataError(f"{place} has no rows{f' in split {config.split!r}' if config.split else ''}.")
    return stream


def _load(config: DatasetConfig, where: str, place: str) -> IterableDataset:
    arguments = load_arguments(config, where)
    if config.split is None:
        return pick_split(load(arguments, streaming=True), where, place)
    parts = _SLICE.fullmatch(config.split)
    if parts is None:
        raise ConfigError(
            f"{where}.split: '{config.split}' needs the number of rows, which is not known of a stream. "
            f"Count rows from the beginning, as in train[:1000] or train[1000:], or write streaming: false."
        )
    rows = load(arguments, split=parts["name"], streaming=True)
    start, stop = int(parts["start"] or 0), parts["stop"]
    if stop:
        rows = rows.take(int(stop))
    return rows.skip(start) if start else rows


def _read(rows: Iterator[Row]) -> tuple[list[Row], Exception | None]:
    """The next rows, and what a damaged file or a lost connection raised after them."""
    block: list[Row] = []
    try:
        block.extend(islice(rows, BLOCK))
    except UNREADABLE as error:
        return block, error
    return block, None
