"""The losses: one visible table from what a user writes to the function that computes it."""

from collections.abc import Callable
from dataclasses import replace

from fiducial.config import methods
from fiducial.config.methods import MethodConfig, MixtureConfig
from fiducial.errors import ConfigError
from fiducial.losses.dpo import (
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    r_dpo_loss,
    robust_loss,
    sigmoid_norm_loss,
)
from fiducial.losses.kto import apo_zero_unpaired_loss, kto_loss, labelled
from fiducial.losses.lists import (
    comparing,
    info_nca_loss,
    listwise,
    nca_loss,
    plackett_luce_loss,
    tpo_l_loss,
    tpo_loss,
)
from fiducial.losses.log_ratios import (
    apo_down_loss,
    apo_zero_loss,
    cal_dpo_loss,
    dpop_loss,
    nca_pair_loss,
    sppo_hard_loss,
)
from fiducial.losses.loss import Loss
from fiducial.losses.margins import odpo_loss, tdpo1_loss, tdpo2_loss
from fiducial.losses.mixture import mixture
from fiducial.losses.paired import pairwise
from fiducial.losses.reference_free import (
    alphapo_loss,
    cpo_hinge_loss,
    cpo_ipo_loss,
    cpo_loss,
    orpo_loss,
    simpo_loss,
)
from fiducial.losses.whole_step import (
    BETA_DPO_START,
    aot_loss,
    aot_unpaired_loss,
    bco_pair,
    beta_dpo_loss,
    chosen_tokens,
    sft_loss,
)

__all__ = ["LOSSES", "Loss", "build_loss"]

LOSSES: dict[type[MethodConfig], Callable[[MethodConfig], Loss]] = {
    methods.DPOConfig: pairwise(dpo_loss),
    methods.HingeConfig: pairwise(hinge_loss),
    methods.IPOConfig: pairwise(ipo_loss),
    methods.EXOPairConfig: pairwise(exo_pair_loss),
    methods.NCAPairConfig: pairwise(nca_pair_loss),
    methods.RobustConfig: pairwise(robust_loss),
    methods.BCOPairConfig: bco_pair,
    methods.SPPOHardConfig: pairwise(sppo_hard_loss),
    methods.AOTConfig: pairwise(aot_loss, whole_step=True),
    methods.AOTUnpairedConfig: pairwise(aot_unpaired_loss, whole_step=True),
    methods.APOZeroConfig: pairwise(apo_zero_loss),
    methods.APODownConfig: pairwise(apo_down_loss),
    methods.DiscoPOPConfig: pairwise(discopop_loss),
    methods.SFTConfig: pairwise(sft_loss, count=chosen_tokens),
    methods.SigmoidNormConfig: pairwise(sigmoid_norm_loss),
    methods.DPOPConfig: pairwise(dpop_loss),
    methods.RDPOConfig: pairwise(r_dpo_loss),
    methods.BetaDPOConfig: pairwise(beta_dpo_loss, running=BETA_DPO_START),
    methods.CalDPOConfig: pairwise(cal_dpo_loss),
    methods.ODPOConfig: pairwise(odpo_loss),
    methods.TDPO1Config: pairwise(tdpo1_loss),
    methods.TDPO2Config: pairwise(tdpo2_loss),
    methods.KTOConfig: labelled(kto_loss),
    methods.APOZeroUnpairedConfig: labelled(apo_zero_unpaired_loss),
    methods.ORPOConfig: pairwise(orpo_loss),
    methods.SimPOConfig: pairwise(simpo_loss),
    methods.CPOConfig: pairwise(cpo_loss),
    methods.CPOHingeConfig: pairwise(cpo_hinge_loss),
    methods.CPOIPOConfig: pairwise(cpo_ipo_loss),
    methods.AlphaPOConfig: pairwise(alphapo_loss),
    methods.PlackettLuceConfig: listwise(plackett_luce_loss),
    methods.InfoNCAConfig: listwise(info_nca_loss),
    methods.NCAConfig: listwise(nca_loss),
    methods.TPOConfig: comparing(tpo_loss),
    methods.TPOLConfig: comparing(tpo_l_loss),
}


def build_loss(method: MethodConfig) -> Loss:
    """The loss of `method` with its hyperparameters set.

    Raises:
        ConfigError: a beta of 0 leaves no preference to learn.
    """
    if method.needs_reference and method.is_constant:
        raise ConfigError(_without_preference(method))
    loss = mixture(method, build_loss) if isinstance(method, MixtureConfig) else LOSSES[type(method)](method)
    return replace(loss, num_completions=method.num_completions) if method.paired else loss


def _without_preference(method: MethodConfig) -> str:
    """What a beta of 0 takes out of the loss, and what to write instead."""
    parts = method.losses if isinstance(method, MixtureConfig) else ()
    left = [part.title for part in parts if not part.needs_reference]
    if method.hyperparameters.get("rpo_alpha"):
        left.append("rpo_alpha's likelihood of the chosen completion")
    if not left:
        return "rl_beta: 0 makes the loss constant: nothing is learned. Write 0.1, say."
    return (
        f"rl_beta: 0 takes the preference out of the loss and leaves {left[0]} alone. Write "
        "dpo_loss_type: sft to train on likelihood alone, or an rl_beta above 0, 0.1 say."
    )
