"""The cut: every group once, within the budget, few passes."""

import numpy as np
import pytest

from fiducial.data.micro_batches import COSTS, Load, cut, largest, leveled
from fiducial.data.tokenize import TokenizedGroup
from tiny import random_groups


def group(prompt: int, *completions: int) -> TokenizedGroup:
    ids = np.arange(100, dtype=np.int32)
    return TokenizedGroup(ids[:prompt], tuple(ids[:length] for length in completions))


def identities(micro_batches: list[list[TokenizedGroup]]) -> list[int]:
    return sorted(id(group) for micro_batch in micro_batches for group in micro_batch)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 60, 200, 10**6])
def test_every_group_once_and_within_the_budget(layout: str, budget: int) -> None:
    groups = random_groups(40)
    cost = COSTS[layout]
    micro_batches = cut(groups, budget, cost=cost)
    assert identities(micro_batches) == identities([groups])
    for micro_batch in micro_batches:
        assert len(micro_batch) == 1 or cost(Load.of(micro_batch)) <= budget


def test_fewest_passes_where_first_come_first_served_needs_more() -> None:
    groups = [group(1, 2, 2), group(1, 5, 4), group(1, 2, 2), group(1, 5, 4)]  # 5, 10, 5, 10 tokens
    assert [len(part) for part in cut(groups, 10)] == [1, 1, 2]
    assert [[g.num_tokens for g in part] for part in cut(groups, 15)] == [[10, 5], [10, 5]]


def test_padded_cost_is_rows_times_longest() -> None:
    short, long = group(1, 1, 1), group(50, 10, 10)
    assert COSTS["padded"](Load.of([short, long])) == 4 * 60
    assert COSTS["packed"](Load.of([short, long])) == 3 + 70
    assert len(cut([short, long], 239, cost=COSTS["padded"])) == 2
    assert len(cut([short, long], 240, cost=COSTS["padded"])) == 1


def test_a_group_larger_than_the_budget_goes_alone() -> None:
    big, small = group(50, 10, 10), group(1, 1, 1)
    assert cut([small, big, small], 10) == [[big], [small, small]]


def test_the_cut_depends_on_nothing_but_its_arguments() -> None:
    groups = random_groups(30, seed=2)
    assert [identities([part]) for part in cut(groups, 90)] == [
        identities([part]) for part in cut(groups, 90)
    ]


def tokens(micro_batches: list[list[TokenizedGroup]]) -> list[int]:
    return [sum(group.num_tokens for group in part) for part in micro_batches]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 60, 200, 700])
def test_leveled_passes_hold_every_group_once_and_no_more_than_before(layout: str, budget: int) -> None:
    groups, cost = random_groups(40), COSTS[layout]
    before = cut(groups, budget, cost=cost)
    after = leveled(before, len(before), budget, cost=cost)
    assert identities(after) == identities([groups])
    assert largest(after, cost=cost) <= largest(before, cost=cost)
    assert sum(cost(Load.of(part)) for part in after) <= sum(cost(Load.of(part)) for part in before)


def test_a_full_pass_and_a_small_rest_become_two_halves() -> None:
    before = cut([group(2, 4, 4)] * 11, 100)
    assert tokens(before) == [100, 10]
    assert tokens(leveled(before, 2, 100)) == [60, 50]


def test_what_does_not_fit_evenly_stays() -> None:
    before = cut([group(0, length) for length in (9, 7, 6, 6, 6, 2)], 18)
    assert tokens(before) == [18, 18]
    assert leveled(before, 2, 17) == before


def test_beside_a_group_larger_than_the_budget_the_others_are_even() -> None:
    before = cut([group(0, length) for length in (90, 30, 30, 6)], 60)
    assert tokens(before) == [90, 60, 6]
    assert tokens(leveled(before, 3, 60)) == [90, 36, 30]


def test_short_rows_are_not_padded_to_long_ones() -> None:
    before = cut([group(1, 20, 20)] * 2 + [group(1, 1, 1)] * 20, 100, cost=COSTS["padded"])
    assert [len(part) for part in before] == [2, 20]
    assert leveled(before, 3, 100, cost=COSTS["padded"]) == [*before, []]


def test_fewer_groups_than_passes() -> None:
    assert tokens(leveled([[group(1, 1, 1), group(1, 5, 4)]], 4, 100)) == [10, 3, 0, 0]
    assert leveled([], 2, 100) == [[], []]


def test_nothing_to_cut() -> None:
    assert cut([], 10) == []
    assert largest([], cost=COSTS["packed"]) == 0


def test_largest_is_the_costliest_pass() -> None:
    assert largest([[group(1, 1, 1)], [group(1, 5, 4), group(1, 1, 1)]], cost=COSTS["packed"]) == 13
