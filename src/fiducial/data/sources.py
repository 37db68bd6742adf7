"""Opening datasets: a local file or folder, a URL, or a name on the hub, all through the `datasets` library.

Decisions: a path that exists is local, one with `://` is opened by fsspec, anything else is a hub name,
except that a missing file is reported as such and never looked up on the hub. Without `split`, a dataset with
one split is that split and a training dataset with a `train` split is that one; otherwise the split must be
named, so that a test set is never read from training rows by default. `row_stream.py` reads the same places
row by row.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from fiducial import compat
from fiducial.config.file_kinds import KIND_OF, KINDS
from fiducial.config.schema import DatasetConfig
from fiducial.data.unreadable import explained, local_files, quiet
from fiducial.errors import ConfigError, DataError

COMPRESSIONS = frozenset({".gz", ".zst", ".bz2", ".xz"})

Rows = TypeVar("Rows", Dataset, IterableDataset)


def open_dataset(config: DatasetConfig, *, where: str, num_proc: int | None = None) -> Dataset:
    """The rows of one dataset, in order.

    Raises:
        ConfigError: an option that cannot have an effect.
        DataError: no such file, folder, hub name or split; data that cannot be read; no rows.
    """
    place = f"{where}.path: '{config.path}'"
    with quiet(), explained(place, local_files(config)):
        opened = open_saved(config, where)
        if opened is None:
            opened = load(load_arguments(config, where), split=config.split, num_proc=num_proc)
    rows = pick_split(opened, where, place)
    if config.shards is not None:
        if config.shards > max(len(rows), 1):
            raise DataError(
                f"{where}.shards: {config.shards} shards of {len(rows)} rows leave the first one empty."
            )
        rows = rows.shard(num_shards=config.shards, index=0, contiguous=True)
    if not len(rows):
        raise DataError(f"{place} has no rows{f' in split {config.split!r}' if config.split else ''}.")
    return rows


def open_saved(config: DatasetConfig, where: str) -> Dataset | DatasetDict | None:
    """A dataset that `save_to_disk` wrote, with `split` applied; None where the path is no such folder."""
    path = Path(config.path).expanduser()
    if not _is_saved(path):
        return None
    _refuse(config, where, ("name", "data_files", "ds_type", "revision"), "a dataset saved to disk")
    return _slice_saved(datasets.load_from_disk(str(path)), config)


def load(arguments: dict[str, Any], **how: Any) -> Any:
    """`load_dataset`, which tells nobody of files that it is given."""
    given_files = arguments["path"] in KINDS
    with compat.reading_uncounted() if given_files else nullcontext():
        return datasets.load_dataset(**arguments, **how)


def load_arguments(config: DatasetConfig, where: str) -> dict[str, Any]:
    """What `load_dataset` is called with to find the dataset, but for its split."""
    place = f"{where}.path: '{config.path}'"
    target, data_files = _target(config, Path(config.path).expanduser(), where, place)
    return {
        "path": target,
        "name": config.name,
        "data_files": data_files,
        "revision": config.revision,
    }


def _target(config: DatasetConfig, path: Path, where: str, place: str) -> tuple[str, Any]:
    """What `load_dataset` is called with: a builder and files, a folder, or a hub name and its files."""
    files = list(config.data_files) if isinstance(config.data_files, tuple) else config.data_files
    if path.is_file() or "://" in config.path:
        names_itself = files in (config.path, [config.path])  # axolotl's files say it twice
        others = ("name", "revision") if names_itself else ("name", "data_files", "revision")
        _refuse(config, where, others, "a single file")
        return _builder(config, where), str(path) if path.is_file() else config.path
    if config.path in KINDS and files:
        _refuse(config, where, ("name", "revision"), "local files")
        if config.ds_type not in (None, config.path):
            raise ConfigError(
                f"{where}.ds_type: contradicts {where}.path: '{config.path}'. Keep one of them."
            )
        return config.path, files
    if path.is_dir():
        _refuse(config, where, ("revision",), "a local folder")
        if not any(path.iterdir()):
            raise DataError(f"{place} is an empty folder.")
        _check_folder(path, files, config, where)
        if config.ds_type is None:
            return str(path), files
        names = [files] if isinstance(files, str) else files or sorted(p.name for p in path.iterdir())
        return config.ds_type, [str(path / name) for name in names]
    if _looks_like_a_file(config.path):
        raise DataError(f"{place} does not exist (looked in {path.parent.absolute()}).")
    _refuse(config, where, ("ds_type",), "a dataset on the hub")
    return config.path, files


def _check_folder(path: Path, files: Any, config: DatasetConfig, where: str) -> None:
    """Raise `DataError` for files that are not there, or that would be passed over without a word."""
    names = [files] if isinstance(files, str) else list(files or ())
    missing = [name for name in names if not any(path.glob(name))]
    if missing:
        raise DataError(f"{where}.data_files: '{missing[0]}' is not in the folder '{config.path}'.")
    if files or config.ds_type or (path / "README.md").is_file():
        return
    endings = {file.suffix for file in path.rglob("*") if file.suffix in KIND_OF}
    if len({KIND_OF[ending] for ending in endings}) > 1:
        raise DataError(
            f"{where}.path: the folder '{config.path}' holds {', '.join(sorted(endings))} files, and only "
            f"those of one kind can be read together. Pick some with {where}.data_files."
        )


def _builder(config: DatasetConfig, where: str) -> str:
    if config.ds_type is not None:
        return config.ds_type
    suffixes = [suffix for suffix in Path(config.path).suffixes if suffix not in COMPRESSIONS]
    if suffixes and suffixes[-1] in KIND_OF:
        return KIND_OF[suffixes[-1]]
    raise DataError(
        f"{where}.path: '{config.path}' does not say what it holds; known endings are "
        f"{', '.join(KIND_OF)}, alone or compressed. Set {where}.ds_type to json, csv, parquet or arrow."
    )


def _looks_like_a_file(path: str) -> bool:
    endings = KIND_OF.keys() | COMPRESSIONS
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in endings


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _slice_saved(saved: Dataset | DatasetDict, config: DatasetConfig) -> Dataset | DatasetDict:
    """`split` of a saved dataset, slices and sums of them included, by the library's own grammar."""
    if config.split is None:
        return saved
    splits = saved if isinstance(saved, DatasetDict) else DatasetDict({"train": saved})
    lengths = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(config.split).to_absolute(lengths)
    return datasets.concatenate_datasets(
        [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    )


def pick_split(opened: Rows | dict[str, Rows], where: str, place: str) -> Rows:
    """The one split that is meant where none is named.

    Raises:
        DataError: it could be any of several.
    """
    if not isinstance(opened, dict):
        return opened
    if len(opened) == 1:
        return next(iter(opened.values()))
    if "train" in opened and not where.startswith("test_"):
        return opened["train"]
    raise DataError(f"{place} has the splits {', '.join(opened)}. Say which one with {where}.split.")


def _refuse(config: DatasetConfig, where: str, options: tuple[str, ...], what: str) -> None:
    for option in options:
        if getattr(config, option) is not None:
            raise ConfigError(f"{where}.{option}: has no effect on {what} ('{config.path}'). Remove it.")
