"""Losses of single completions, each desirable (score 1) or undesirable (score -1).

Notation: r is a completion's log-ratio, policy minus reference; z₀ the reference point that it is measured
from. KTO's z₀ estimates the KL divergence of the policy from its reference on mismatched completions, over
the whole optimizer step of all processes; it carries no gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fiducial.config.methods import MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Comparison
from fiducial.losses.loss import Loss
from fiducial.losses.output import LossOutput


def labelled(function: Callable[..., LossOutput]) -> Callable[[MethodConfig], Loss]:
    """A row of the table: `function` of a comparison and hyperparameters; each group is one completion.

    Where the method is `mismatched`, each group is (y, y'), and of y' only the reference point is known.
    """

    def build(method: MethodConfig) -> Loss:
        settings = method.model_dump(exclude={"name"})

        def loss(comparison: Comparison, **known: Tensor) -> LossOutput:
            return function(comparison, **known, **settings)

        if not method.mismatched:
            return Loss(loss, method.needs_reference)
        return Loss(
            loss,
            method.needs_reference,
            trained=lambda group: _completion(group, 0),
            ahead=lambda group: _completion(group, 1),
            foreknow=reference_point,
        )

    return build


def reference_point(mismatched: Comparison) -> Mapping[str, Tensor]:
    """z₀ = max(mean of r over mismatched completions, 0).

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306.
    """
    ratios = _log_ratios(mismatched)
    return {"point": ratios.sum().div(max(len(ratios), 1)).clamp(min=0)}


def kto_loss(
    comparison: Comparison,
    *,
    point: Float[Tensor, ""],
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """λ_D (1 - σ(β(r - z₀))) for a desirable completion, λ_U (1 - σ(β(z₀ - r))) for an undesirable one.

    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7 and 8.
    """
    ratios, desirable = _log_ratios(comparison), comparison.completions.chosen
    side = torch.where(desirable, 1, -1)
    above = side * (ratios - point)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    # 1 - σ(x) as σ(-x), which keeps its digits where σ(x) is nearly 1.
    loss = weight * torch.sigmoid(-beta * above)
    rewards = beta * ratios.detach()
    return LossOutput(
        loss,
        {
            "rewards/chosen": rewards,
            "rewards/rejected": rewards,
            # A tie counts one half: a policy that still equals its reference is on neither side.
            "rewards/accuracies": 0.5 * (above.detach().sign() + 1),
            "kl": point.expand(len(loss)),
        },
        counted={"rewards/chosen": desirable, "rewards/rejected": ~desirable},
    )


def apo_zero_unpaired_loss(
    comparison: Comparison, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> LossOutput:
    """λ_D (1 - σ(βr)) for a desirable completion, λ_U σ(βr) for an undesirable one: KTO with z₀ = 0.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 7, its two terms taken apart.
    """
    output = kto_loss(
        comparison,
        point=torch.zeros_like(comparison.policy.sum[:0].sum()),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    metrics = {name: values for name, values in output.metrics.items() if name != "kl"}
    return replace(output, metrics=metrics)


def _log_ratios(comparison: Comparison) -> Float[Tensor, " completions"]:
    assert comparison.reference is not None, "a log-ratio is of policy and reference"
    return comparison.policy.sum - comparison.reference.sum


def _completion(group: TokenizedGroup, index: int) -> TokenizedGroup:
    assert len(group.completions) == 2, "a completion and a mismatched one"
    return TokenizedGroup(group.prompt, group.completions[index : index + 1], group.scores[index : index + 1])
