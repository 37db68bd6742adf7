"""KTO and its kin: worked values, a naive twin in float64, extremes, and what the metrics count."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
from comparing import comparison
from fiducial.config.methods import APOZeroUnpairedConfig, KTOConfig
from fiducial.logps import Comparison, SequenceLogps
from fiducial.losses import build_loss
from fiducial.losses.kto import reference_point
from fiducial.losses.output import LossOutput

BOTH = pytest.mark.parametrize(
    "config", [KTOConfig, APOZeroUnpairedConfig], ids=lambda config: config.__name__
)


def singles(policy: Tensor, reference: Tensor, labels: list[bool]) -> Comparison:
    tokens = torch.arange(1, len(policy) + 1)
    scores = [1.0 if label else -1.0 for label in labels]
    return comparison(SequenceLogps(policy, tokens), SequenceLogps(reference, tokens), size=1, scores=scores)


def known(config: type, point: float, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {"point": torch.tensor(point, dtype=dtype)} if config is KTOConfig else {}


def worked(method: KTOConfig | APOZeroUnpairedConfig, point: float = 0.0) -> LossOutput:
    """Log-ratios 1, -3 (desirable) and 2, 0.5 (undesirable)."""
    ratios = torch.tensor([1.0, -3.0, 2.0, 0.5], dtype=torch.float64)
    start = torch.tensor([-5.0, -6.0, -7.0, -8.0], dtype=torch.float64)
    labels = [True, True, False, False]
    return build_loss(method)(singles(start + ratios, start, labels), **known(type(method), point))


def logged(output: LossOutput, name: str) -> list[float]:
    """The numbers of a metric that count."""
    return output.metrics[name][output.counted[name]].tolist()


def sigma(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_kto_worked_by_hand() -> None:
    output = worked(KTOConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0), point=0.5)

    expected = [2 * (1 - sigma(0.25)), 2 * (1 - sigma(-1.75)), 3 * (1 - sigma(-0.75)), 3 * (1 - sigma(0.0))]
    assert output.loss.tolist() == pytest.approx(expected)
    assert logged(output, "rewards/chosen") == [0.5, -1.5]
    assert logged(output, "rewards/rejected") == [1.0, 0.25]
    assert output.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0, 0.5]
    assert output.metrics["kl"].tolist() == [0.5] * 4


def test_apo_zero_unpaired_worked_by_hand() -> None:
    output = worked(APOZeroUnpairedConfig(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0))

    expected = [2 * (1 - sigma(0.5)), 2 * (1 - sigma(-1.5)), 3 * sigma(1.0), 3 * sigma(0.25)]
    assert output.loss.tolist() == pytest.approx(expected)
    assert output.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert "kl" not in output.metrics, "the policy's own is measured elsewhere"


def test_a_policy_that_equals_its_reference_is_at_one_half() -> None:
    start = torch.tensor([-3.0, -4.0])
    output = build_loss(KTOConfig())(singles(start, start, [True, False]), point=torch.tensor(0.0))

    assert output.loss.tolist() == [0.5, 0.5]
    assert output.metrics["rewards/accuracies"].tolist() == [0.5, 0.5]


def twin(flip: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Our losses and their gradient, then those of the naive twin, with every label turned round or not."""
    generator = torch.Generator().manual_seed(5)
    reference = -20 * torch.rand(9, generator=generator, dtype=torch.float64)
    policy = (reference + torch.randn(9, generator=generator, dtype=torch.float64)).requires_grad_()
    far = torch.randn(9, generator=generator, dtype=torch.float64) + 0.4
    labels = [index % 3 > 0 for index in range(9)]
    weights = torch.arange(1.0, 10.0, dtype=torch.float64)

    point = reference_point(singles(reference + far, reference, labels))
    ours = build_loss(KTOConfig(beta=0.3))(singles(policy, reference, labels), **point).loss
    told = torch.tensor(labels) ^ flip
    naive = oracles.kto(policy, reference, told, far, beta=0.3)
    gradients = [torch.autograd.grad((loss * weights).sum(), policy)[0] for loss in (ours, naive)]
    return ours.detach(), gradients[0], naive.detach(), gradients[1]


def test_equals_its_naive_twin() -> None:
    loss, gradient, naive, naive_gradient = twin(flip=False)

    torch.testing.assert_close(loss, naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, naive_gradient, rtol=1e-12, atol=1e-12)


def test_turned_labels_do_not_pass() -> None:
    loss, gradient, naive, naive_gradient = twin(flip=True)

    assert (loss - naive).abs().max() > 0.1
    assert (gradient + naive_gradient).abs().max() < 1e-12


@pytest.mark.parametrize(("ratios", "point"), [([3.0, -1.0], 1.0), ([-3.0, 1.0], 0.0), ([], 0.0)])
def test_the_reference_point_is_a_mean_and_not_below_zero(ratios: list[float], point: float) -> None:
    start = torch.full((len(ratios),), -9.0)

    found = reference_point(singles(start + torch.tensor(ratios), start, [True] * len(ratios)))["point"]

    assert found.item() == point


@BOTH
@pytest.mark.parametrize("ratio", [1e4, -1e4, 1e-6])
@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_finite_at_the_extremes(config: type, ratio: float, label: bool, dtype: torch.dtype) -> None:
    policy = torch.tensor([ratio - 1e4], dtype=dtype).float().requires_grad_()

    output = build_loss(config())(
        singles(policy, torch.tensor([-1e4]), [label]), **known(config, 3.0, torch.float32)
    )

    (gradient,) = torch.autograd.grad(output.loss.sum(), policy)
    assert output.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (gradient <= 0).all() if label else (gradient >= 0).all()


@BOTH
def test_a_weight_of_zero_silences_its_kind(config: type) -> None:
    silent = worked(config(undesirable_weight=0.0), point=0.5).loss
    assert (silent[:2] > 0).all()
    assert silent[2:].tolist() == [0.0, 0.0]


def test_the_reference_point_carries_no_gradient_into_the_step() -> None:
    """What is scored ahead is told as a number; the loss does not push on it."""
    policy = torch.tensor([-3.0, -4.0], requires_grad=True)
    loss = build_loss(KTOConfig())
    point = torch.tensor(0.7)

    output = loss(singles(policy, torch.tensor([-3.5, -4.5]), [True, False]), point=point)

    assert output.loss.requires_grad
    assert not any(values.requires_grad for values in output.metrics.values())
