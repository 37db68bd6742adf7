"""Are two checkpoints the same base? The first bytes of a few weights tell, without loading either."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fiducial.reference.checkpoint import CheckpointFiles, weight_files

_TENSORS, _BYTES = 8, 4096
"""Weights looked at, and bytes of each: two trainings never leave all of them equal."""


def differing_weight(first: CheckpointFiles, second: CheckpointFiles) -> str | None:
    """The name of a weight that is stored in both and differs; None where none of those looked at does.

    Weights in another dtype or shape are not compared, nor are checkpoints that are not at hand.
    """
    places = [dict(_places(files)) for files in (first, second)]
    common = [name for name in sorted(places[0]) if _alike(places[0][name], places[1].get(name))]
    step = max(len(common) // _TENSORS, 1)
    return next(
        (name for name in common[::step] if _begins(places[0][name]) != _begins(places[1][name])), None
    )


_Place = tuple[Path, int, Mapping[str, Any]]
"""File, where its data begins, and the header's entry."""


def _places(files: CheckpointFiles) -> Iterator[tuple[str, _Place]]:
    for path in weight_files(files) or ():
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, (path, 8 + length, entry)


def _alike(first: _Place, second: _Place | None) -> bool:
    return second is not None and all(first[2][key] == second[2][key] for key in ("dtype", "shape"))


def _begins(place: _Place) -> bytes:
    path, data, entry = place
    start, end = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(data + start)
        return file.read(min(end - start, _BYTES))
