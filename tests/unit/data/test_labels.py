"""Data in the form a method takes: pairs taken apart, labels counted, and what cannot be."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.methods import APOZeroUnpairedConfig, DPOConfig, KTOConfig, MethodConfig, ORPOConfig
from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset, from_groups
from fiducial.data.labels import fit_to_method, unpair
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.errors import ConfigError, DataError
from tiny import random_groups

Fit = Callable[..., PreparedData]


@pytest.fixture
def fit(
    write: Callable[..., Path], run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> Fit:
    def load_for(
        method: MethodConfig,
        rows: list[dict[str, Any]],
        tests: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> PreparedData:
        test_files = [{"path": str(write(tests))}] if tests else []
        cfg = run_config({"path": str(write(rows))}, tests=test_files, **options)
        return fit_to_method(load_groups(cfg, byte_tokenizer), method, sequence_len=2048)

    return load_for


def pair(number: int) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "chosen": f" yes {number}", "rejected": f" no {number}"}


def single(number: int, label: object = True) -> dict[str, Any]:
    return {"prompt": f"Question {number}?", "completion": f" answer {number}", "label": label}


def texts(dataset: Any, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str, float]]:
    groups = [dataset[index] for index in range(len(dataset))]
    return [
        (tokenizer.decode(group.prompt), tokenizer.decode(group.completions[0]), group.scores[0])
        for group in groups
    ]


def test_pairs_are_taken_apart_for_kto(fit: Fit, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    data = fit(KTOConfig(), [pair(0), pair(1)])

    assert texts(data.train, byte_tokenizer) == [
        ("Question 0?", " yes 0</s>", 1.0),
        ("Question 0?", " no 0</s>", -1.0),
        ("Question 1?", " yes 1</s>", 1.0),
        ("Question 1?", " no 1</s>", -1.0),
    ]
    assert data.audit.train == 4
    assert data.audit.labels == {"train": (2, 2)}
    assert data.audit.summary().startswith("2 rows: 4 completions to train on")
    assert data.audit.notes == ["2 pairs are taken apart: a desirable and an undesirable completion each"]
    mismatched = [byte_tokenizer.decode(data.sample[index].completions[1]) for index in range(4)]
    assert sorted(mismatched) == [" no 0</s>", " no 1</s>", " yes 0</s>", " yes 1</s>"]


def test_labelled_rows_stay_as_they_are(fit: Fit, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [single(0), single(1, label=0), single(2, label="False"), single(3, label=1.0)]

    data = fit(APOZeroUnpairedConfig(), rows, tests=[single(4), single(5, label=False)])

    assert [score for *_, score in texts(data.train, byte_tokenizer)] == [1.0, -1.0, -1.0, 1.0]
    assert all(len(data.sample[index].completions) == 1 for index in range(4))
    assert data.audit.labels == {"train": (2, 2), "evaluation": (1, 1)}
    assert data.audit.notes == []


def test_odd_labels_are_counted(fit: Fit) -> None:
    rows = [single(0), single(1, label=False), single(2, label="maybe"), single(3, label=-1), single(4, None)]

    data = fit(
        KTOConfig(),
        [{**row, "label": str(row["label"])} if row["label"] is not None else row for row in rows],
    )

    dropped = data.audit.datasets[0].dropped
    assert {reason: (each.rows, each.detail) for reason, each in dropped.items()} == {
        "the label is neither true nor false": ([2, 3], "'maybe'; '-1'"),
        "a field is missing": ([4], "label"),
    }
    assert data.audit.datasets[0].lengths.keys() == {"prompt", "completion"}


def test_labels_in_other_words_are_told_which_to_write(fit: Fit) -> None:
    with pytest.raises(DataError, match=r"'good'.* Write true and false there, or 1 and 0"):
        fit(KTOConfig(), [single(0, label="good"), single(1, label="good")])


def test_what_repeats_under_another_label_is_no_repetition(fit: Fit) -> None:
    rows = [single(0), single(0, label=False), single(0), single(1)]

    data = fit(APOZeroUnpairedConfig(), rows, exact_deduplication=True)

    assert data.audit.labels["train"] == (2, 1)


def test_evaluation_data_has_its_own_mismatched_completions(
    fit: Fit, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = fit(KTOConfig(), [pair(0), pair(1)], tests=[single(7), single(8, label=False)])

    assert data.evaluation is not None
    given = [byte_tokenizer.decode(data.evaluation[index].completions[1]) for index in range(2)]
    assert given == [" answer 8</s>", " answer 7</s>"]


@pytest.mark.parametrize("method", [DPOConfig(), ORPOConfig()], ids=lambda method: method.name)
def test_labelled_rows_are_refused_where_answers_are_compared(fit: Fit, method: MethodConfig) -> None:
    with pytest.raises(DataError, match=rf"read as kto\.trl.*{method.title} compares.*Write rl: kto"):
        fit(method, [single(0), single(1, label=False)])
    with pytest.raises(DataError, match="Write rl: kto"):
        fit(method, [pair(0)], tests=[single(0)])


def test_pairs_stay_pairs(fit: Fit) -> None:
    data = fit(DPOConfig(), [pair(0), pair(1)])
    assert data.audit.labels == {}
    assert [len(data.sample[index].completions) for index in range(2)] == [2, 2]


@pytest.mark.parametrize(("label", "missing"), [(True, "undesirable"), (False, "desirable")])
def test_labels_of_one_kind_are_an_error_unless_meant(fit: Fit, label: bool, missing: str) -> None:
    rows = [single(0, label), single(1, label)]
    with pytest.raises(DataError, match=f"none of the 2 completions to train on is {missing}.*field_label"):
        fit(KTOConfig(), rows)

    data = fit(KTOConfig(**{f"{missing}_weight": 0.0}), rows)

    assert data.audit.labels["train"] == ((2, 0) if label else (0, 2))


@pytest.mark.parametrize(
    ("weights", "advised"),
    [
        ({}, "3 times the weight.*kto_desirable_weight from 0.333 to 0.444"),
        ({"desirable_weight": 1 / 3}, None),
        ({"desirable_weight": 4 / 9}, None),
        ({"desirable_weight": 0.5}, "1.5 times the weight"),
        ({"desirable_weight": 0.3}, "0.9 times the weight"),
        ({"desirable_weight": 0.0}, None),
    ],
)
def test_the_papers_advice_on_weights(fit: Fit, weights: dict[str, float], advised: str | None) -> None:
    rows = [single(number, label=number > 0) for number in range(4)]

    notes = fit(KTOConfig(**weights), rows).audit.notes

    assert bool(notes) == (advised is not None)
    assert not advised or re.search(advised, notes[0])


def test_the_advice_is_for_the_papers_own_method(fit: Fit) -> None:
    rows = [single(number, label=number > 0) for number in range(4)]
    assert not fit(APOZeroUnpairedConfig(), rows).audit.notes


def test_rankings_have_no_labels() -> None:
    ranked: TokenizedDataset = from_groups([*random_groups(2), *random_groups(3, completions=3)])
    with pytest.raises(DataError, match="3 rows rank more than two completions"):
        unpair(ranked)


def test_one_prompt_is_an_error(fit: Fit) -> None:
    with pytest.raises(DataError, match="datasets: all 2 completions answer one prompt"):
        fit(KTOConfig(), [pair(0)])
    with pytest.raises(DataError, match="val_set_size: all 2 completions answer one prompt"):
        fit(KTOConfig(), [pair(0), pair(1)], tests=[pair(2)])


def test_streams(fit: Fit) -> None:
    singles, options = [single(n, label=n % 2) for n in range(4)], {"streaming": True, "max_steps": 2}
    with pytest.raises(ConfigError, match="streaming: kto gives each prompt the answer to another one"):
        fit(KTOConfig(), singles, **options)
    with pytest.raises(ConfigError, match="pairs are not taken apart for apo_zero_unpaired"):
        fit(APOZeroUnpairedConfig(), [pair(0), pair(1)], **options)
    with pytest.raises(DataError, match="Write rl: kto"):
        fit(DPOConfig(), singles, **options)

    data = fit(APOZeroUnpairedConfig(), singles, tests=[pair(7), pair(8)], **options)

    assert sorted(group.scores for group in data.train) == [(-1.0,), (1.0,)]
    assert data.evaluation is not None
    assert len(data.evaluation) == 4
