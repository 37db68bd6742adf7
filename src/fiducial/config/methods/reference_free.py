"""Methods that compare a pair without a reference."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fiducial.config.methods.method import MethodConfig


class ORPOConfig(MethodConfig):
    """Odds-ratio preference optimisation, Hong et al. 2024."""

    needs_reference = False
    paper = "https://arxiv.org/abs/2403.07691"
    summary = "Supervised loss on the chosen completion plus a penalty on the odds of the rejected one."

    name: Literal["orpo"] = "orpo"
    beta: PositiveFloat = 0.1
    """Weight of the odds-ratio term (the paper's lambda)."""


class SimPOConfig(MethodConfig):
    """Simple preference optimisation, Meng et al. 2024."""

    needs_reference = False
    paper = "https://arxiv.org/abs/2405.14734"
    summary = "Raise the chosen completion's mean log-prob above the rejected one's by a target margin."

    name: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Scale of the mean log-probs."""
    gamma: NonNegativeFloat = 0.5
    """Target margin of the rewards."""
    cpo_alpha: NonNegativeFloat = 0.0
    """Weight of a supervised term on the chosen completion."""


class CPOConfig(MethodConfig):
    """Contrastive preference optimisation, Xu et al. 2024."""

    family = "cpo"
    loss_type = "sigmoid"
    needs_reference = False
    paper = "https://arxiv.org/abs/2401.08417"
    summary = "DPO without its reference, plus a supervised term on the chosen completion."

    name: Literal["cpo"] = "cpo"
    beta: PositiveFloat = 0.1
    """Scale of the log-probs."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference label is wrong."""
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of the supervised term on the chosen completion."""


class CPOHingeConfig(MethodConfig):
    """SLiC-HF, Zhao et al. 2023: CPO's form with a hinge loss."""

    family = "cpo"
    loss_type = "hinge"
    needs_reference = False
    paper = "https://arxiv.org/abs/2305.10425"
    summary = "SLiC-HF: raise the chosen log-prob above the rejected one's by 1/beta, plus a supervised term."

    name: Literal["cpo_hinge"] = "cpo_hinge"
    beta: PositiveFloat = 0.1
    """Scale of the log-probs; the margin asked for is its inverse."""
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of the supervised term on the chosen completion."""


class CPOIPOConfig(MethodConfig):
    """CPO with IPO's squared loss, Azar et al. 2023."""

    family = "cpo"
    loss_type = "ipo"
    needs_reference = False
    paper = "https://arxiv.org/abs/2310.12036"
    summary = "Bring the margin of the mean log-probs to 1/(2 beta), plus a supervised term."

    name: Literal["cpo_ipo"] = "cpo_ipo"
    beta: PositiveFloat = 0.1
    """Inverse of twice the margin asked for."""
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of the supervised term on the chosen completion."""


class AlphaPOConfig(MethodConfig):
    """AlphaPO, Gupta et al. 2025."""

    family = "cpo"
    loss_type = "alphapo"
    needs_reference = False
    paper = "https://arxiv.org/abs/2501.03884"
    summary = "SimPO with a reward of another shape, a power of the completion's mean probability."

    name: Literal["alphapo"] = "alphapo"
    beta: PositiveFloat = 2.5
    """Scale of the rewards."""
    gamma: NonNegativeFloat = 0.25
    """Target margin of the rewards; the paper tells its ratio to beta, 0.1."""
    reward_alpha: float = 0.25
    """Shape of the reward (1 - p^-alpha)/alpha of the mean probability p; at 0 it is SimPO's log p."""
    cpo_alpha: NonNegativeFloat = 0.0
    """Weight of a supervised term on the chosen completion."""
