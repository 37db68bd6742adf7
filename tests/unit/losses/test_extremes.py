"""Every loss far out, from token log-probs as a head gives them, against its naive twin in float64.

Log-ratios of ±1e4, completions of one token and of 8192, float32 and bfloat16: values and gradients are those
of the twin; where the twin itself overflows they are finite and point the right way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice

import pytest
import torch
from torch import Tensor

import oracles
from comparing import comparison, step_facts
from fiducial.config import methods
from fiducial.config.methods import METHODS, MethodConfig
from fiducial.logps import KL, Comparison, SequenceLogps, TokenLogps
from fiducial.losses import build_loss
from list_twins import LIST_TWINS, Ranked
from pair_oracles import Naive
from pair_twins import PAIR_TWINS

RATIOS = [5e3, -5e3, -5.1e3, 5.1e3, -1e4, -9.9e3, 1e4, 9.9e3, 9.7e3, -60.0, 50.0, -9.8e3]
"""Of chosen and rejected in turn: right by 1e4, wrong by 1e4, both fallen, both risen, one far out."""
LENGTHS = [(1, 1), (1, 8192), (8192, 1), (8192, 8192)]
ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 8e-3}
"""A float32 sum of 1e4 is rounded by 1e-3, and a bfloat16 gradient by 4e-3 of itself."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a twin reads: one number a completion."""

    policy: Tensor
    reference: Tensor
    tokens: Tensor
    scores: Tensor
    kl: Tensor


@dataclass(frozen=True, slots=True)
class Case:
    method: MethodConfig
    twin: Callable[[Given], Tensor]
    size: int = 2
    """Completions a group."""


def listed(naive: Ranked, size: int) -> Callable[[Given], Tensor]:
    def twin(given: Given) -> Tensor:
        parts = (given.policy, given.reference, given.scores, given.tokens)
        groups = zip(*(values.split(size) for values in parts), strict=True)
        return torch.stack([naive(*group) for group in groups])

    return twin


def kto(given: Given) -> Tensor:
    return oracles.kto(given.policy, given.reference, given.scores > 0, torch.tensor([0.0]), beta=0.3)


def tdpo(weight: float, *, frozen: bool) -> Callable[[Given], Tensor]:
    def twin(given: Given) -> Tensor:
        ratio, kl = given.policy - given.reference, given.kl
        chosen_kl = kl[0::2].detach() if frozen else kl[0::2]
        return -oracles.log_sigmoid(0.3 * (ratio[0::2] - ratio[1::2] - weight * (kl[1::2] - chosen_kl)))

    return twin


def paired(naive: Naive) -> Callable[[Given], Tensor]:
    return lambda given: naive(given.policy, given.reference, given.tokens)


CASES = [
    *(Case(method, paired(naive)) for method, naive in PAIR_TWINS),
    *(Case(method, listed(naive, max(sizes)), max(sizes)) for method, naive, sizes in LIST_TWINS),
    Case(methods.KTOConfig(beta=0.3), kto, 1),
    Case(methods.APOZeroUnpairedConfig(beta=0.3), kto, 1),
    Case(methods.TDPO1Config(beta=0.3), tdpo(1.0, frozen=False)),
    Case(methods.TDPO2Config(beta=0.3, divergence_weight=0.7), tdpo(0.7, frozen=True)),
]


def overflows(method: MethodConfig) -> bool:
    """Whether the formula is an exponential of the log-probs themselves, which float64 does not hold."""
    settings = method.hyperparameters
    other_divergence = settings.get("f_divergence_type") in (
        "forward_kl",
        "js_divergence",
        "alpha_divergence",
    )
    return bool(settings.get("reward_alpha")) or other_divergence


def scored(totals: Tensor, lengths: Tensor, dtype: torch.dtype) -> tuple[Tensor, TokenLogps]:
    """Token log-probs that add up to `totals`, as a leaf and as what the head gives."""
    values = (totals / lengths).repeat_interleave(lengths).to(dtype).requires_grad_()
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    return values, TokenLogps(values, sequence, len(lengths))


def summed(values: Tensor, like: TokenLogps) -> tuple[Tensor, Tensor]:
    """The same tokens as a float64 leaf, and their sums."""
    leaf = values.detach().double().requires_grad_()
    return leaf, torch.zeros(like.num_sequences, dtype=torch.float64).index_add(0, like.sequence, leaf)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(loss) + 1).to(loss)
    return torch.autograd.grad((loss * weights).sum(), leaf)[0].double()


def inputs(
    case: Case, lengths: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Comparison, Given, Tensor]:
    """Token log-probs and what a loss reads of them; the same numbers for the twin, and its leaf."""
    count = len(RATIOS)
    tokens = torch.tensor([*islice(cycle(lengths), count)])
    start = -1.1e4 - 101.0 * (torch.arange(count, dtype=torch.float64) // 2)
    values, policy = scored(start + torch.tensor(RATIOS, dtype=torch.float64), tokens, dtype)
    before, reference = scored(start, tokens, dtype)
    steps = [1.0, -1.0] if case.size == 1 else [3.0, 1.0, 0.5, -1.0][: case.size]
    scores = [*islice(cycle(steps), count)]
    kl = torch.linspace(0.0, 1e4, count)
    sums = SequenceLogps(policy.reduce().sum, tokens, {KL: kl})
    expected = reference.reduce() if case.method.needs_reference else None
    given = comparison(sums, expected, size=case.size, scores=scores)
    leaf, totals = summed(values, policy)
    starts = summed(before, reference)[1].detach()
    return values, given, Given(totals, starts, tokens, torch.tensor(scores).double(), kl.double()), leaf


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.method.title)
def test_equals_its_twin(case: Case, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    values, given, numbers, leaf = inputs(case, lengths, dtype)
    loss, rounding = build_loss(case.method), ROUNDING[dtype]
    known = step_facts(loss, given) | ({"point": torch.tensor(0.0)} if case.method.mismatched else {})

    ours = loss(given, **known).loss

    our_gradient = gradient(ours, values)
    assert ours.isfinite().all()
    assert our_gradient.isfinite().all()
    twin = case.twin(numbers)
    twin_gradient = gradient(twin, leaf)
    if overflows(case.method):
        chosen = torch.arange(len(RATIOS)).repeat_interleave(numbers.tokens) % case.size == 0
        assert (our_gradient[chosen] <= 0).all()
        assert (our_gradient[~chosen] >= 0).all()
        return
    torch.testing.assert_close(ours.double(), twin, rtol=rounding, atol=1e-5)
    torch.testing.assert_close(our_gradient, twin_gradient, rtol=rounding, atol=1e-6)


def test_every_loss_is_tried() -> None:
    assert {type(case.method) for case in CASES} - {methods.MixtureConfig} == set(METHODS)
