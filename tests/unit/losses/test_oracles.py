"""Each loss against its naive twin in float64, in value and gradient."""

import pytest
import torch
from torch import Tensor

from comparing import comparison, step_facts
from fiducial.config.methods import MethodConfig
from fiducial.logps import SequenceLogps
from fiducial.losses import build_loss
from pair_oracles import Naive
from pair_twins import PAIR_TWINS

PAIRS = 7


each_twin = pytest.mark.parametrize(
    ("method", "naive"), PAIR_TWINS, ids=[method.title for method, _ in PAIR_TWINS]
)


def random_logps() -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference sums, and token counts, of both completions of `PAIRS` pairs."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 9, (2 * PAIRS,), generator=generator)
    policy, reference = -(0.1 + 2 * torch.rand(2, 2 * PAIRS, generator=generator, dtype=torch.float64))
    return (policy * tokens).requires_grad_(), reference * tokens, tokens


def value_and_gradient(loss: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their weighted sum, so that no two pairs can trade places."""
    weights = torch.arange(1.0, PAIRS + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), policy)
    return loss.detach(), gradient


def ours(method: MethodConfig, policy: Tensor, reference: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    expected = SequenceLogps(reference, tokens) if method.needs_reference else None
    given = comparison(SequenceLogps(policy, tokens), expected)
    loss = build_loss(method)
    return value_and_gradient(loss(given, **step_facts(loss, given)).loss, policy)


@each_twin
def test_equals_its_naive_twin(method: MethodConfig, naive: Naive) -> None:
    policy, reference, tokens = random_logps()

    loss, gradient = ours(method, policy, reference, tokens)

    naive_loss, naive_gradient = value_and_gradient(naive(policy, reference, tokens), policy)
    torch.testing.assert_close(loss, naive_loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, naive_gradient, rtol=1e-11, atol=1e-11)


@each_twin
def test_swapped_pairs_do_not_pass(method: MethodConfig, naive: Naive) -> None:
    policy, reference, tokens = random_logps()
    swapped = torch.arange(2 * PAIRS).view(-1, 2).flip(1).flatten()

    loss, gradient = ours(method, policy, reference, tokens)

    wrong, wrong_gradient = value_and_gradient(
        naive(policy[swapped], reference[swapped], tokens[swapped]), policy
    )
    assert (loss - wrong).abs().max() > 0.1
    assert (gradient - wrong_gradient).abs().max() > 0.01
