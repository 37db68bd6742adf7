"""What may be done to any loss of the DPO family: to its log-probs, its divergence, its value.

A modifier that is None is off. Each wraps a function of policy, reference and hyperparameters and gives
another such function, so that no loss knows of any modifier.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fiducial.data.batch import PackedBatch
from fiducial.logps import ON_POLICY, PairLogps, SequenceLogps
from fiducial.losses.exponential import expm1
from fiducial.losses.output import LossOutput

PairFunction = Callable[..., LossOutput]


def modified(function: PairFunction, modifiers: Mapping[str, Any]) -> PairFunction:
    """`function` with every modifier that is set, except `ld_alpha`, which changes the log-probs before."""
    if modifiers.get("f_divergence_type") not in (None, "reverse_kl"):
        alpha = modifiers["f_alpha_divergence_coef"]
        function = with_divergence(
            function, modifiers["f_divergence_type"], alpha=0.5 if alpha is None else alpha
        )
    if modifiers.get("use_weighting"):
        function = with_weighting(function)
    if modifiers.get("rpo_alpha"):
        function = with_supervision(function, modifiers["rpo_alpha"])
    return function


def token_weights(ld_alpha: float | None) -> Callable[[PackedBatch], Tensor] | None:
    """LD-DPO's weights: 1 up to the length of the shorter completion of the pair, `ld_alpha` after it.

    Liu et al. 2024, https://arxiv.org/abs/2409.06411.
    """
    if ld_alpha is None:
        return None

    def weights(batch: PackedBatch) -> Float[Tensor, " scored"]:
        # As torch.bincount counts, which on a GPU is waited for.
        lengths = batch.sequence.new_zeros(batch.num_sequences)
        lengths = lengths.index_add(0, batch.sequence, torch.ones_like(batch.sequence))
        position = torch.arange(len(batch.sequence), device=lengths.device)
        position -= (lengths.cumsum(0) - lengths)[batch.sequence]
        shorter = lengths.reshape(len(lengths) // 2, 2).amin(1).repeat_interleave(2)
        return torch.where(position < shorter[batch.sequence], 1.0, ld_alpha)

    return weights


def with_divergence(function: PairFunction, kind: str, *, alpha: float) -> PairFunction:
    """`function` of f'(π/ρ) where it reads log(π/ρ), which is f' of reverse KL.

    Wang et al. 2023, https://arxiv.org/abs/2309.16240. The constants of f' cancel in a margin.
    What is logged stays beta times the log-ratio.
    """

    def loss(policy: PairLogps, reference: PairLogps, *, beta: float, **settings: Any) -> LossOutput:
        def score(one: SequenceLogps, other: SequenceLogps) -> SequenceLogps:
            return replace(one, sum=_scores(one.sum - other.sum, kind, alpha))

        scores = PairLogps(score(policy.chosen, reference.chosen), score(policy.rejected, reference.rejected))
        zero = PairLogps(_zero(reference.chosen), _zero(reference.rejected))
        output = function(scores, zero, beta=beta, **settings)
        rewards = LossOutput.of_rewards(
            output.loss,
            beta * (policy.chosen.sum - reference.chosen.sum),
            beta * (policy.rejected.sum - reference.rejected.sum),
        )
        return replace(output, metrics={**output.metrics, **rewards.metrics})

    return loss


def with_weighting(function: PairFunction) -> PairFunction:
    """`function` times w(chosen) · w(rejected), w = exp(mean_t(log p_t - log Σ_v p_v²)), without gradient.

    The policy must bring the statistic ON_POLICY. Zhou et al. 2024, https://arxiv.org/abs/2406.11827, eq. 2.
    """

    def loss(policy: PairLogps, reference: PairLogps, **settings: Any) -> LossOutput:
        output = function(policy, reference, **settings)
        per_token = sum(
            one.statistics[ON_POLICY] / one.num_tokens.clamp(min=1)
            for one in (policy.chosen, policy.rejected)
        )
        weight = torch.as_tensor(per_token).detach().exp()
        return replace(output, loss=output.loss * weight, metrics={**output.metrics, "weights": weight})

    return loss


def with_supervision(function: PairFunction, weight: float) -> PairFunction:
    """`function` plus `weight` times the chosen completion's negative log-prob per token.

    Pang et al. 2024, https://arxiv.org/abs/2404.19733.
    """

    def loss(policy: PairLogps, reference: PairLogps, **settings: Any) -> LossOutput:
        output = function(policy, reference, **settings)
        supervised = -policy.chosen.unweighted.mean
        metrics = {**output.metrics, "loss/supervised": supervised.detach()}
        return replace(output, loss=output.loss + weight * supervised, metrics=metrics)

    return loss


def _scores(log_ratio: Float[Tensor, " pairs"], kind: str, alpha: float) -> Float[Tensor, " pairs"]:
    if kind == "forward_kl":
        return -expm1(-log_ratio)
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratio)
    assert kind == "alpha_divergence", kind
    return expm1((alpha - 1) * log_ratio) / (alpha - 1)


def _zero(logps: SequenceLogps) -> SequenceLogps:
    return replace(logps, sum=torch.zeros_like(logps.sum))
