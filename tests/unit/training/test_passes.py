"""What one process's step is cut into: passes that hold what they are charged, and as many as elsewhere."""

import math

import pytest

from fiducial.config.methods import DPOConfig, KTOConfig, MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import NoReference
from fiducial.training import passes
from fiducial.training.objective import Objective
from fiducial.training.passes import cut_step, floating_point_ops
from tiny import random_groups, tiny_model


def objective(method: MethodConfig) -> Objective:
    return Objective(Scorer(tiny_model(), layout="packed"), NoReference(), build_loss(method))


def labelled(count: int) -> list[TokenizedGroup]:
    """(prompt, (completion, mismatched completion))."""
    return [TokenizedGroup(each.prompt, each.completions, (1.0, math.nan)) for each in random_groups(count)]


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_each_kind_of_pass_is_charged_what_it_holds(budget: int) -> None:
    groups = labelled(20)

    step = cut_step(groups, objective(KTOConfig()), budget)

    assert step.num_groups == 20
    for kind, made in enumerate((step.trained, step.ahead)):
        kept = sorted(group.keys for part in made for group in part)
        assert kept == sorted((group.keys[kind],) for group in groups)
        assert all(len(part) == 1 or sum(group.num_tokens for group in part) <= budget for part in made)


def test_the_mismatched_completion_takes_no_room_in_a_gradient_pass() -> None:
    groups = labelled(20)
    alone = sum(len(group.prompt) + len(group.completions[0]) for group in groups)

    assert sum(group.num_tokens for group in groups) > alone
    assert len(cut_step(groups, objective(KTOConfig()), alone).trained) == 1
    assert len(cut_step(groups, objective(KTOConfig()), alone - 1).trained) == 2


def test_pairs_have_nothing_scored_before() -> None:
    step = cut_step(random_groups(4), objective(DPOConfig()), 10**6)

    assert [len(part) for part in step.trained] == [4]
    assert step.ahead == []


def test_every_process_makes_as_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "gather_numbers", lambda own, device: [own, [7, 5, 3]])

    step = cut_step(labelled(2), objective(KTOConfig()), 10**6)

    assert [len(part) for part in step.trained] == [1, 1, 0, 0, 0]
    assert [len(part) for part in step.ahead] == [1, 1, 0]
    assert step.num_groups == 9


def test_the_passes_that_another_process_needs_are_even_here(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = random_groups(24)
    whole = sum(group.num_tokens for group in groups)
    monkeypatch.setattr(passes, "gather_numbers", lambda own, device: [own, [24, 3, 0]])

    step = cut_step(groups, objective(DPOConfig()), whole)

    tokens = [sum(group.num_tokens for group in part) for part in step.trained]
    assert max(tokens) < 1.1 * whole / 3, "the others would wait for a whole step in the first pass"


def test_a_process_without_groups_makes_a_pass_all_the_same() -> None:
    assert cut_step([], objective(DPOConfig()), 10**6).trained == [[]]


def test_the_costliest_pass() -> None:
    groups, kto = labelled(6), objective(KTOConfig())
    longest = max(len(group.prompt) + len(each) for group in groups for each in group.completions)

    assert cut_step(groups, kto, 1).costliest("packed") == (longest, True)
    assert cut_step(groups, kto, 10**6).costliest("packed")[1] is False


def test_operations_are_those_of_what_is_scored() -> None:
    groups, kto = labelled(3), objective(KTOConfig())
    weights = sum(parameter.numel() for parameter in kto.scorer.model.parameters())
    trained, ahead = (
        sum(len(group.prompt) + len(group.completions[kind]) for group in groups) for kind in (0, 1)
    )

    assert floating_point_ops(groups, kto) == weights * (6 * trained + 2 * ahead)
    kto.scorer.model.requires_grad_(False)
    assert floating_point_ops(groups, kto) == weights * (4 * trained + 2 * ahead)
