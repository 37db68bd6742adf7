"""What holds for every row of the table of losses: adding a row tests it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from comparing import comparison, comparison_for, foreknown
from fiducial.config.load import validate_config
from fiducial.config.methods import (
    METHODS,
    DiscoPOPConfig,
    DPOConfig,
    MethodConfig,
    TPOConfig,
    TPOLConfig,
)
from fiducial.errors import ConfigError
from fiducial.logps import ON_POLICY, SequenceLogps
from fiducial.losses import LOSSES, build_loss
from fiducial.losses.output import LossOutput
from fiducial.training.metrics import ASKED_FOR, METRICS

TOKENS = torch.tensor([5, 3, 2, 6])
FOR_PAIRS = [config for config in LOSSES if config.num_completions != 3]  # triples: test_lists.py
each_loss = pytest.mark.parametrize("config", FOR_PAIRS, ids=lambda config: config.__name__)


def logps(*values: float, dtype: torch.dtype = torch.float64) -> SequenceLogps:
    return SequenceLogps(torch.tensor(values, dtype=dtype, requires_grad=True), TOKENS[: len(values)])


def output_of(
    config: type[MethodConfig], policy: SequenceLogps, reference: SequenceLogps | None = None
) -> LossOutput:
    return build_loss(config())(comparison_for(config, policy, reference), **foreknown(config))


def reference_for(config: type[MethodConfig], *values: float) -> SequenceLogps | None:
    return logps(*values).detach() if config.needs_reference else None


@pytest.mark.parametrize("config", LOSSES, ids=lambda config: config.__name__)
def test_needs_its_reference_or_ignores_one(config: type[MethodConfig]) -> None:
    tokens = torch.tensor([5, 3, 2, 6, 4, 7])

    def sums(*values: float) -> SequenceLogps:
        return SequenceLogps(torch.tensor(values, dtype=torch.float64), tokens)

    policy = sums(-6.0, -5.0, -4.0, -7.0, -3.0, -2.0)
    one, other = sums(-7.0, -4.0, -6.0, -5.0, -1.0, -9.0), sums(-5.0, -6.0, -1.0, -8.0, -4.0, -2.5)
    differ = (output_of(config, policy, one).loss != output_of(config, policy, other).loss).any()

    assert bool(differ) == config.needs_reference
    if config.needs_reference:
        with pytest.raises(AssertionError, match="reference"):
            output_of(config, policy)
    else:
        assert torch.equal(output_of(config, policy, one).loss, output_of(config, policy).loss)


RISES_AT_FIRST = {DiscoPOPConfig}  # DiscoPOP has a local minimum just below a margin of 0


@pytest.mark.parametrize("config", [config for config in FOR_PAIRS if config not in RISES_AT_FIRST])
def test_raising_chosen_and_lowering_rejected_lowers_it(config: type[MethodConfig]) -> None:
    policy = logps(-6.0, -5.0, -4.0, -7.0)
    reference = reference_for(config, -6.0, -5.0, -4.0, -7.0)

    output_of(config, policy, reference).loss.sum().backward()

    gradient = policy.sum.grad
    assert gradient is not None
    assert (gradient[0::2] <= 0).all()
    assert (gradient[1::2] >= 0).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("config", [config for config in FOR_PAIRS if not build_loss(config()).whole_step])
def test_value_of_a_pair_does_not_depend_on_the_others(config: type[MethodConfig]) -> None:
    together = output_of(config, logps(-6.0, -5.0, -4.0, -7.0), reference_for(config, -7.0, -4.0, -6.0, -5.0))

    alone = output_of(config, logps(-6.0, -5.0), reference_for(config, -7.0, -4.0))

    torch.testing.assert_close(together.loss[: len(alone.loss)], alone.loss, rtol=0, atol=0)
    assert len(together.loss) == 2 * len(alone.loss)


@each_loss
@pytest.mark.parametrize("policy", [(-1e4, -1e4), (-1e4, -1e-6), (-1e-6, -1e4), (0.0, -3.0), (-3.0, 0.0)])
def test_stays_finite_at_the_extremes(config: type[MethodConfig], policy: tuple[float, float]) -> None:
    start = logps(*policy, dtype=torch.float32)
    reference = reference_for(config, -3.0, -3.0)

    output = output_of(config, start, reference)

    (gradient,) = torch.autograd.grad(output.loss.sum(), start.sum)
    assert all(is_finite(value) for value in (output.loss, output.metrics["rewards/chosen"], gradient))


def is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


@each_loss
def test_rewards_carry_no_gradient(config: type[MethodConfig]) -> None:
    output = output_of(config, logps(-6.0, -5.0), reference_for(config, -6.0, -5.0))

    assert not any(values.requires_grad for values in output.metrics.values())
    assert output.loss.requires_grad


def test_every_metric_is_explained() -> None:
    policy = logps(-6.0, -5.0, -4.0, -7.0)
    modified = DPOConfig(rpo_alpha=1.0, use_weighting=True)
    statistics = {ON_POLICY: torch.zeros(4)}
    outputs = [
        output_of(config, policy, reference_for(config, -6.0, -5.0, -4.0, -7.0)) for config in FOR_PAIRS
    ]
    outputs += [
        output_of(config, SequenceLogps(policy.sum[:3], TOKENS[:3])) for config in (TPOConfig, TPOLConfig)
    ]
    outputs.append(
        build_loss(modified)(
            comparison(replace(policy, statistics=statistics), logps(-6.0, -5.0, -4.0, -7.0))
        )
    )
    names = {*METRICS, *ASKED_FOR, "loss/<name>"}.union(*(output.metrics for output in outputs))

    page = (Path(__file__).parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")

    explained = re.findall(r"`([^`]+)`", page.partition("## What is logged")[2].partition("\n## ")[0])
    assert names <= set(explained)
    assert {"weights", "delta", "kept", "logps/gold", "sequence_kl/chosen"} <= names


def test_every_method_has_a_row() -> None:
    assert set(METHODS) == set(LOSSES)


def test_refuses_a_beta_that_makes_the_loss_constant() -> None:
    with pytest.raises(ConfigError, match="rl_beta: 0"):
        build_loss(DPOConfig(beta=0))


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({}, "makes the loss constant"),
        ({"dpo_loss_type": ["sigmoid", "sft"]}, "leaves sft alone. Write dpo_loss_type: sft"),
        ({"rpo_alpha": 0.5}, "leaves rpo_alpha's likelihood of the chosen completion alone"),
    ],
)
def test_what_a_beta_of_zero_leaves_is_told(settings: dict[str, object], left: str) -> None:
    method = validate_config({"base_model": "base", "rl": "dpo", "rl_beta": 0, **settings}).method
    assert method is not None
    with pytest.raises(ConfigError, match=re.escape(left)):
        build_loss(method)
