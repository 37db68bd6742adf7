"""The losses of rankings and scores beside their naive twins, each of one group."""

from collections.abc import Callable

import torch
from torch import Tensor

from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from oracles import log_sigmoid

SIZES = [3, 2, 4, 3]
Ranked = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of policy, reference, scores and token counts of one group's completions, best first, to its loss."""


def plackett_luce(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    reward = 0.3 * (policy - reference)
    return sum((reward[k:].logsumexp(0) - reward[k] for k in range(len(reward))), torch.tensor(0.0))


def info_nca(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    return -((scores / 0.7).softmax(0) * (0.3 * (policy - reference)).log_softmax(0)).sum()


def nca(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    reward = 0.3 * (policy - reference)
    return -((scores / 0.7).softmax(0) * log_sigmoid(reward)).sum() - log_sigmoid(-reward).mean()


def tpo(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    return -log_sigmoid(0.3 * (policy[1] - policy[2])) - 0.5 * policy[0] / tokens[0]


def tpo_l(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    mean = policy / tokens
    return -log_sigmoid(1.5 * (mean[1] - mean[2]) - 0.4) - 0.5 * mean[0]


def odpo(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    ratio = policy - reference
    return -log_sigmoid(0.3 * (ratio[0] - ratio[1]) - 0.6 * torch.log(scores[0] - scores[1]))


def odpo_identity(policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    ratio = policy - reference
    return -log_sigmoid(0.3 * (ratio[0] - ratio[1]) - 0.6 * (scores[0] - scores[1]))


LIST_TWINS: list[tuple[MethodConfig, Ranked, list[int]]] = [
    (methods.PlackettLuceConfig(beta=0.3), plackett_luce, SIZES),
    (methods.InfoNCAConfig(beta=0.3, temperature=0.7), info_nca, SIZES),
    (methods.NCAConfig(beta=0.3, temperature=0.7), nca, SIZES),
    (methods.TPOConfig(beta=0.3, gold_weight=0.5), tpo, [3, 3, 3]),
    (methods.TPOLConfig(beta=1.5, target_margin=0.4, gold_weight=0.5), tpo_l, [3, 3, 3]),
    (methods.ODPOConfig(beta=0.3, offset_weight=0.6), odpo, [2, 2, 2]),
    (methods.ODPOConfig(beta=0.3, offset_weight=0.6, offset_scale="identity"), odpo_identity, [2, 2, 2]),
]
"""Each with the sizes of the groups it is tried on."""
