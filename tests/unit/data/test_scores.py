"""Scores stay with their completions: in flat arrays, selections, joined datasets, and on disk."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest

from fiducial.data.audit import DatasetAudit
from fiducial.data.dataset import TokenizedDataset, concatenate, from_groups
from fiducial.data.store import PreparedStore
from fiducial.data.tokenize import TokenizedGroup

NAN = math.nan


def group(number: int, *scores: float, completions: int | None = None) -> TokenizedGroup:
    """Tokens say whose they are: prompt `number`, completions number + 100, number + 200, …"""
    count = len(scores) if completions is None else completions
    pieces = [np.full(2 + number % 3, number + 100 * piece, np.int32) for piece in range(count + 1)]
    return TokenizedGroup(pieces[0], tuple(pieces[1:]), scores)


UNEVEN = [group(0, 1.0), group(1, 0.5, -2.0, 3.0), group(2, -1.0), group(3, 9.0, 8.0), group(4, 1.0, NAN)]


def contents(dataset: TokenizedDataset) -> list[tuple[int, tuple[int, ...], str]]:
    """Prompt, completions and scores of each item; NaN equals itself as text."""
    items = [dataset[index] for index in range(len(dataset))]
    return [
        (int(item.prompt[0]), tuple(int(each[0]) for each in item.completions), str(item.scores))
        for item in items
    ]


def expected(groups: list[TokenizedGroup]) -> list[tuple[int, tuple[int, ...], str]]:
    return [
        (int(each.prompt[0]), tuple(int(ids[0]) for ids in each.completions), str(each.scores))
        for each in groups
    ]


def test_groups_of_any_size_keep_their_scores() -> None:
    dataset = from_groups(UNEVEN)

    assert contents(dataset) == expected(UNEVEN)
    assert dataset.scores is not None
    assert len(dataset.scores) == sum(len(each.completions) for each in UNEVEN)


@pytest.mark.parametrize("order", [[4, 0, 3], [3, 3, 1], [2], [1, 4, 3, 2, 0]], ids=str)
def test_a_selection_keeps_them(order: list[int]) -> None:
    chosen = from_groups(UNEVEN).select(order)

    assert contents(chosen) == expected([UNEVEN[index] for index in order])
    assert contents(chosen.select([0])) == expected([UNEVEN[order[0]]])


def test_without_scores_there_is_no_array() -> None:
    bare = from_groups([group(0, completions=2), group(1, completions=1)])

    assert bare.scores is None
    assert [bare[index].scores for index in range(2)] == [(), ()]


def test_a_group_without_scores_among_others_has_none() -> None:
    dataset = from_groups([UNEVEN[1], group(5, completions=3), UNEVEN[0]])

    assert [str(dataset[index].scores) for index in range(3)] == ["(0.5, -2.0, 3.0)", "()", "(1.0,)"]


@pytest.mark.parametrize("bare_first", [True, False])
def test_joined_datasets_keep_them(bare_first: bool) -> None:
    bare, scored = [group(7, completions=2), group(8, completions=1)], [UNEVEN[3], UNEVEN[1]]
    parts = [from_groups(bare), from_groups(UNEVEN).select([3, 1])]
    groups = [bare, scored]
    if not bare_first:
        parts, groups = parts[::-1], groups[::-1]

    joined = concatenate(parts)

    assert contents(joined) == expected(groups[0] + groups[1])
    assert contents(joined.select([3, 0])) == expected([(groups[0] + groups[1])[index] for index in (3, 0)])


def test_joined_datasets_without_scores_have_none() -> None:
    bare = from_groups([group(7, completions=2)])
    assert concatenate([bare, bare]).scores is None
    assert concatenate([]).scores is None


def test_dataloader_workers_see_them() -> None:
    assert contents(pickle.loads(pickle.dumps(from_groups(UNEVEN)))) == expected(UNEVEN)


@pytest.mark.parametrize("groups", [UNEVEN, [group(0, completions=2)]], ids=["scored", "bare"])
def test_they_are_stored_where_there_are_any(tmp_path: Path, groups: list[TokenizedGroup]) -> None:
    dataset, audit = from_groups(groups), DatasetAudit("rows", "kto.trl", kept=len(groups))
    store = PreparedStore(tmp_path)
    store.put("key", dataset, audit)

    found = store.get("key")

    assert found is not None
    assert contents(found[0]) == expected(groups)
    assert (found[0].scores is None) == (dataset.scores is None)
    assert found[1] == audit
    with np.load(tmp_path / "key.npz") as stored:
        assert ("scores" in stored.files) == (dataset.scores is not None)


def test_a_stored_selection_keeps_its_order(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path)
    store.put("key", from_groups(UNEVEN).select([3, 0]), DatasetAudit("rows", "kto.trl"))

    found = store.get("key")

    assert found is not None
    assert contents(found[0]) == expected([UNEVEN[3], UNEVEN[0]])
