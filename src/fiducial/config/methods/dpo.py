"""Losses of the margin: how far the chosen log-ratio to the reference stands above the rejected one's.

All are written `rl: dpo` with their `dpo_loss_type`, and so are those of `log_ratios` and `whole_step`.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fiducial.config.methods.method import MethodConfig

Share = Annotated[float, Field(ge=0, le=1)]
WrongLabels = Annotated[float, Field(ge=0, lt=0.5)]
SomeWrongLabels = Annotated[float, Field(gt=0, lt=0.5)]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class ReferencedConfig(MethodConfig):
    """A member of the DPO family that compares with a reference: what may modify any of them."""

    family = "dpo"
    needs_reference = True

    ld_alpha: Share | None = None
    """LD-DPO: weight of a completion's tokens beyond the length of the shorter one of its pair; 1 is off."""
    rpo_alpha: NonNegativeFloat | None = None
    """RPO: weight of a supervised term on the chosen completion, per token."""


class WeightedConfig(ReferencedConfig):
    """A loss with one value a pair that the pair's own completions decide: it may be weighted."""

    use_weighting: bool | None = None
    """WPO: weight each pair by how likely the policy is to write its completions; not on unless true."""


class MarginConfig(WeightedConfig):
    """A loss that reads nothing but the margin: the divergence from the reference may be another one."""

    f_divergence_type: Divergence | None = None
    """The divergence that holds the policy to the reference; reverse_kl is that of DPO."""
    f_alpha_divergence_coef: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Alpha of the alpha divergence, 0.5 unless set; towards 1 it is reverse_kl, towards 0 forward_kl."""


MODIFIERS = tuple(MarginConfig.model_fields)
"""Fields that are no hyperparameters of their loss: any loss above may be given those of its class."""


class DPOConfig(MarginConfig):
    """Direct preference optimisation, Rafailov et al. 2023; label smoothing makes it conservative DPO."""

    loss_type = "sigmoid"
    paper = "https://arxiv.org/abs/2305.18290"
    summary = "Raise the chosen completion's log-ratio to the reference above the rejected one's."

    name: Literal["dpo"] = "dpo"
    beta: NonNegativeFloat = 0.1
    """Scale of the log-ratios: the larger, the closer the policy stays to the reference.

    At 0 the loss is the constant log 2: such a run can be planned (no reference is loaded) and not trained.
    """
    label_smoothing: WrongLabels = 0.0
    """Probability that a preference label is wrong."""


class HingeConfig(MarginConfig):
    """Hinge loss on the margin, Liu et al. 2023."""

    loss_type = "hinge"
    paper = "https://arxiv.org/abs/2309.06657"
    summary = "Raise the margin of log-ratios to 1/beta, and no further."

    name: Literal["hinge"] = "hinge"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios; the margin asked for is its inverse."""


class IPOConfig(MarginConfig):
    """Identity preference optimisation, Azar et al. 2023."""

    loss_type = "ipo"
    paper = "https://arxiv.org/abs/2310.12036"
    summary = "Bring the margin of per-token log-ratios to 1/(2 beta), and no further."

    name: Literal["ipo"] = "ipo"
    beta: PositiveFloat = 0.1
    """Strength of the regularisation towards the reference (the paper's tau)."""


class EXOPairConfig(MarginConfig):
    """Efficient exact optimisation from pairs, Ji et al. 2024."""

    loss_type = "exo_pair"
    paper = "https://arxiv.org/abs/2402.00856"
    summary = "Bring the policy's own preference between the two completions, by reverse KL, to the label."

    name: Literal["exo_pair"] = "exo_pair"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios."""
    label_smoothing: SomeWrongLabels = 1e-3
    """Probability that a preference label is wrong; at 0 the reverse KL would be infinite."""


class RobustConfig(MarginConfig):
    """Provably robust DPO, Chowdhury et al. 2024."""

    loss_type = "robust"
    paper = "https://arxiv.org/abs/2403.00409"
    summary = "DPO whose expectation over flipped labels is DPO on the right ones."

    name: Literal["robust"] = "robust"
    beta: PositiveFloat = 0.01
    """Scale of the log-ratios."""
    label_smoothing: WrongLabels = 0.1
    """Probability that a preference label is flipped; at 0 it is DPO."""


class DiscoPOPConfig(MarginConfig):
    """Log-ratio modulated loss, discovered by a language model, Lu et al. 2024."""

    loss_type = "discopop"
    paper = "https://arxiv.org/abs/2406.08414"
    summary = "Blend DPO's logistic loss for small margins with an exponential one for large margins."

    name: Literal["discopop"] = "discopop"
    beta: PositiveFloat = 0.05
    """Scale of the log-ratios."""
    tau: PositiveFloat = 0.05
    """Temperature of the blend: the smaller, the sharper the change from one loss to the other."""


class SigmoidNormConfig(MarginConfig):
    """DPO on per-token log-ratios, Lambert et al. 2024 (SimPO's reward, with a reference)."""

    loss_type = "sigmoid_norm"
    paper = "https://arxiv.org/abs/2411.15124"
    summary = "Raise the chosen completion's log-ratio per token above the rejected one's."

    name: Literal["sigmoid_norm"] = "sigmoid_norm"
    beta: PositiveFloat = 5.0
    """Scale of the per-token log-ratios, which are some hundred times smaller than DPO's."""


class RDPOConfig(MarginConfig):
    """Length-regularised DPO (R-DPO), Park et al. 2024."""

    loss_type = "r_dpo"
    paper = "https://arxiv.org/abs/2403.19159"
    summary = "DPO whose reward pays for length: a longer chosen completion teaches less."

    name: Literal["r_dpo"] = "r_dpo"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios."""
    length_penalty: NonNegativeFloat = 0.01
    """Reward that one token costs (the paper's alpha); 0 is DPO."""
