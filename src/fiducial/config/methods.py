"""What a user may set for each preference method, and what the planner must know of it.

One small class a loss: its hyperparameters with the paper's names and defaults, whether it needs a reference,
and where it comes from. The formula itself is a function in `fiducial.losses`, which maps each class to it.
"""

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fiducial.config.section import Section


class MethodConfig(Section):
    """Hyperparameters of one preference loss."""

    needs_reference: ClassVar[bool]
    """Whether the loss reads the reference's log-probs."""
    trainable: ClassVar[bool] = True
    """False while a run with it can be planned but `fiducial.losses` has no function for it."""
    paired: ClassVar[bool] = True
    """Whether it compares completions of one prompt (chosen, rejected) or takes labelled single ones."""
    paper: ClassVar[str]
    summary: ClassVar[str]
    """What the loss optimises, in one sentence."""


class DPOConfig(MethodConfig):
    """Direct preference optimisation, Rafailov et al. 2023; label smoothing makes it conservative DPO."""

    needs_reference = True
    paper = "https://arxiv.org/abs/2305.18290"
    summary = "Raise the chosen completion's log-ratio to the reference above the rejected one's."

    name: Literal["dpo"] = "dpo"
    beta: NonNegativeFloat = 0.1
    """Scale of the log-ratios: the larger, the closer the policy stays to the reference.

    At 0 the loss is the constant log 2: such a run can be planned (no reference is loaded) and not trained.
    """
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a preference label is wrong."""


class IPOConfig(MethodConfig):
    """Identity preference optimisation, Azar et al. 2023."""

    needs_reference = True
    paper = "https://arxiv.org/abs/2310.12036"
    summary = "Bring the margin of per-token log-ratios to 1/(2 beta), and no further."

    name: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """Strength of the regularisation towards the reference (the paper's tau)."""


class KTOConfig(MethodConfig):
    """Kahneman-Tversky optimisation, Ethayarajh et al. 2024, from single labelled completions."""

    needs_reference = True
    trainable = False
    paired = False
    paper = "https://arxiv.org/abs/2402.01306"
    summary = "Raise desirable completions above the reference point and push undesirable ones below it."

    name: Literal["kto"] = "kto"
    beta: NonNegativeFloat = 0.1
    """Scale of the log-ratios; at 0 the loss is constant and no reference is loaded."""
    desirable_weight: NonNegativeFloat = 1.0
    undesirable_weight: NonNegativeFloat = 1.0


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
    gamma: NonNegativeFloat = 0.5
    """Target margin of the rewards."""
    cpo_alpha: NonNegativeFloat = 0.0
    """Weight of a supervised term on the chosen completion."""


class CPOConfig(MethodConfig):
    """Contrastive preference optimisation, Xu et al. 2024."""

    needs_reference = False
    paper = "https://arxiv.org/abs/2401.08417"
    summary = "DPO without its reference, plus a supervised term on the chosen completion."

    name: Literal["cpo"] = "cpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    cpo_alpha: NonNegativeFloat = 1.0
    """Weight of the supervised term on the chosen completion."""


AnyMethod = Annotated[
    DPOConfig | IPOConfig | KTOConfig | ORPOConfig | SimPOConfig | CPOConfig,
    Field(discriminator="name"),
]

METHODS: tuple[type[MethodConfig], ...] = get_args(get_args(AnyMethod)[0])
"""Every method, in the order of the union above."""
