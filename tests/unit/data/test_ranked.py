"""Rows that rank several completions, and pairs with scores: what is read, what a method accepts of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.methods import DPOConfig, MethodConfig, ODPOConfig
from fiducial.config.methods.lists import InfoNCAConfig, PlackettLuceConfig, TPOConfig
from fiducial.config.schema import DatasetConfig
from fiducial.data.example import OddRow, Reason
from fiducial.data.formats import FORMATS, choose_format
from fiducial.data.formats.fields import Fields
from fiducial.data.formats.labels import read_scores
from fiducial.data.formats.shape import look_at
from fiducial.data.groups import require_groups
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.errors import ConfigError, DataError

Load = Callable[..., PreparedData]
THREE = ["good", "fair", "poor"]
FIELDS = Fields({"prompt": "prompt", "completions": "completions", "scores": "scores"})


@pytest.fixture
def load(
    byte_tokenizer: PreTrainedTokenizerFast, write: Callable[..., Path], run_config: Callable[..., Any]
) -> Load:
    def read(rows: list[dict[str, Any]], **options: Any) -> PreparedData:
        return load_groups(run_config({"path": str(write(rows)), **options}), byte_tokenizer)

    return read


def texts(data: PreparedData, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [tokenizer.decode(ids).removesuffix("</s>") for ids in data.train[0].completions]


def test_scores_sort_and_travel_with_their_completions(
    load: Load, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = load([{"prompt": "?", "completions": THREE, "ratings": [2, 9.5, -1]}])

    assert texts(data, byte_tokenizer) == ["fair", "good", "poor"]
    assert data.train[0].scores == (9.5, 2.0, -1.0)


def test_equal_scores_keep_the_lists_order_and_repeats_count_once(
    load: Load, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = load([{"prompt": "?", "completions": ["poor", "good", "fair", "poor"], "scores": [1, 3, 3, 2]}])

    assert texts(data, byte_tokenizer) == ["good", "fair", "poor"]
    assert data.train[0].scores == (3.0, 3.0, 2.0)


def test_without_scores_the_list_is_the_ranking(load: Load, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    data = load([{"prompt": "?", "completions": THREE}])

    assert texts(data, byte_tokenizer) == THREE
    assert data.train[0].scores == ()


@pytest.mark.parametrize(
    "completions",
    [
        [{"role": "assistant", "content": text} for text in THREE],
        [[{"role": "assistant", "content": text}] for text in THREE],
    ],
    ids=["messages", "conversations"],
)
def test_completions_may_be_messages(
    completions: list[Any], load: Load, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = load([{"prompt": [{"role": "user", "content": "?"}], "completions": completions}])

    assert data.audit.datasets[0].format == "ranked.default"
    assert [text.removesuffix("<|im_end|>") for text in texts(data, byte_tokenizer)] == THREE


def test_best_and_worst_carry_their_scores(load: Load, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "?", "completions": THREE, "scores": [2, 9, -1]}
    data = load([row], type="ranked.best_and_worst")

    assert texts(data, byte_tokenizer) == ["fair", "poor"]
    assert data.train[0].scores == (9.0, -1.0)


def test_labelled_steps_of_one_answer_are_no_ranking() -> None:
    row = {"prompt": "2+2", "completions": ["first", "then"], "labels": [True, False]}
    config = DatasetConfig(path="somewhere")

    with pytest.raises(DataError, match="none of the formats"):
        choose_format(config, look_at([row], list(row), config), where="datasets.0")


@pytest.mark.parametrize(
    ("completions", "scores", "reason"),
    [
        (["one"], [1], Reason.MISSING),
        (None, [1], Reason.MISSING),
        (["same", "same"], [1, 2], Reason.EQUAL),
        (["one", "two"], [1], Reason.SCORE),
        (["one", "two"], None, Reason.SCORE),
        (["one", "two"], [1, None], Reason.SCORE),
        (["one", "two"], [1, float("nan")], Reason.SCORE),
        (["one", "two"], [1, "inf"], Reason.SCORE),
        (["one", " "], [2, 1], Reason.EMPTY_COMPLETION),
        (["one", 2], [2, 1], Reason.NOT_TEXT),
    ],
)
def test_rows_that_are_no_ranking(completions: object, scores: object, reason: Reason) -> None:
    row = {"prompt": "?", "completions": completions, "scores": scores}
    with pytest.raises(OddRow) as caught:
        FORMATS["ranked.default"].read(row, FIELDS)
    assert caught.value.reason is reason


PAIR = {"prompt": "?", "chosen": "good", "rejected": "poor", "score_w": 8, "score_l": 3.5}
SCORED = {"field_chosen_score": "score_w", "field_rejected_score": "score_l"}


def test_a_pairs_scores_are_read_where_the_yaml_names_them(load: Load) -> None:
    assert load([PAIR]).train[0].scores == ()
    assert load([PAIR], **SCORED).train[0].scores == (8.0, 3.5)


def test_a_pair_whose_scores_contradict_it_is_dropped_and_counted(load: Load) -> None:
    data = load([PAIR, {**PAIR, "score_l": 8}], **SCORED)

    assert len(data.train) == 1
    assert Reason.ORDER in " ".join(data.audit.datasets[0].reasons())


def test_no_score_is_made_up() -> None:
    fields = Fields({"chosen_score": "w", "rejected_score": "l"})
    for row in ({"w": None, "l": 1}, {"w": "high", "l": 1}):
        with pytest.raises(OddRow) as caught:
            read_scores(row, fields)
        assert caught.value.reason is Reason.SCORE


def test_scores_come_as_two_columns(load: Load) -> None:
    with pytest.raises(ConfigError, match="go together"):
        load([PAIR], field_chosen_score="score_w")
    with pytest.raises(DataError, match="field_rejected_score"):
        load([PAIR], **{**SCORED, "field_rejected_score": "no such"})
    with pytest.raises(ConfigError, match="field_scores: has no effect"):
        load([PAIR], field_scores="score_w")


@pytest.mark.parametrize(
    ("method", "completions", "says"),
    [
        (DPOConfig(), THREE, r"1 of 1 rows have 3 completions.*rl: dpo.*ranked\.best_and_worst"),
        (TPOConfig(), THREE[:2], r"have 2 completions, and rl: tpo compares 3.*type: ranked"),
        (InfoNCAConfig(), THREE, "rl: info_nca reads how good.*field_scores"),
        (DPOConfig(), THREE[:2], None),
        (TPOConfig(), THREE, None),
        (PlackettLuceConfig(), THREE, None),
        (PlackettLuceConfig(), THREE[:2], None),
    ],
)
def test_a_method_says_what_it_can_compare(
    method: MethodConfig, completions: list[str], says: str | None, load: Load
) -> None:
    data = load([{"prompt": "?", "completions": completions}])
    if says is None:
        require_groups(data, method)
        return
    with pytest.raises(DataError, match=says):
        require_groups(data, method)


def test_what_is_evaluated_must_be_comparable_too(load: Load) -> None:
    lists, pairs = (load([{"prompt": "?", "completions": THREE[:count]}]) for count in (3, 2))
    require_groups(replace(pairs, evaluation=pairs.sample), DPOConfig())
    with pytest.raises(DataError, match="1 of 1 rows have 3 completions"):
        require_groups(replace(pairs, evaluation=lists.sample), DPOConfig())


def test_scores_for_all_rows_satisfy_a_method_that_reads_them(load: Load) -> None:
    data = load([{"prompt": "?", "completions": THREE, "scores": [3, 2, 1]}])
    require_groups(data, InfoNCAConfig())
    assert data.train.scores is not None
    assert np.isfinite(data.train.scores).all()


def test_the_logarithm_of_a_difference_needs_one(load: Load) -> None:
    tie, pair = {"prompt": "?", "completions": THREE, "scores": [2, 2, 2]}, {"prompt": "!"}
    pair |= {"completions": THREE, "scores": [3, 2, 1]}
    data = load([tie, pair], type="ranked.best_and_worst")
    require_groups(data, ODPOConfig(offset_scale="identity"))
    with pytest.raises(DataError, match=r"1 of 2 pairs have equal scores.*odpo_offset: identity"):
        require_groups(data, ODPOConfig())
    require_groups(load([pair], type="ranked.best_and_worst"), ODPOConfig())
