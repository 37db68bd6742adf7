"""A checkpoint's files, read without loading it: JSON, and the header of a safetensors file.

A checkpoint is a local folder or a hub name. From the hub only small JSON files are fetched, through its
client, which is imported when a hub name needs it and keeps to its cache and to HF_HUB_OFFLINE. Imports no
torch.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fiducial.errors import ModelError
from fiducial.hub import not_at_hand, unreachable

_HEADER_LIMIT = 100_000_000
"""No header is longer: a larger number means the file is something else."""


@dataclass(frozen=True, slots=True)
class TensorFact:
    """Dtype (safetensors' name: F32, BF16, …) and shape of one stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """Where to look for a checkpoint's files, and how to speak of it in errors."""

    key: str
    """The YAML key that named it."""
    location: str
    revision: str | None
    folder: Path | None
    """None for a hub name."""

    def find(self, name: str) -> Path | None:
        """The file `name` here or in the hub's cache; None if it is not there, nothing is fetched."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.location, name, revision=self.revision)
        return Path(cached) if isinstance(cached, str) else None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in `name`, fetched from the hub if need be; None if there is no such file.

        Raises:
            ModelError: the file is not a JSON object, or the hub does not answer for this checkpoint.
        """
        path = self.find(name) if self.folder is not None else self._fetch(name)
        return None if path is None else _json_object(path, self.key)

    def _fetch(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            return Path(
                hf_hub_download(
                    self.location, name, revision=self.revision, local_files_only=unreachable() is not None
                )
            )
        except LocalEntryNotFoundError as error:
            if name != "config.json" and self.find("config.json"):
                return None  # offline, with a cache that holds the checkpoint but not this optional file
            raise ModelError(not_at_hand(f"{self.key}: {self.location}", error)) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as error:
            raise ModelError(
                f"{self.key}: {self.location} is no folder here, and the hub does not give it out under that "
                f"name (revision {self.revision or 'main'}). Check the spelling, or log in if it is gated."
            ) from error


def open_checkpoint(location: str, revision: str | None, *, key: str) -> CheckpointFiles:
    """Find the checkpoint that the YAML key `key` names.

    Raises:
        ModelError: `location` is a path that does not exist, or a file.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return CheckpointFiles(key, location, revision, path)
    if path.exists():
        raise ModelError(
            f"{key}: {location} is a file. Give the folder that holds config.json and the weights."
        )
    if path.is_absolute() or location.startswith((".", "~")) or location.count("/") > 1:
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        raise ModelError(f"{key}: there is no folder {location}{looked}. Check the path.")
    return CheckpointFiles(key, location, revision, None)


def same_place(first: str, second: str) -> bool:
    """Whether two locations are one, however spelled: `sft`, `./sft` and `sft/` are the same folder."""
    paths = [Path(location).expanduser().resolve() for location in (first, second)]
    return first == second or paths[0] == paths[1]


def read_tensor_facts(path: Path, key: str) -> dict[str, TensorFact]:
    """Names, dtypes and shapes of the tensors in a safetensors file, from its header alone.

    The format is 8 bytes of header length, little-endian, a JSON header, then the data.

    Raises:
        ModelError: the file is damaged or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start == b"version ":
            raise ModelError(
                f"{key}: {path} is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`."
            )
        if not 0 < length <= min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, key, "its header is longer than the file")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        facts = {name: TensorFact(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise _damaged(path, key, "its header cannot be read") from error
    if size != 8 + length + end:
        raise _damaged(path, key, f"it has {size:,} bytes where its header announces {8 + length + end:,}")
    return facts


def read_sharded_tensor_facts(files: CheckpointFiles, name: str) -> Mapping[str, TensorFact] | None:
    """Tensors of `name`.safetensors or of the shards its index lists; None where they are not all at hand.

    Raises:
        ModelError: a local folder lacks a shard, or a file is damaged.
    """
    whole = files.find(f"{name}.safetensors")
    if whole is not None:
        return read_tensor_facts(whole, files.key)
    index = files.read_json(f"{name}.safetensors.index.json")
    if index is None:
        return None
    shards = sorted(set(index.get("weight_map", {}).values()))
    paths = {shard: files.find(shard) for shard in shards}
    missing = [shard for shard, path in paths.items() if path is None]
    if missing and files.folder is not None:
        raise ModelError(
            f"{files.key}: {files.location} lacks {len(missing)} of the {len(shards)} weight files its index "
            f"lists, first {missing[0]}. Download the checkpoint again."
        )
    if missing or not shards:
        return None
    return {
        tensor: fact
        for path in paths.values()
        if path is not None
        for tensor, fact in read_tensor_facts(path, files.key).items()
    }


def weight_files(files: CheckpointFiles) -> list[Path] | None:
    """The safetensors files of the weights; None where they are not all at hand."""
    whole = files.find("model.safetensors")
    if whole is not None:
        return [whole]
    index = files.read_json("model.safetensors.index.json") or {}
    found = [files.find(name) for name in sorted(set(index.get("weight_map", {}).values()))]
    paths = [path for path in found if path is not None]
    return paths if found and len(paths) == len(found) else None


def _json_object(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(
            f"{key}: {path} is not JSON ({error}). The checkpoint is damaged; download it again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{key}: {path} does not hold a JSON object. The checkpoint is damaged.")
    return content


def _damaged(path: Path, key: str, what: str) -> ModelError:
    return ModelError(
        f"{key}: {path} is damaged: {what}. It was cut short or is no safetensors file; download it again."
    )
