"""A run's data from YAML to token ids: open, read, tokenize, merge, split.

Each dataset's result is stored under `dataset_prepared_path`, if that is set (see `store.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from fiducial.config.schema import DataConfig, DatasetConfig, RunConfig
from fiducial.data.audit import Audit, DatasetAudit
from fiducial.data.dataset import TokenizedDataset, concatenate, from_groups
from fiducial.data.example import OddRow
from fiducial.data.formats import choose_format
from fiducial.data.formats.shape import look_at
from fiducial.data.rows import RowTokenizer, tokenize_rows
from fiducial.data.sources import open_dataset
from fiducial.data.split import first_occurrences, hold_out, shared_prompts
from fiducial.data.store import PreparedStore
from fiducial.data.templates import choose_template
from fiducial.data.tokenize import GroupTokenizer, Tokenized
from fiducial.errors import ConfigError

NO_GENERATION_PROMPT = "the chat template has no generation prompt: what it puts before an answer is scored"
LOOK_AT = 100
"""Rows `type: auto` decides by."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """What a run trains and evaluates on, and the account of how it came about."""

    train: TokenizedDataset
    evaluation: TokenizedDataset | None
    audit: Audit


def load_groups(cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Open, read and tokenize the datasets of `cfg`, and split off what is held out.

    Raises:
        ConfigError: settings that contradict each other or the data's format.
        DataError: data that is not there or cannot be read as preferences.
        CacheError: a damaged file under `dataset_prepared_path`.
    """
    data = _checked(cfg)
    template = choose_template(cfg.tokenizer, tokenizer)
    group_tokenizer = GroupTokenizer(tokenizer, template, data.sequence_len, data.excess_length)
    store = None if data.prepared_path is None else PreparedStore(data.prepared_path)
    audit = Audit()

    def load(configs: Sequence[DatasetConfig], section: str) -> TokenizedDataset:
        parts: list[TokenizedDataset] = []
        for number, config in enumerate(configs):
            where = f"{section}.{number}"
            part, account = _load_one(config, group_tokenizer, store, where=where, num_proc=data.num_proc)
            account.role = "train" if section == "datasets" else "evaluation"
            account.require_rows(where)
            audit.datasets.append(account)
            parts.append(part)
        return concatenate(parts)

    train = load(data.datasets, "datasets")
    evaluation = load(data.test_datasets, "test_datasets") if data.test_datasets else None
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
    if data.streaming:
        raise ConfigError(
            "streaming: not supported yet. Remove it; rows are read in batches and kept as token ids."
        )
    if data.sequence_len < 2:
        raise ConfigError("sequence_len: a prompt and a completion need at least 2 tokens.")
    if data.test_datasets and data.val_set_size:
        raise ConfigError("val_set_size: there are test_datasets already. Keep one of the two.")
    return data


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
    shape = look_at(_first_rows(rows), rows.column_names, config)
    name, format_, fields = choose_format(config, shape, where=where)
    work = RowTokenizer(config.path, format_.read, fields, tokenize)
    audit = DatasetAudit(config.path, name, rows=len(rows))
    audit.unread_columns = [column for column in rows.column_names if column not in fields.columns.values()]
    if _scores_headers(work, shape.rows):
        audit.notes.append(NO_GENERATION_PROMPT)
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


def _scores_headers(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are conversations that the template does not open the answer of."""
    template = work.tokenize.template
    if template is None or template.opens_the_answer:
        return False
    for row in rows:
        try:
            prompt, _ = work.read(row, work.fields)
        except OddRow:
            continue
        return not isinstance(prompt, str)
    return False


def _first_rows(rows: datasets.Dataset) -> list[Mapping[str, Any]]:
    return [rows[index] for index in range(min(LOOK_AT, len(rows)))]
