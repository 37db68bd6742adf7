"""How a function of pairs becomes a loss, and what such functions share.

Notation: policy and reference hold the log-probs of whole completions; a log-ratio is policy minus reference;
the margin is the chosen log-ratio minus the rejected one. Keyword names are the field names of the method's
config.
"""

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fiducial.config.methods import MethodConfig
from fiducial.config.methods.dpo import MODIFIERS
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import ON_POLICY, Comparison, PairLogps
from fiducial.losses.loss import Loss
from fiducial.losses.modifiers import modified, token_weights
from fiducial.losses.output import LossOutput

PerPair = Float[Tensor, " pairs"]


def pairwise(
    function: Callable[..., LossOutput],
    *,
    whole_step: bool = False,
    count: Callable[[TokenizedGroup], int] | None = None,
    running: Mapping[str, float] | None = None,
) -> Callable[[MethodConfig], Loss]:
    """A row of the table: `function` of policy, reference (if it needs one) and hyperparameters.

    Args:
        function: also takes what the step tells it by keyword: `mean_count`, and the names of `running`.
        whole_step: whether it reads all pairs of an optimizer step at once; so it does if it has `running`.
        count: a number of each group, whose mean over the step is `mean_count`.
        running: numbers carried from step to step, and what they start from.
    """

    def build(method: MethodConfig) -> Loss:
        settings = method.model_dump(exclude={"name"})
        modifiers = {name: settings.pop(name) for name in MODIFIERS if name in settings}
        whole = modified(function, modifiers)

        def loss(comparison: Comparison, **known: object) -> LossOutput:
            policy, reference = comparison.policy.pairs(), comparison.reference
            if method.needs_scores:
                score = comparison.completions.score.to(comparison.policy.sum)
                known = {**known, "better_by": score[0::2] - score[1::2]}
            if method.needs_reference:
                assert reference is not None
                return whole(policy, reference.pairs(), **settings, **known)
            return whole(policy, **settings, **known)

        return Loss(
            loss,
            method.needs_reference,
            whole_step=whole_step or bool(running),
            count=count,
            running=running or {},
            statistics=(ON_POLICY,) if modifiers.get("use_weighting") else (),
            needs_better_first=settings.get("offset_scale") == "log",
            needs_distribution=method.needs_distribution,
            token_weights=token_weights(modifiers.get("ld_alpha")),
        )

    return build


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[PerPair, PerPair]:
    """Of the chosen and of the rejected completions."""
    return policy.chosen.sum - reference.chosen.sum, policy.rejected.sum - reference.rejected.sum


def with_rewards(loss: PerPair, policy: PairLogps, reference: PairLogps, *, beta: float) -> LossOutput:
    """`loss`, and the rewards that are logged for every loss with a reference: beta times the log-ratios."""
    chosen, rejected = log_ratios(policy, reference)
    return LossOutput.of_rewards(loss, beta * chosen, beta * rejected)


def smoothed_logistic(margin: PerPair, label_smoothing: float) -> PerPair:
    """-(1 - ε) log σ(margin) - ε log σ(-margin)."""
    wrong = label_smoothing
    return -(1 - wrong) * F.logsigmoid(margin) - wrong * F.logsigmoid(-margin)
