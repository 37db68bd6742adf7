"""Losses of the DPO family that read each completion's own log-ratio; notation as in `paired`."""

import torch
import torch.nn.functional as F

from fiducial.logps import PairLogps
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import log_ratios, with_rewards


def nca_pair_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """-log σ(β·chosen) - ½ log σ(-β·chosen) - ½ log σ(-β·rejected), of log-ratios.

    Chen et al. 2024, https://arxiv.org/abs/2402.05369, table 1 and appendix B.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    loss = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return LossOutput.of_rewards(loss, chosen, rejected)


def sppo_hard_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """(chosen - 1/(2β))² + (rejected + 1/(2β))², of log-ratios.

    Wu et al. 2024, https://arxiv.org/abs/2405.00675, eq. 4.7, the chosen completion winning for certain.
    """
    chosen, rejected = log_ratios(policy, reference)
    half = 1 / (2 * beta)
    loss = (chosen - half).square() + (rejected + half).square()
    return with_rewards(loss, policy, reference, beta=beta)


def apo_zero_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """1 - σ(β·chosen) + σ(β·rejected), of log-ratios.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    # 1 - σ(x) as σ(-x), which keeps its digits where σ(x) is nearly 1.
    loss = torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return LossOutput.of_rewards(loss, chosen, rejected)


def apo_down_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """σ(β·chosen) + 1 - σ(β(chosen - rejected)), of log-ratios.

    D'Oosterlinck et al. 2024, https://arxiv.org/abs/2408.06266, eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    loss = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return LossOutput.of_rewards(loss, chosen, rejected)


def dpop_loss(policy: PairLogps, reference: PairLogps, *, beta: float, penalty: float) -> LossOutput:
    """-log σ(β(chosen - rejected - λ max(0, -chosen))), of log-ratios.

    Pal et al. 2024, https://arxiv.org/abs/2402.13228.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))
    return with_rewards(loss, policy, reference, beta=beta)


def cal_dpo_loss(policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """-log σ(chosen - rejected) + (chosen - 1/(2β))² + (rejected + 1/(2β))², of log-ratios.

    Xiao et al. 2024, https://arxiv.org/abs/2412.14516, as in the authors' Pythia trainer. (Their
    second trainer, for Zephyr, halves the two squares.)
    """
    chosen, rejected = log_ratios(policy, reference)
    half = 1 / (2 * beta)
    loss = -F.logsigmoid(chosen - rejected) + (chosen - half).square() + (rejected + half).square()
    return with_rewards(loss, policy, reference, beta=beta)
