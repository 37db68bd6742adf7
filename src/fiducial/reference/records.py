"""One file of reference log-probs: safetensors, with a checksum over all it holds."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fiducial.errors import CacheError

Logps = npt.NDArray[np.float32]

_NAMES = ("keys", "lengths", "values")


def encode_records(records: Mapping[str, Logps]) -> bytes:
    """The file's content for at least one completion's log-probs, by content key."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "keys": np.frombuffer(bytes.fromhex("".join(records)), np.uint8).reshape(len(records), -1),
        "lengths": np.array([len(values) for values in records.values()], np.int32),
        "values": np.concatenate(list(records.values())),
    }
    return save(tensors, {"checksum": _checksum(tensors)})


def read_records(path: Path) -> Iterator[tuple[str, Logps]]:
    """The completions of one file.

    Raises:
        CacheError: The file is damaged.
    """
    remedy = f"{path} is damaged. Remove it; only its completions are scored again."
    try:
        content = path.read_bytes()
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        intact = header["__metadata__"]["checksum"] == _checksum(tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CacheError(f"{remedy} ({error})") from error
    if not intact:
        raise CacheError(remedy)
    keys = [key.tobytes().hex() for key in tensors["keys"]]
    yield from zip(keys, np.split(tensors["values"], np.cumsum(tensors["lengths"])[:-1]), strict=True)


def _checksum(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in _NAMES:
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
