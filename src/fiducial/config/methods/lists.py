"""Methods that learn from several completions of one prompt, best first; a pair is a list of two."""

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat

from fiducial.config.methods.method import MethodConfig


class PlackettLuceConfig(MethodConfig):
    """DPO on rankings, Rafailov et al. 2023, appendix A.3."""

    needs_reference = True
    num_completions = None
    paper = "https://arxiv.org/abs/2305.18290"
    summary = "Make the whole ranking likely: each completion above all that follow it. On pairs it is DPO."

    name: Literal["plackett_luce"] = "plackett_luce"
    beta: PositiveFloat = 0.1
    """Scale of the log-ratios."""


class InfoNCAConfig(MethodConfig):
    """Noise contrastive alignment as one classification, Chen et al. 2024."""

    needs_reference = True
    num_completions = None
    needs_scores = True
    paper = "https://arxiv.org/abs/2402.05369"
    summary = "Bring the shares that log-ratios give a prompt's completions to those their scores give them."

    name: Literal["info_nca"] = "info_nca"
    beta: PositiveFloat = 0.01
    """Scale of the log-ratios."""
    temperature: PositiveFloat = 1.0
    """What scores are divided by before the softmax (the paper's alpha): the smaller, the greedier."""


class NCAConfig(MethodConfig):
    """Noise contrastive alignment completion by completion, Chen et al. 2024."""

    needs_reference = True
    num_completions = None
    needs_scores = True
    paper = "https://arxiv.org/abs/2402.05369"
    summary = (
        "Tell each completion from the reference's by its score: the likelihood of good ones may not fall."
    )

    name: Literal["nca"] = "nca"
    beta: PositiveFloat = 0.01
    """Scale of the log-ratios."""
    temperature: PositiveFloat = 1.0
    """What scores are divided by before the softmax (the paper's alpha): the smaller, the greedier."""


class TPOConfig(MethodConfig):
    """Triple preference optimisation, Saeidi et al. 2024: from a gold, a preferred and a worse completion."""

    family = "tpo"
    loss_type = "sigmoid"
    needs_reference = False
    num_completions = 3
    paper = "https://arxiv.org/abs/2405.16681"
    summary = (
        "DPO without its reference on the second and third completion, supervised loss on the gold first."
    )

    name: Literal["tpo"] = "tpo"
    beta: PositiveFloat = 0.01
    """Scale of the log-probs."""
    gold_weight: NonNegativeFloat = 1.0
    """Weight of the gold completion's NLL per token (the paper's alpha)."""


class TPOLConfig(MethodConfig):
    """Triple preference optimisation on mean log-probs with a target margin, Saeidi et al. 2024."""

    family = "tpo"
    loss_type = "tpo-l"
    needs_reference = False
    num_completions = 3
    paper = "https://arxiv.org/abs/2405.16681"
    summary = (
        "SimPO on the second and third completion, supervised loss on the gold first: longer pays nothing."
    )

    name: Literal["tpo_l"] = "tpo_l"
    beta: PositiveFloat = 2.0
    """Scale of the mean log-probs."""
    target_margin: NonNegativeFloat = 1.6
    """Target margin of the rewards (the paper's gamma)."""
    gold_weight: NonNegativeFloat = 0.05
    """Weight of the gold completion's NLL per token (the paper's alpha)."""
