"""A step's gradient is the same for every loss, however the step is cut and shared by processes."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fiducial.config.methods.dpo import MODIFIERS
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Comparison, SequenceLogps
from fiducial.losses import LOSSES, Loss
from fiducial.training.objective import Objective
from launching import two_processes
from step_gradients import MADE_UP, MODIFIED, cut, gradient, groups_of_the_step, losses

SCRIPT = Path(__file__).parents[1] / "step_gradients.py"
ALL = losses()


def in_passes(loss: Loss, passes: int, *, name: str = "", **options: float) -> Tensor:
    return gradient(loss, cut(groups_of_the_step(name), passes), **options)


@cache
def in_one_pass(name: str) -> Tensor:
    return in_passes(ALL[name], 1, name=name)


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=2e-4, atol=2e-5 * second.abs().max().item())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("passes", [2, 9])  # a few groups each; one each, and one pass empty
def test_passes(name: str, passes: int) -> None:
    whole = in_one_pass(name)
    assert whole[:-2].abs().max() > 1e-3
    assert_same(in_passes(ALL[name], passes, name=name), whole)


def test_every_loss_and_every_modifier_is_cut() -> None:
    parts = [part for method in MODIFIED.values() for part in getattr(method, "losses", (method,))]
    assert set(ALL) >= {config.model_fields["name"].default for config in LOSSES} | MODIFIED.keys()
    assert {modifier for part in parts for modifier in MODIFIERS if getattr(part, modifier, None)} == set(
        MODIFIERS
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("two")
    two_processes(SCRIPT, str(folder))
    found: dict[str, Tensor] = torch.load(folder / "gradients.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_processes(together: dict[str, Tensor], name: str) -> None:
    assert_same(together[name], in_one_pass(name))


def test_a_loss_of_each_pass_alone_would_differ() -> None:
    known = MADE_UP["whole step"]
    by_pass = Loss(lambda comparison: known.function(comparison, scale=0.3), needs_reference=True)
    with pytest.raises(AssertionError):
        assert_same(in_passes(by_pass, 2), in_passes(by_pass, 1))


def test_dropout_draws_the_same_masks_in_both_looks_at_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    compare, policy = Objective.compare, Objective.policy

    def compared(objective: Objective, groups: list[TokenizedGroup]) -> Comparison:
        found = compare(objective, groups)
        seen.append(found.policy.sum.detach())
        return found

    def scored(objective: Objective, groups: list[TokenizedGroup]) -> SequenceLogps:
        found = policy(objective, groups)
        seen.append(found.sum.detach())
        return found

    monkeypatch.setattr(Objective, "compare", compared)
    monkeypatch.setattr(Objective, "policy", scored)
    in_passes(MADE_UP["whole step"], 2, dropout=0.5)
    looks, again = seen[:2], seen[2:]
    assert len(again) == 2
    assert all(torch.equal(first, second) for first, second in zip(looks, again, strict=True))

    seen.clear()
    in_passes(MADE_UP["whole step"], 2, dropout=0.0)
    assert not torch.equal(seen[0], looks[0])


def test_a_reference_point_of_each_pass_alone_would_differ() -> None:
    groups = groups_of_the_step("kto")
    whole = in_one_pass("kto")

    apart = sum(gradient(ALL["kto"], [part])[:-1] for part in cut(groups, 2))

    with pytest.raises(AssertionError):
        assert_same(apart, whole[:-1])
