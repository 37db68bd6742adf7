"""Losses of a pair's margin and something beside log-probs; notation as in `paired`."""

from typing import Literal

import torch
import torch.nn.functional as F

from fiducial.logps import KL, PairLogps
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import PerPair, log_ratios, with_rewards


def odpo_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    better_by: PerPair,
    beta: float,
    offset_weight: float,
    offset_scale: Literal["log", "identity"],
) -> LossOutput:
    """-log σ(β·margin - α·f(score of chosen - score of rejected)), f the logarithm or nothing.

    Amini et al. 2024, https://arxiv.org/abs/2402.10571; scores differ, the chosen one's is higher.
    """
    chosen, rejected = log_ratios(policy, reference)
    offset = offset_weight * (torch.log(better_by) if offset_scale == "log" else better_by)
    loss = -F.logsigmoid(beta * (chosen - rejected) - offset)
    return with_rewards(loss, policy, reference, beta=beta)


def tdpo1_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """-log σ(β·(margin - (KL of rejected - KL of chosen))), each KL a sum over the completion's tokens.

    Zeng et al. 2024, https://arxiv.org/abs/2404.11999, TDPO1.
    """
    kl = policy.rejected.statistics[KL] - policy.chosen.statistics[KL]
    return _token_level(policy, reference, kl, beta)


def tdpo2_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, divergence_weight: float
) -> LossOutput:
    """-log σ(β·(margin - α(KL of rejected - KL of chosen))), without gradient through the chosen one's.

    Zeng et al. 2024, https://arxiv.org/abs/2404.11999, TDPO2.
    """
    kl = policy.rejected.statistics[KL] - policy.chosen.statistics[KL].detach()
    return _token_level(policy, reference, divergence_weight * kl, beta)


def _token_level(policy: PairLogps, reference: PairLogps, kl: PerPair, beta: float) -> LossOutput:
    chosen, rejected = log_ratios(policy, reference)
    output = with_rewards(-F.logsigmoid(beta * (chosen - rejected - kl)), policy, reference, beta=beta)
    divergences = {
        "sequence_kl/chosen": policy.chosen.statistics[KL].detach(),
        "sequence_kl/rejected": policy.rejected.statistics[KL].detach(),
    }
    return LossOutput(output.loss, {**output.metrics, **divergences})
