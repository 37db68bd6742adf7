"""Losses of the DPO family that read the margin of log-ratios and nothing else.

Any divergence may stand for the log-ratio (`fiducial.losses.modifiers`); notation as in
`fiducial.losses.paired`.
"""

import math

import torch
import torch.nn.functional as F

from fiducial.logps import PairLogps
from fiducial.losses.exponential import expm1
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import PerPair, log_ratios, smoothed_logistic, with_rewards


def dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> LossOutput:
    """-(1 - ε) log σ(β·margin) - ε log σ(-β·margin).

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, eq. 7; ε > 0 is conservative DPO.
    """
    loss = smoothed_logistic(beta * margin(policy, reference), label_smoothing)
    return with_rewards(loss, policy, reference, beta=beta)


def hinge_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """max(0, 1 - β·margin).

    Liu et al. 2023, https://arxiv.org/abs/2309.06657, hinge-norm.
    """
    loss = torch.relu(1 - beta * margin(policy, reference))
    return with_rewards(loss, policy, reference, beta=beta)


def ipo_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """(margin of per-token log-ratios - 1 / (2β))².

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, length-normalised as its authors' code is.
    """
    loss = (mean_margin(policy, reference) - 1 / (2 * beta)).square()
    return with_rewards(loss, policy, reference, beta=beta)


def exo_pair_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> LossOutput:
    """KL(q ‖ p) for q = (σ(β·margin), σ(-β·margin)) and p = (1 - ε, ε).

    Ji et al. 2024, https://arxiv.org/abs/2402.00856, eq. 16.
    """
    scaled = beta * margin(policy, reference)
    right = torch.sigmoid(scaled) * (F.logsigmoid(scaled) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-scaled) * (F.logsigmoid(-scaled) - math.log(label_smoothing))
    return with_rewards(right + wrong, policy, reference, beta=beta)


def robust_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> LossOutput:
    """(-(1 - ε) log σ(β·margin) + ε log σ(-β·margin)) / (1 - 2ε).

    Chowdhury et al. 2024, https://arxiv.org/abs/2403.00409.
    """
    wrong, scaled = label_smoothing, beta * margin(policy, reference)
    loss = (-(1 - wrong) * F.logsigmoid(scaled) + wrong * F.logsigmoid(-scaled)) / (1 - 2 * wrong)
    return with_rewards(loss, policy, reference, beta=beta)


def discopop_loss(policy: PairLogps, reference: PairLogps, *, beta: float, tau: float) -> LossOutput:
    """(1 - m)(-log σ(z)) + m e^(-z) for z = β·margin and m = σ(z / τ).

    Lu et al. 2024, https://arxiv.org/abs/2406.08414, eq. 5, with τ as in appendix E.
    """
    scaled = beta * margin(policy, reference)
    logistic = torch.sigmoid(-scaled / tau) * -F.logsigmoid(scaled)
    # One exponent, because for z far below 0 the product is 0 · inf.
    exponential = expm1(F.logsigmoid(scaled / tau) - scaled) + 1
    return with_rewards(logistic + exponential, policy, reference, beta=beta)


def sigmoid_norm_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """-log σ(β · margin of per-token log-ratios).

    Lambert et al. 2024, https://arxiv.org/abs/2411.15124, length-normalised DPO.
    """
    loss = -F.logsigmoid(beta * mean_margin(policy, reference))
    return with_rewards(loss, policy, reference, beta=beta)


def r_dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float, length_penalty: float) -> LossOutput:
    """-log σ(β·margin + α(chosen tokens - rejected tokens)).

    Park et al. 2024, https://arxiv.org/abs/2403.19159.
    """
    scaled = beta * margin(policy, reference)
    longer = (policy.chosen.num_tokens - policy.rejected.num_tokens).to(scaled)
    loss = -F.logsigmoid(scaled + length_penalty * longer)
    return with_rewards(loss, policy, reference, beta=beta)


def margin(policy: PairLogps, reference: PairLogps) -> PerPair:
    """Chosen log-ratio minus rejected log-ratio."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen - rejected


def mean_margin(policy: PairLogps, reference: PairLogps) -> PerPair:
    """The margin of log-ratios per token."""
    chosen, rejected = log_ratios(policy, reference)
    tokens = policy.chosen.num_tokens.clamp(min=1), policy.rejected.num_tokens.clamp(min=1)
    return chosen / tokens[0] - rejected / tokens[1]
