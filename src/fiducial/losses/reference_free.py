"""Losses of pairs that read no reference; notation as in `paired`."""

import math

import torch
import torch.nn.functional as F

from fiducial.logps import PairLogps
from fiducial.losses.exponential import expm1
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import PerPair, smoothed_logistic


def orpo_loss(policy: PairLogps, *, beta: float) -> LossOutput:
    """-chosen - β log σ(log odds(chosen) - log odds(rejected)), on mean log-probs.

    Hong et al. 2024, https://arxiv.org/abs/2403.07691, eq. 4 and 7.
    """
    chosen, rejected = policy.chosen.mean, policy.rejected.mean
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    loss = -chosen - beta * F.logsigmoid(log_odds)
    return LossOutput.of_rewards(loss, beta * chosen, beta * rejected)


def simpo_loss(policy: PairLogps, *, beta: float, gamma: float, cpo_alpha: float) -> LossOutput:
    """-log σ(β·(chosen - rejected) - γ) on mean log-probs, plus cpo_alpha times the chosen completion's NLL.

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, eq. 6.
    """
    chosen, rejected = policy.chosen.mean, policy.rejected.mean
    loss = -F.logsigmoid(beta * (chosen - rejected) - gamma) - cpo_alpha * chosen
    return LossOutput.of_rewards(loss, beta * chosen, beta * rejected)


def alphapo_loss(
    policy: PairLogps, *, beta: float, gamma: float, reward_alpha: float, cpo_alpha: float
) -> LossOutput:
    """SimPO's loss with the reward (1 - p^-α)/α, p the geometric mean of the token probabilities.

    Gupta et al. 2025, https://arxiv.org/abs/2501.03884. At α = 0 the reward is log p. The power is
    taken of the mean log-prob, never of a probability, which would be 0.
    """
    mean = policy.chosen.mean, policy.rejected.mean
    chosen, rejected = (beta * _power_reward(logp, reward_alpha) for logp in mean)
    loss = -F.logsigmoid(chosen - rejected - gamma) - cpo_alpha * mean[0]
    return LossOutput.of_rewards(loss, chosen, rejected)


def cpo_loss(policy: PairLogps, *, beta: float, label_smoothing: float, cpo_alpha: float) -> LossOutput:
    """DPO's loss on bare log-probs, plus cpo_alpha times the chosen completion's NLL per token.

    Xu et al. 2024, https://arxiv.org/abs/2401.08417.
    """
    margin = policy.chosen.sum - policy.rejected.sum
    return _with_supervision(smoothed_logistic(beta * margin, label_smoothing), policy, beta, cpo_alpha)


def cpo_hinge_loss(policy: PairLogps, *, beta: float, cpo_alpha: float) -> LossOutput:
    """max(0, 1 - β·(chosen - rejected)), plus cpo_alpha times the chosen completion's NLL per token.

    Zhao et al. 2023, https://arxiv.org/abs/2305.10425, with its regularisation.
    """
    margin = policy.chosen.sum - policy.rejected.sum
    return _with_supervision(torch.relu(1 - beta * margin), policy, beta, cpo_alpha)


def cpo_ipo_loss(policy: PairLogps, *, beta: float, cpo_alpha: float) -> LossOutput:
    """(chosen - rejected - 1 / (2β))² on mean log-probs, plus cpo_alpha times the chosen completion's NLL.

    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17, without reference, per token as IPO is here.
    """
    margin = policy.chosen.mean - policy.rejected.mean
    return _with_supervision((margin - 1 / (2 * beta)).square(), policy, beta, cpo_alpha)


def _with_supervision(preference: PerPair, policy: PairLogps, beta: float, weight: float) -> LossOutput:
    loss = preference - weight * policy.chosen.mean
    return LossOutput.of_rewards(loss, beta * policy.chosen.sum, beta * policy.rejected.sum)


def _power_reward(logp: PerPair, alpha: float) -> PerPair:
    """(1 - e^(-α·logp)) / α, and its limit at α = 0."""
    return logp if alpha == 0 else -expm1(-alpha * logp) / alpha


def _log1mexp(logp: PerPair) -> PerPair:
    """log(1 - exp(logp)) for logp < 0, split at -log 2 so that neither end loses digits.

    Both branches are kept finite, or the unused one's gradient would be 0 · inf. A log-prob of exactly 0 (a
    certain completion) is taken as the next smaller number: its odds are not finite.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near_zero = logp > -math.log(2)
    small = torch.log(-torch.expm1(torch.where(near_zero, logp, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, logp)))
    return torch.where(near_zero, small, large)
