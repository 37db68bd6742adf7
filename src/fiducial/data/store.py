"""Prepared token ids on disk, keyed by everything they depend on.

The key is a hash of the rows themselves (so an edited file is another key, whatever its name and date), of
how they are read, of the tokenizer, the template, the length rules and this format's version. There is
nothing to invalidate: what changed has another name. Files are plain `.npz` without pickle, written aside and
moved into place.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4
from zipfile import BadZipFile

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fiducial._version import VERSION
from fiducial.config.schema import DatasetConfig
from fiducial.data.audit import DatasetAudit
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.tokenize import GroupTokenizer
from fiducial.errors import CacheError

LAYOUT = 2
"""Raised whenever the file gets another layout; the package's version stands for how rows become tokens."""
ARRAYS = ("tokens", "bounds", "starts", "order")
"""In every file; `scores` only where the data has some."""


class PreparedStore:
    """A folder of prepared datasets."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def key(self, rows: datasets.Dataset, config: DatasetConfig, tokenize: GroupTokenizer) -> str:
        """The name of what `rows` become when read by `config` and tokenized by `tokenize`."""
        template = tokenize.template
        parts = {
            "version": [LAYOUT, VERSION],
            "rows": _rows_hash(rows),
            "dataset": config.model_dump(mode="json"),
            "tokenizer": _tokenizer_hash(tokenize.tokenizer),
            "template": None if template is None else [template.source, dict(template.kwargs)],
            "lengths": [tokenize.sequence_len, tokenize.excess_length],
        }
        return _hash([json.dumps(parts, sort_keys=True, default=str).encode()])

    def get(self, key: str) -> tuple[TokenizedDataset, DatasetAudit] | None:
        """What is stored under `key`, or None."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                names = (*ARRAYS, "scores") if "scores" in stored.files else ARRAYS
                dataset = TokenizedDataset(**{name: stored[name] for name in names})
                audit = DatasetAudit.from_dict(json.loads(stored["audit"].tobytes()))
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise CacheError(f"dataset_prepared_path: {path} is damaged ({error}). Delete it.") from error
        return dataset, audit

    def put(self, key: str, dataset: TokenizedDataset, audit: DatasetAudit) -> None:
        """Store a dataset; readers see the whole file or none."""
        path = self._path(key)
        aside = path.with_suffix(f".{uuid4().hex}.tmp")
        text = np.frombuffer(json.dumps(asdict(audit)).encode(), dtype=np.uint8)
        arrays = {name: getattr(dataset, name) for name in ARRAYS}
        if dataset.scores is not None:
            arrays["scores"] = dataset.scores
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                np.savez(file, audit=text, **arrays)
            aside.replace(path)
        except OSError as error:
            raise CacheError(f"dataset_prepared_path: {path} cannot be written: {error}") from error
        finally:
            if aside.exists():
                aside.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.npz"


def _rows_hash(rows: datasets.Dataset) -> str:
    def tables() -> Iterable[bytes]:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table.combine_chunks())
            yield sink.getvalue().to_pybytes()

    return _hash(tables())


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = json.dumps([tokenizer.get_vocab(), tokenizer.init_kwargs], sort_keys=True, default=str)
    else:
        content = backend.to_str()
    names = json.dumps([type(tokenizer).__name__, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return _hash([content.encode(), names.encode()])


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
