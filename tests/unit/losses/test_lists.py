"""Losses of rankings and scores, and WPO's weights, against float64 twins written out row by row."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError
from fiducial.logps import ON_POLICY, Comparison, Completions, SequenceLogps
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import NoReference
from fiducial.training.objective import Objective
from list_twins import LIST_TWINS
from tiny import random_groups, tiny_model
from training_harness import StoredReference

each_twin = pytest.mark.parametrize(
    ("method", "naive", "sizes"), LIST_TWINS, ids=[t[1].__name__ for t in LIST_TWINS]
)


def drawn(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = sum(sizes)
    policy, reference = -1 - 9 * torch.rand(2, count, generator=generator, dtype=torch.float64)
    tokens = torch.randint(1, 9, (count,), generator=generator)
    scores = torch.cat([3 * torch.rand(n, generator=generator).sort(descending=True)[0] for n in sizes])
    return policy.requires_grad_(), reference, scores, tokens


def comparison(
    policy: Tensor, reference: Tensor | None, scores: Tensor, tokens: Tensor, sizes: list[int]
) -> Comparison:
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    expected = None if reference is None else SequenceLogps(reference, tokens)
    return Comparison(SequenceLogps(policy, tokens), expected, Completions.of(group, scores))


def row_by_row(naive: Callable[..., Tensor], *given: Tensor, sizes: list[int]) -> Tensor:
    edges = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    return torch.stack([naive(*(values[a:b].double() for values in given)) for a, b in pairwise(edges)])


def gradient(loss: Tensor, policy: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(loss) + 1, dtype=torch.float64)
    return torch.autograd.grad((loss * weights).sum(), policy)[0]


@each_twin
def test_equals_its_naive_twin(method: MethodConfig, naive: Callable[..., Tensor], sizes: list[int]) -> None:
    given = drawn(sizes)

    loss = build_loss(method)(comparison(*given, sizes)).loss

    expected = row_by_row(naive, *given, sizes=sizes)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient(loss, given[0]), gradient(expected, given[0]), rtol=1e-6, atol=1e-9)


@each_twin
def test_a_reversed_ranking_does_not_pass(
    method: MethodConfig, naive: Callable[..., Tensor], sizes: list[int]
) -> None:
    policy, reference, scores, tokens = drawn(sizes)

    loss = build_loss(method)(comparison(policy, reference, scores, tokens, sizes)).loss

    turned = torch.cat([part.flip(0) for part in torch.arange(len(policy)).split(sizes)])
    wrong = row_by_row(naive, policy[turned], reference[turned], scores, tokens[turned], sizes=sizes)
    assert (loss - wrong).abs().max() > 0.1


def worked(method: MethodConfig, policy: list[float], scores: list[float]) -> float:
    count = len(policy)
    zero = torch.zeros(count) if method.needs_reference else None
    tokens = torch.full((count,), 2)
    given = comparison(torch.tensor(policy), zero, torch.tensor(scores), tokens, [count])
    return build_loss(method)(given).loss.item()


def logistic(value: float) -> float:
    return math.log1p(math.exp(-value))


def test_worked_values() -> None:  # test_values.py counts on each of these
    shares = math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)
    cases = [
        (methods.PlackettLuceConfig(beta=0.5), [2.0, 0.0], [0.0, 0.0], logistic(1.0)),
        (methods.PlackettLuceConfig(beta=1.0), [0.0, 0.0, 0.0], [0.0] * 3, math.log(3) + math.log(2)),
        (
            methods.InfoNCAConfig(beta=0.5),
            [2.0, 0.0],
            [2.0, 0.0],
            logistic(1) * shares[0] + logistic(-1) * shares[1],
        ),
        (methods.NCAConfig(beta=1.0), [0.0, 0.0], [2.0, 0.0], 2 * math.log(2)),
        (methods.TPOConfig(beta=0.5, gold_weight=0.1), [-4.0, 2.0, 0.0], [0.0] * 3, logistic(1.0) + 0.2),
        (
            methods.TPOLConfig(beta=0.5, target_margin=0.3, gold_weight=0.1),
            [-4.0, 2.0, 0.0],
            [0.0] * 3,
            logistic(0.5 - 0.3) + 0.2,
        ),
        (methods.ODPOConfig(beta=0.5, offset_weight=1), [2.0, 0.0], [math.e, 0.0], logistic(0.0)),
        (methods.ODPOConfig(beta=0.5, offset_scale="identity"), [2.0, 0.0], [3.0, 1.0], logistic(-1.0)),
    ]
    for method, policy, scores, value in cases:
        assert worked(method, policy, scores) == pytest.approx(value, rel=1e-6), method


def test_plackett_luce_of_pairs_is_dpo() -> None:
    policy, reference, scores, tokens = drawn([2, 2, 2])
    given = comparison(policy, reference, scores, tokens, [2, 2, 2])

    ranked = build_loss(methods.PlackettLuceConfig(beta=0.3))(given)

    paired = build_loss(methods.DPOConfig(beta=0.3))(given)
    torch.testing.assert_close(ranked.loss, paired.loss)
    assert ranked.metrics.keys() == paired.metrics.keys()
    for name, values in paired.metrics.items():
        torch.testing.assert_close(ranked.metrics[name], values)


def test_nca_of_far_scores_is_nca_pair() -> None:
    policy, reference, _, tokens = drawn([2, 2])
    given = comparison(policy, reference, torch.tensor([100.0, 0.0, 100.0, 0.0]), tokens, [2, 2])

    listed, paired = (build_loss(m(beta=0.3))(given) for m in (methods.NCAConfig, methods.NCAPairConfig))

    torch.testing.assert_close(listed.loss, paired.loss)


@each_twin
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_stays_finite_at_the_extremes(
    method: MethodConfig, naive: Callable[..., Tensor], sizes: list[int], far: float
) -> None:
    *numbers, tokens = drawn(sizes)
    policy, reference, scores = (values.detach().float() for values in numbers)
    policy[0] += far
    policy.requires_grad_()

    output = build_loss(method)(comparison(policy, reference, scores, tokens, sizes))

    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()


def test_nothing_to_compare_is_an_empty_result() -> None:
    for method, *_ in LIST_TWINS:
        given = comparison(*(values[:0] for values in drawn([2])), [])
        assert build_loss(method)(given).loss.shape == (0,)


PAIRS = methods.MixtureConfig(losses=(methods.DPOConfig(), methods.SFTConfig()), weights=(1.0, 1.0))


@pytest.mark.parametrize("method", [methods.SimPOConfig(), PAIRS], ids=lambda method: method.name)
def test_a_group_of_another_size_is_an_error(method: MethodConfig) -> None:
    scorer = Scorer(tiny_model(), layout="packed")
    objective = Objective(scorer, NoReference(), build_loss(method))
    objective.compare(random_groups(2))
    with pytest.raises(DataError, match="a row has 3 completions, and the loss compares 2"):
        objective.compare(random_groups(2, completions=3))


def test_equal_scores_of_a_streamed_row_are_an_error_where_their_difference_needs_a_logarithm() -> None:
    scorer, [pair] = Scorer(tiny_model(), layout="packed"), random_groups(1)
    objectives = [
        Objective(scorer, StoredReference(scorer, [pair]), build_loss(methods.ODPOConfig(offset_scale=scale)))
        for scale in ("log", "identity")
    ]
    better, equal = (TokenizedGroup(pair.prompt, pair.completions, (2.0, worse)) for worse in (1.0, 2.0))
    for objective in objectives:
        objective.compare([better])
    objectives[1].compare([equal])
    with pytest.raises(DataError, match=r"scores its two completions equally.*odpo_offset: identity"):
        objectives[0].compare([equal])


def test_metrics_compare_the_best_with_the_others_that_are_there() -> None:
    ratios, sizes = torch.tensor([4.0, 2.0, 6.0, 6.0, 2.0]), [3, 2]
    given = comparison(ratios, torch.zeros(5), torch.zeros(5), torch.full((5,), 2), sizes)

    metrics = build_loss(methods.PlackettLuceConfig(beta=0.5))(given).metrics

    assert metrics["rewards/chosen"].tolist() == [2, 3]
    assert metrics["rewards/rejected"].tolist() == [2, 1]
    assert metrics["rewards/margins"].tolist() == [0, 2]
    assert metrics["rewards/accuracies"].tolist() == [0.5, 1]


def test_wpo_weighs_each_pair_without_gradient() -> None:
    policy, reference, scores, tokens = drawn([2, 2, 2])
    on_policy = torch.linspace(-3, 1, 6, dtype=torch.float64, requires_grad=True)
    given = comparison(policy, reference, scores, tokens, [2, 2, 2])
    weighted = Comparison(
        SequenceLogps(policy, tokens, {ON_POLICY: on_policy}), given.reference, given.completions
    )
    method = methods.DPOConfig(beta=0.3, use_weighting=True)

    loss = build_loss(method)

    assert loss.statistics == (ON_POLICY,)
    assert build_loss(methods.DPOConfig(beta=0.3)).statistics == ()
    plain = build_loss(methods.DPOConfig(beta=0.3))(given).loss
    weights = (on_policy / tokens).exp().detach()
    found = loss(weighted).loss
    torch.testing.assert_close(found, plain * weights[0::2] * weights[1::2])
    assert (found - plain).abs().max() > 0.01
    assert torch.autograd.grad(found.sum(), on_policy, allow_unused=True)[0] is None
