"""The losses of pairs beside their naive twins, hyperparameter for hyperparameter."""

from torch import Tensor

import oracles
import pair_oracles as twins
from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from pair_oracles import Naive


def dpo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    ratio = policy - reference
    return oracles.dpo(ratio[0::2], ratio[1::2], beta=0.3)


def conservative_dpo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    ratio = policy - reference
    return oracles.smoothed(0.3 * (ratio[0::2] - ratio[1::2]), label_smoothing=0.2)


def rpo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    return dpo(policy, reference, tokens) - 0.7 * policy[0::2] / tokens[0::2]


def ipo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    ratio = (policy - reference) / tokens
    return oracles.ipo(ratio[0::2], ratio[1::2], beta=0.3)


def orpo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    mean = policy / tokens
    return oracles.orpo(mean[0::2], mean[1::2], beta=0.3)


def simpo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    mean = policy / tokens
    return oracles.simpo(mean[0::2], mean[1::2], beta=1.5, gamma=0.4, cpo_alpha=0.7)


def cpo_ipo(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    mean = policy / tokens
    return (mean[0::2] - mean[1::2] - 0.5 / 0.3) ** 2 - 0.7 * mean[0::2]


def forward_kl(ratio: Tensor) -> Tensor:
    return 1 - 1 / ratio


def alpha_divergence(ratio: Tensor) -> Tensor:
    return (ratio**-0.7 - 1) / -0.7


def smoothed_logistic(margin: Tensor) -> Tensor:
    return oracles.smoothed(margin, label_smoothing=0.1)


MIXTURE = methods.MixtureConfig(
    losses=(methods.DPOConfig(beta=0.3), methods.BCOPairConfig(beta=0.3), methods.SFTConfig()),
    weights=(0.8, 0.2, 1.5),
)

PAIR_TWINS: list[tuple[MethodConfig, Naive]] = [
    (methods.DPOConfig(beta=0.3), dpo),
    (methods.DPOConfig(beta=0.3, label_smoothing=0.2), conservative_dpo),
    (methods.DPOConfig(beta=0.3, rpo_alpha=0.7), rpo),
    (methods.DPOConfig(beta=0.3, f_divergence_type="reverse_kl"), dpo),
    (methods.DPOConfig(beta=0.3, f_divergence_type="forward_kl"), twins.f_dpo(0.3, forward_kl)),
    (methods.DPOConfig(beta=0.3, f_divergence_type="js_divergence"), twins.f_dpo(0.3, twins.jensen_shannon)),
    (
        methods.DPOConfig(beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
        twins.f_dpo(0.3, alpha_divergence),
    ),
    (methods.HingeConfig(beta=0.3), twins.hinge(0.3)),
    (methods.IPOConfig(beta=0.3), ipo),
    (methods.EXOPairConfig(beta=0.3, label_smoothing=0.1), twins.exo_pair(0.3, 0.1)),
    (methods.NCAPairConfig(beta=0.3), twins.nca_pair(0.3)),
    (methods.RobustConfig(beta=0.3, label_smoothing=0.2), twins.robust(0.3, 0.2)),
    (methods.BCOPairConfig(beta=0.3), twins.bco_pair(0.3, running=True)),
    (methods.BCOPairConfig(beta=0.3, running_delta=False), twins.bco_pair(0.3, running=False)),
    (methods.SPPOHardConfig(beta=0.3), twins.sppo_hard(0.3)),
    (methods.AOTConfig(beta=0.3, label_smoothing=0.1), twins.transport(0.3, 0.1, paired=True)),
    (methods.AOTUnpairedConfig(beta=0.3, label_smoothing=0.1), twins.transport(0.3, 0.1, paired=False)),
    (methods.APOZeroConfig(beta=0.3), twins.apo_zero(0.3)),
    (methods.APODownConfig(beta=0.3), twins.apo_down(0.3)),
    (methods.DiscoPOPConfig(beta=0.3, tau=0.5), twins.discopop(0.3, 0.5)),
    (methods.SFTConfig(), twins.sft),
    (methods.SigmoidNormConfig(beta=1.5), twins.sigmoid_norm(1.5)),
    (methods.DPOPConfig(beta=0.3, penalty=2), twins.dpop(0.3, 2)),
    (methods.RDPOConfig(beta=0.3, length_penalty=0.2), twins.r_dpo(0.3, 0.2)),
    (methods.CalDPOConfig(beta=0.3), twins.cal_dpo(0.3)),
    (methods.BetaDPOConfig(beta=0.3, keep_share=1), twins.beta_dpo(0.3, 0.6)),
    (MIXTURE, twins.weighted([(0.8, dpo), (0.2, twins.bco_pair(0.3, running=True)), (1.5, twins.sft)])),
    (methods.ORPOConfig(beta=0.3), orpo),
    (methods.SimPOConfig(beta=1.5, gamma=0.4, cpo_alpha=0.7), simpo),
    (
        methods.CPOConfig(beta=0.3, label_smoothing=0.1, cpo_alpha=0.7),
        twins.cpo(0.3, 0.7, smoothed_logistic),
    ),
    (
        methods.CPOHingeConfig(beta=0.3, cpo_alpha=0.7),
        twins.cpo(0.3, 0.7, lambda margin: (1 - margin).clamp(min=0)),
    ),
    (
        methods.CPOIPOConfig(beta=0.3, cpo_alpha=0.7),
        cpo_ipo,
    ),
    (
        methods.AlphaPOConfig(beta=1.5, gamma=0.4, reward_alpha=0.25, cpo_alpha=0.7),
        twins.alphapo(1.5, 0.4, 0.25, 0.7),
    ),
    (methods.AlphaPOConfig(beta=1.5, gamma=0.4, reward_alpha=0, cpo_alpha=0.7), simpo),
]
