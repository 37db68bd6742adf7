"""The derangement: fixed by content, equal prompts kept apart as far as any permutation can."""

from itertools import permutations

import numpy as np
import pytest

from fiducial.data.dataset import TokenizedDataset, from_groups
from fiducial.data.mismatch import add_mismatched, derange
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError


def item(prompt: int, completion: int, *, length: int = 3, desirable: bool = True) -> TokenizedGroup:
    return TokenizedGroup(
        np.array([prompt, 7], np.int32),
        (np.full(length, completion, np.int32),),
        (1.0 if desirable else -1.0,),
    )


def items(prompts: list[int], *, first: int = 100) -> TokenizedDataset:
    return from_groups(item(first * prompt, first + number) for number, prompt in enumerate(prompts))


def meetings(prompts: list[int], partners: list[int]) -> int:
    """How many items are given the completion of an item with their own prompt."""
    return sum(prompts[index] == prompts[partner] for index, partner in enumerate(partners))


ALL_APART = [list(range(9)), [1, 1, 2, 2], [1, 1, 1, 2, 3, 4], [1, 2, 1, 2, 3, 3, 1], [5, 6]]
CROWDED = [[1, 1, 1, 2], [1, 1, 1, 1, 2, 3], [2, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("first", range(100, 600, 100))
@pytest.mark.parametrize("prompts", ALL_APART + CROWDED, ids=str)
def test_equal_prompts_meet_as_seldom_as_they_can(prompts: list[int], first: int) -> None:
    partners = derange(items(prompts, first=first), where="datasets").tolist()

    assert sorted(partners) == list(range(len(prompts))), "each completion is given to one item"
    assert all(index != partner for index, partner in enumerate(partners))
    fewest = (
        0
        if prompts == list(range(9))  # 9! permutations are not worth looking at
        else min(meetings(prompts, list(each)) for each in permutations(range(len(prompts))))
    )
    assert meetings(prompts, partners) == fewest
    assert (fewest == 0) == (prompts in ALL_APART)


def given(dataset: TokenizedDataset) -> dict[tuple[int, int], int]:
    """(prompt, completion) to the mismatched completion, by first token."""
    mismatched = add_mismatched(dataset, sequence_len=64, where="datasets")
    groups = [mismatched[index] for index in range(len(mismatched))]
    return {
        (int(group.prompt[0]), int(group.completions[0][0])): int(group.completions[1][0]) for group in groups
    }


def test_the_order_of_the_data_changes_nothing() -> None:
    dataset = items([1, 2, 2, 3, 4, 5, 5, 6])
    shuffled = dataset.select([6, 0, 3, 7, 2, 5, 4, 1])  # equal prompts change places, too

    assert given(dataset) == given(shuffled)


def test_appended_items_change_few_of_the_others() -> None:
    prompts = list(range(1, 40))
    before, after = given(items(prompts)), given(items([*prompts, 40, 41]))

    assert sum(after[key] != mismatched for key, mismatched in before.items()) <= 2


def test_items_keep_their_place_and_label() -> None:
    dataset = from_groups([item(1, 101), item(2, 102, desirable=False), item(3, 103)])

    mismatched = add_mismatched(dataset, sequence_len=64, where="datasets")

    for index in range(3):
        before, after = dataset[index], mismatched[index]
        assert np.array_equal(after.prompt, before.prompt)
        assert np.array_equal(after.completions[0], before.completions[0])
        assert after.scores[0] == before.scores[0]
        assert np.isnan(after.scores[1])
        assert len(after.completions) == 2


def test_mismatched_completions_are_cut_to_the_longest_sequence() -> None:
    long_prompt = TokenizedGroup(np.full(6, 1, np.int32), (np.full(2, 101, np.int32),), (1.0,))
    dataset = from_groups([long_prompt, item(2, 102, length=6)])

    mismatched = add_mismatched(dataset, sequence_len=9, where="datasets")

    assert [len(mismatched[index].completions[1]) for index in range(2)] == [3, 2]


def test_a_single_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="val_set_size: all 3 completions answer one prompt"):
        derange(items([4, 4, 4]), where="val_set_size")
