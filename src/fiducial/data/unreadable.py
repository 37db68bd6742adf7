"""What the `datasets` library raises and prints about data it cannot read, as one message with a remedy."""

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
from datasets.exceptions import DatasetsError
from datasets.utils import logging as datasets_logging
from huggingface_hub.utils import logging as hub_logging

from fiducial.config.schema import DatasetConfig
from fiducial.errors import DataError
from fiducial.hub import not_at_hand

UNREADABLE = (ValueError, OSError, EOFError, ImportError, zlib.error, pa.ArrowException, DatasetsError)
"""What a damaged file, a lost connection or a missing package raises."""

_MOST_LINES = 1_000_000
"""Lines that are searched for a mistake."""
JSON_ENDINGS = frozenset({".json", ".jsonl", ".ndjson"})

_JSON_LINES = "Each line of a jsonl file must be one JSON object."
_CACHE = (
    "The datasets library copies what it reads into its cache; HF_DATASETS_CACHE names another place for it."
)
_REMEDIES = (
    ("no space left", f"Make room. {_CACHE}"),
    ("disk quota exceeded", f"Make room. {_CACHE}"),
    ("not enough disk space", f"Make room. {_CACHE}"),
    ("permission denied", f"Allow it. {_CACHE}"),
    ("read-only file system", _CACHE),
    ("split", "Name one that is there."),
    ("codec can't decode", "Save it as UTF-8."),
    ("tokenizing data", "Values that hold commas, quotes or line ends must be quoted."),
    ("json", _JSON_LINES),
    ("parquet", "Fetch it again, or say what it is with ds_type."),
    ("gzip", "Fetch it again, or name it by what it is."),
    ("instruction format", "Write a split as in train, train[:100] or train[10%:]."),
    ("requires", "Install what is missing, or download the file and name the copy."),
)
"""What a reason contains, and what helps then."""


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: the audit and our errors say what matters."""
    bars, level = datasets.are_progress_bars_disabled(), datasets_logging.get_verbosity()
    hub_level = hub_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub_level)
        datasets_logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def explained(place: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """Turn what `datasets` raises for a user's mistake into a `DataError` that says where it is."""
    try:
        yield
    except ConnectionError as error:
        raise DataError(not_at_hand(place, error)) from error
    except FileNotFoundError as error:
        reason = str(error).partition(" with any supported extension")[0]
        raise DataError(f"{place} was not found, neither here nor on the hub: {reason}") from error
    except StopIteration as error:  # what datasets raises for a file without a byte
        raise DataError(f"{place} is empty.") from error
    except UNREADABLE as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{place} is empty.") from error
        raise unreadable(error, place, files) from error


@contextmanager
def decoded(place: str, files: Sequence[Path] = ()) -> Iterator[None]:
    """As `explained`, while rows are taken from an open dataset: texts are decoded only then."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise unreadable(error, place, files) from error


def unreadable(error: Exception, place: str, files: Sequence[Path] = (), *, after: int = 0) -> DataError:
    """What to tell the user of `error`: the reason, the line where it can be found, and what helps.

    `files` are the local ones that were read, `after` how many rows came before.
    """
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    if isinstance(cause, UnicodeDecodeError) or _remedy(reason) in (None, _JSON_LINES):
        reason = next((found for file in files if (found := broken_json(file)) is not None), reason)
    reason = reason.rstrip(".")
    remedy = _remedy(reason) or "Each column must hold values of one type, and the file must be whole."
    came_before = f" {after} rows came before." if after else ""
    return DataError(f"{place} cannot be read: {reason}.{came_before} {remedy}")


def _remedy(reason: str) -> str | None:
    return next((remedy for sign, remedy in _REMEDIES if sign in reason.lower()), None)


def local_files(config: DatasetConfig) -> list[Path]:
    """The local files a dataset is read from, as far as its paths name them."""
    path = Path(config.path).expanduser()
    if path.is_file():
        return [path]
    names = [config.data_files] if isinstance(config.data_files, str) else list(config.data_files or ())
    if path.is_dir():
        return [path / name for name in names] or sorted(each for each in path.rglob("*") if each.is_file())
    return [Path(name).expanduser() for name in names]


def broken_json(file: Path) -> str | None:
    """Where a JSON file is broken: its first line that is no JSON object; None where there is none.

    Compressed files are looked into as well; a file that is one array or one object over many lines
    is parsed as a whole.
    """
    if not JSON_ENDINGS & set(file.suffixes) or not file.is_file():
        return None
    try:
        with fsspec.open(str(file), "rb", compression="infer") as lines:
            first = lines.readline()
            if first.startswith(b"[") or first.strip() == b"{":
                problem = _problem_of(first + lines.read())
                return problem and f"{file.name} is no JSON document ({problem})"
            lines.seek(0)
            for number, line in enumerate(islice(lines, _MOST_LINES), start=1):
                if (problem := _problem_of_line(line)) is not None:
                    return f"line {number} of {file.name} is no JSON object ({problem})"
    except (OSError, EOFError, zlib.error):
        return None  # cut off or not what its ending says; the error that led here tells
    return None


def _problem_of_line(line: bytes) -> str | None:
    if not line.strip():
        return None
    problem = _problem_of(line.strip())
    if problem is None and not line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return "it is another value"
    return problem


def _problem_of(content: bytes) -> str | None:
    try:
        json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if b"\n" in content else f"column {error.colno}"
        return f"{error.msg}, {place}"
    except UnicodeDecodeError as error:
        return str(error)
    return None
