"""A checkpoint's fingerprint from its files, without loading it: one tensor at a time, in pieces.

It equals that of the model `from_pretrained` would make in a dtype, which a run needs to say, before anything
is loaded, whether its reference is known.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fiducial.reference.fingerprint import bits, start_hash, without_tied_head
from fiducial.reference.identity import Fingerprint

_PIECE_BYTES = 1 << 26


def fingerprint_files(files: Sequence[Path], settings: dict[str, Any], dtype: torch.dtype) -> Fingerprint:
    """The fingerprint of the weights in safetensors `files`, held in `dtype`.

    `settings` is `numeric_settings` of the config the model would be built from.
    """
    with ThreadPoolExecutor(max_workers=4) as pool:  # reading and hashing release the interpreter lock
        found = [item for hashes in pool.map(lambda path: _hashes(path, dtype), files) for item in hashes]
    return Fingerprint(without_tied_head(dict(found)), settings)


def _hashes(path: Path, dtype: torch.dtype) -> list[tuple[str, str]]:
    with safe_open(path, "pt") as file:
        return [(name, _hash(file, name, dtype)) for name in file.keys()]  # noqa: SIM118 (not a dict)


def _hash(file: Any, name: str, dtype: torch.dtype) -> str:
    pieces = _pieces(file, name)
    first = next(pieces)
    held = dtype if first.is_floating_point() else first.dtype
    digest = start_hash(held, tuple(file.get_slice(name).get_shape()))
    digest.update(bits(first.to(held)))
    for piece in pieces:
        digest.update(bits(piece.to(held)))
    return digest.hexdigest()


def _pieces(file: Any, name: str) -> Iterator[torch.Tensor]:
    """The tensor by rows, never more than a piece of it in memory."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    if not shape or not shape[0]:
        yield file.get_tensor(name)
        return
    row_bytes = 8
    for size in shape[1:]:
        row_bytes *= size
    step = max(_PIECE_BYTES // max(row_bytes, 1), 1)
    for start in range(0, shape[0], step):
        yield stored[start : start + step]
