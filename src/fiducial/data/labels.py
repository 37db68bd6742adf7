"""Data as a method takes it: pairs for most, single labelled completions for kto and its kin.

Pairs become two labelled completions where the method asks for those: chosen is desirable, rejected
undesirable. The other way there is none: a labelled completion has nothing to be compared with.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from fiducial.config.methods import MethodConfig
from fiducial.data.audit import Audit
from fiducial.data.dataset import TokenizedDataset, from_groups
from fiducial.data.formats import FORMATS
from fiducial.data.formats.labels import DESIRABLE, UNDESIRABLE
from fiducial.data.groups import require_groups
from fiducial.data.mismatch import add_mismatched
from fiducial.data.prepare import PreparedData
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ConfigError, DataError

ADVISED = (1.0, 4 / 3)
"""λ_D n_D / (λ_U n_U), Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 9."""


def fit_to_method(
    data: PreparedData, method: MethodConfig, *, sequence_len: int, trains: bool = True
) -> PreparedData:
    """The data in the form `method` learns from; what only training asks of it is asked if it `trains`.

    Raises:
        ConfigError: streamed data that would have to be known as a whole.
        DataError: labelled completions where pairs are compared, labels of one kind only, or one prompt.
    """
    if method.paired:
        _require_pairs(data, method)
        require_groups(data, method)
        return data
    if not isinstance(data.train, TokenizedDataset):
        return _fit_stream(data, method)
    train = unpair(data.train)
    evaluation = None if data.evaluation is None else unpair(data.evaluation)
    audit = _account(data, train, evaluation, method, trains=trains)
    if method.mismatched:
        train = add_mismatched(train, sequence_len=sequence_len, where="datasets")
        if evaluation is not None:
            where = "test_datasets, val_set_size"
            evaluation = add_mismatched(evaluation, sequence_len=sequence_len, where=where)
    return PreparedData(train, evaluation, audit)


def _account(
    data: PreparedData,
    train: TokenizedDataset,
    evaluation: TokenizedDataset | None,
    method: MethodConfig,
    *,
    trains: bool,
) -> Audit:
    """The data's account with its labels counted; raises `DataError` where one kind is missing."""
    desirable, undesirable = count_labels(train)
    notes = list(data.audit.notes)
    if trains:
        _require_both(desirable, undesirable, method)
        notes += _weights_note(desirable, undesirable, method)
    if pairs := len(train) - len(data.train):
        notes.append(f"{pairs} pairs are taken apart: a desirable and an undesirable completion each")
    labels = {"train": (desirable, undesirable)}
    if evaluation is not None:
        labels["evaluation"] = count_labels(evaluation)
    held_out = 0 if evaluation is None else len(evaluation)
    return replace(data.audit, train=len(train), evaluation=held_out, labels=labels, notes=notes)


def unpair(dataset: TokenizedDataset) -> TokenizedDataset:
    """Each pair as a desirable and an undesirable item, in this order; labelled items as they are.

    Raises:
        DataError: items with more than two completions, of which nobody said which are desirable.
    """
    ranked = int((dataset.num_completions > 2).sum())
    if ranked:
        raise DataError(
            f"datasets: {ranked} rows rank more than two completions and do not say which are desirable. "
            f"Give labelled completions or pairs."
        )
    if (dataset.num_completions == 1).all():
        return dataset
    return from_groups(single for index in range(len(dataset)) for single in _apart(dataset[index]))


def _apart(group: TokenizedGroup) -> Iterator[TokenizedGroup]:
    if len(group.completions) == 1:
        yield group
        return
    for completion, score in zip(group.completions, (DESIRABLE, UNDESIRABLE), strict=True):
        yield TokenizedGroup(group.prompt, (completion,), (score,))


def count_labels(dataset: TokenizedDataset) -> tuple[int, int]:
    """How many items are desirable and undesirable."""
    scores = np.array([dataset[index].scores[0] for index in range(len(dataset))])
    return int((scores > 0).sum()), int((scores < 0).sum())


def _require_pairs(data: PreparedData, method: MethodConfig) -> None:
    for part in (data.sample, data.evaluation):
        if part is None or (part.num_completions > 1).all():
            continue
        labelled = [
            f"{account.name} (read as {account.format})"
            for account in data.audit.datasets
            if "label" in FORMATS[account.format].columns
        ]
        raise DataError(
            f"{', '.join(labelled)}: single labelled completions, and {method.title} compares answers "
            f"to one prompt. Write rl: kto, or give pairs."
        )


def _fit_stream(data: PreparedData, method: MethodConfig) -> PreparedData:
    if method.mismatched:
        raise ConfigError(
            f"streaming: {method.title} gives each prompt the answer to another one, drawn from all data, "
            f"and a stream is never there as a whole. Remove it, or write kto_loss_type: apo_zero_unpaired."
        )
    if (data.sample.num_completions > 1).any():
        raise ConfigError(
            f"streaming: pairs are not taken apart for {method.title} while they are streamed. Remove "
            f"streaming, or stream labelled completions."
        )
    evaluation = None if data.evaluation is None else unpair(data.evaluation)
    return replace(data, evaluation=evaluation)


def _require_both(desirable: int, undesirable: int, method: MethodConfig) -> None:
    """Raise `DataError` where one kind is missing, unless its weight is 0."""
    weights = method.model_dump()
    for count, kind in ((desirable, "desirable"), (undesirable, "undesirable")):
        if not count and weights[f"{kind}_weight"]:
            raise DataError(
                f"datasets: none of the {desirable + undesirable} completions to train on is {kind}, so "
                f"there is nothing to tell apart. Look at the label column (field_label), or write "
                f"kto_{kind}_weight: 0 if that is meant."
            )


def _weights_note(desirable: int, undesirable: int, method: MethodConfig) -> list[str]:
    """What the paper advises, where the weights are not so."""
    weights = method.model_dump()
    good, bad = weights["desirable_weight"] * desirable, weights["undesirable_weight"] * undesirable
    if not method.mismatched or not good or not bad:
        return []
    low, high = ADVISED
    if low - 1e-6 <= good / bad <= high + 1e-6:
        return []
    advised = (f"{bound * weights['undesirable_weight'] * undesirable / desirable:.3g}" for bound in ADVISED)
    return [
        f"desirable completions have {good / bad:.3g} times the weight of undesirable ones, and the paper "
        f"advises 1 to 4/3: kto_desirable_weight from {' to '.join(advised)} would do"
    ]
