"""A run's data from YAML to token ids: open, read, tokenize, merge, split.

Each dataset's result is stored under `dataset_prepared_path`, if that is set (see `store.py`). Streamed
training data is only begun here (see `stream.py`); what it is evaluated on is read whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from fiducial.config.schema import DataConfig, DatasetConfig, RunConfig
from fiducial.data.audit import Audit, DatasetAudit
from fiducial.data.dataset import TokenizedDataset, concatenate, from_groups
from fiducial.data.example import OddRow
from fiducial.data.reading import LOOK_AT, choose_reading
from fiducial.data.row_stream import open_stream
from fiducial.data.rows import tokenize_rows
from fiducial.data.sources import open_dataset
from fiducial.data.split import first_occurrences, hold_out, prompt_keys, shared_prompts
from fiducial.data.store import PreparedStore
from fiducial.data.stream import GroupStream, Shuffling, StreamedDataset, one_pass
from fiducial.data.templates import choose_template
from fiducial.data.tokenize import GroupTokenizer, Tokenized
from fiducial.data.unreadable import decoded, local_files
from fiducial.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains and evaluates on, and the account of how it came about."""

    train: TokenizedDataset | GroupStream
    evaluation: TokenizedDataset | None
    audit: Audit
    """As far as rows have been read before training."""

    @property
    def sample(self) -> TokenizedDataset:
        """Groups to train on that stand for all of them: all there are, or the first of a stream."""
        return self.train if isinstance(self.train, TokenizedDataset) else self.train.sample

    @property
    def longest(self) -> int:
        """No prompt + completion has more tokens."""
        parts = [self.train] if self.evaluation is None else [self.train, self.evaluation]
        return max(part.longest for part in parts)

    def account(self) -> Audit:
        """The account as far as rows have been read by now."""
        if isinstance(self.train, TokenizedDataset):
            return self.audit
        now = self.train.audit()
        evaluated = [each for each in self.audit.datasets if each.role == "evaluation"]
        return replace(now, datasets=[*now.datasets, *evaluated], evaluation=self.audit.evaluation)


def load_groups(
    cfg: RunConfig, tokenizer: PreTrainedTokenizerBase, *, num_processes: int = 1
) -> PreparedData:
    """Open, read and tokenize the datasets of `cfg`, and split off what is held out.

    Of streamed data only the first groups are read; `num_processes` says how many a step takes.

    Raises:
        ConfigError: settings that contradict each other or the data's format.
        DataError: data that is not there or cannot be read as preferences.
        CacheError: a damaged file under `dataset_prepared_path`.
    """
    data = _checked(cfg)
    template = choose_template(cfg.tokenizer, tokenizer)
    tokenize = GroupTokenizer(tokenizer, template, data.sequence_len, data.excess_length)
    evaluation, accounts = _load(data, "test_datasets", tokenize) if data.test_datasets else (None, [])
    if data.streaming:
        return _begin_stream(cfg, data, tokenize, evaluation, accounts, num_processes)
    train, train_accounts = _load(data, "datasets", tokenize)
    audit = Audit([*train_accounts, *accounts])
    if data.exact_deduplication:
        kept = first_occurrences(train)
        audit.notes.append(f"{len(train) - len(kept)} rows repeat an earlier one exactly and are left out")
        train = train.select(kept)
    if data.val_set_size:
        training, held_out = hold_out(train, data.val_set_size, seed=cfg.optimization.seed)
        train, evaluation = train.select(training), train.select(held_out)
    elif evaluation is not None and (overlap := shared_prompts(train, evaluation)):
        audit.notes.append(f"{overlap} evaluation rows have a prompt that is also trained on")
    if data.shuffle:
        train = train.select(np.random.default_rng(cfg.optimization.seed).permutation(len(train)))
    audit.train, audit.evaluation = len(train), 0 if evaluation is None else len(evaluation)
    return PreparedData(train, evaluation, audit)


def _checked(cfg: RunConfig) -> DataConfig:
    data = cfg.data
    if data is None or not data.datasets:
        raise ConfigError("datasets: there is none, and so nothing to learn from. Name at least one.")
    if data.sequence_len < 2:
        raise ConfigError("sequence_len: a prompt and a completion need at least 2 tokens.")
    if data.test_datasets and data.val_set_size:
        raise ConfigError("val_set_size: there are test_datasets already. Keep one of the two.")
    if data.streaming:
        _check_streaming(cfg, data)
    return data


def _check_streaming(cfg: RunConfig, data: DataConfig) -> None:
    if cfg.optimization.max_steps is None:
        raise ConfigError("streaming: a stream has no length to count epochs by. Set max_steps.")
    if 0 < data.val_set_size < 1:
        raise ConfigError(
            "val_set_size: a stream's length is not known, and so not a share of it. Write a number of rows, "
            "or name test_datasets."
        )
    if data.exact_deduplication:
        raise ConfigError(
            "dataset_exact_deduplication: all rows would have to be remembered. Remove it, or streaming."
        )


def _begin_stream(
    cfg: RunConfig,
    data: DataConfig,
    tokenize: GroupTokenizer,
    evaluation: TokenizedDataset | None,
    accounts: list[DatasetAudit],
    num_processes: int,
) -> PreparedData:
    streamed = [_stream(config, tokenize, f"datasets.{n}") for n, config in enumerate(data.datasets)]
    wanted = int(data.val_set_size)
    if wanted:
        evaluation = from_groups(islice(one_pass(streamed), wanted))
    assert cfg.optimization.max_steps is not None, "checked"
    stream = GroupStream(
        streamed,
        Shuffling(cfg.optimization.seed, data.shuffle_buffer if data.shuffle else 1),
        length=cfg.optimization.max_steps * cfg.optimization.groups_per_step * num_processes,
        evaluated=frozenset() if evaluation is None else prompt_keys(evaluation),
        leave_out_evaluated=wanted > 0,
    )
    for dataset, account in zip(streamed, stream.accounts, strict=True):
        if account.ended or account.rows >= LOOK_AT:
            account.so_far().require_rows(dataset.where)
    if not len(stream.sample):
        raise DataError(
            f"val_set_size: holding out {wanted} rows, and all others with a prompt of theirs, leaves none "
            f"to train on. Lower it, or name test_datasets."
        )
    audit = Audit(accounts, evaluation=0 if evaluation is None else len(evaluation))
    begun = PreparedData(stream, evaluation, audit)
    return replace(begun, audit=begun.account())


def _stream(config: DatasetConfig, tokenize: GroupTokenizer, where: str) -> StreamedDataset:
    rows = open_stream(config, where=where)
    first = rows.first(LOOK_AT)
    columns = list(dict.fromkeys(column for row in first for column in row))
    work, blank = choose_reading(config, first, columns, tokenize, where=where)
    return StreamedDataset(where, rows, work, blank)


def _load(
    data: DataConfig, section: Literal["datasets", "test_datasets"], tokenize: GroupTokenizer
) -> tuple[TokenizedDataset, list[DatasetAudit]]:
    """All groups of a section's datasets, one dataset after the other, and each one's account."""
    store = None if data.prepared_path is None else PreparedStore(data.prepared_path)
    parts: list[TokenizedDataset] = []
    accounts: list[DatasetAudit] = []
    configs: Sequence[DatasetConfig] = getattr(data, section)
    for number, config in enumerate(configs):
        where = f"{section}.{number}"
        part, account = _load_one(config, tokenize, store, where=where, num_proc=data.num_proc)
        account.role = "train" if section == "datasets" else "evaluation"
        account.require_rows(where)
        parts.append(part)
        accounts.append(account)
    return concatenate(parts), accounts


def _load_one(
    config: DatasetConfig,
    tokenize: GroupTokenizer,
    store: PreparedStore | None,
    *,
    where: str,
    num_proc: int | None,
) -> tuple[TokenizedDataset, DatasetAudit]:
    """One dataset's groups in row order, from the store if it has them."""
    rows = open_dataset(config, where=where, num_proc=num_proc)
    with decoded(f"{where}.path: '{config.path}'", local_files(config)):
        if store is None:
            return _tokenize(rows, config, tokenize, where=where, num_proc=num_proc)
        key = store.key(rows, config, tokenize)
        stored = store.get(key)
        if stored is None:
            stored = _tokenize(rows, config, tokenize, where=where, num_proc=num_proc)
            store.put(key, *stored)
        return stored


def _tokenize(
    rows: datasets.Dataset,
    config: DatasetConfig,
    tokenize: GroupTokenizer,
    *,
    where: str,
    num_proc: int | None,
) -> tuple[TokenizedDataset, DatasetAudit]:
    first = [rows[index] for index in range(min(LOOK_AT, len(rows)))]
    work, audit = choose_reading(config, first, rows.column_names, tokenize, where=where)
    audit.rows = len(rows)
    kept: list[Tokenized] = []
    for row, result in enumerate(tokenize_rows(rows, work, num_proc=num_proc)):
        if isinstance(result, OddRow):
            audit.drop(row, result)
        else:
            kept.append(result)
    dataset = from_groups(result.group for result in kept)
    audit.truncated = sum(result.truncated for result in kept)
    audit.doubled_bos = sum(result.bos_removed for result in kept)
    audit.measure(dataset)
    return dataset, audit
