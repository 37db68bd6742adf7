"""Losses of the DPO family that read every pair of an optimizer step at once."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from fiducial.config.methods.dpo import ReferencedConfig, WeightedConfig, WrongLabels
from fiducial.config.methods.method import MethodConfig


class BCOPairConfig(WeightedConfig):
    """Binary classifier optimisation from pairs, Jung et al. 2024."""

    loss_type = "bco_pair"
    paper = "https://arxiv.org/abs/2404.04656"
    summary = "Classify chosen against rejected completions by whether their reward is above the mean."

    name: Literal["bco_pair"] = "bco_pair"
    beta: PositiveFloat = 0.01
    """Scale of the log-ratios."""
    running_delta: bool = True
    """Compare with the mean of all rewards so far (the paper's delta); false compares with 0."""


class AOTConfig(ReferencedConfig):
    """Distributional alignment by optimal transport, paired, Melnyk et al. 2024."""

    loss_type = "aot"
    paper = "https://arxiv.org/abs/2406.05882"
    summary = "Make the policy's gaps between chosen and rejected dominate the reference's, rank by rank."

    name: Literal["aot"] = "aot"
    beta: PositiveFloat = 0.1
    """Scale of the gaps."""
    label_smoothing: WrongLabels = 0.0
    """Probability that a preference label is wrong."""


class AOTUnpairedConfig(ReferencedConfig):
    """Distributional alignment by optimal transport, unpaired, Melnyk et al. 2024."""

    loss_type = "aot_unpaired"
    paper = "https://arxiv.org/abs/2406.05882"
    summary = "Make the chosen log-ratios dominate the rejected ones, rank by rank, whatever the pairs."

    name: Literal["aot_unpaired"] = "aot_unpaired"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios."""
    label_smoothing: WrongLabels = 0.0
    """Probability that a preference label is wrong."""


class BetaDPOConfig(ReferencedConfig):
    """DPO with dynamic beta, Wu et al. 2024."""

    loss_type = "beta_dpo"
    paper = "https://arxiv.org/abs/2407.08639"
    summary = "DPO whose beta grows with the step's mean margin of log-ratios, on pairs that are no outliers."

    name: Literal["beta_dpo"] = "beta_dpo"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios before it is adapted."""
    beta_scaling: NonNegativeFloat = 0.6
    """How strongly beta follows the step's mean margin of log-ratios (the paper's alpha); 0 keeps it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Weight of the steps before in the running mean and deviation of margins (the paper's m)."""
    keep_share: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Share of the step's pairs that are trained on (the paper's rho); 1 keeps all."""


class SFTConfig(MethodConfig):
    """Supervised fine-tuning on the chosen completions, as a part of weighted losses."""

    family = "dpo"
    loss_type = "sft"
    needs_reference = False
    paper = "https://arxiv.org/abs/2411.10442"
    summary = "Raise the mean log-prob of all chosen tokens of a step; the rejected completion is not read."

    name: Literal["sft"] = "sft"
