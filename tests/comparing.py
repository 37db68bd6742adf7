"""What a loss reads, from plain tensors."""

from dataclasses import replace
from typing import Any

import torch

from fiducial.config.methods import MethodConfig
from fiducial.logps import KL, Comparison, Completions, SequenceLogps
from fiducial.losses import Loss, build_loss


def comparison(
    policy: SequenceLogps,
    reference: SequenceLogps | None = None,
    *,
    size: int = 2,
    scores: list[float] | None = None,
) -> Comparison:
    """Sequences as groups of `size` completions."""
    count = len(policy.sum)
    score = torch.full((count,), torch.nan) if scores is None else torch.tensor(scores)
    return Comparison(policy, reference, Completions.of(torch.arange(count) // size, score))


def comparison_for(
    config: type[MethodConfig], policy: SequenceLogps, reference: SequenceLogps | None = None
) -> Comparison:
    """Chosen and rejected completions in turn, as `config` takes them: pairs, or labelled ones alone."""
    if config.needs_distribution:
        kl = torch.tensor([0.3, 0.5] * (len(policy.sum) // 2)).to(policy.sum)
        policy = replace(policy, statistics={KL: kl})
    if config.num_completions == 3:
        return comparison(policy, reference, size=3)
    if config.paired:
        scores = [2.0, 0.5] * (len(policy.sum) // 2) if config.needs_scores else None
        return comparison(policy, reference, scores=scores)
    labels = [1.0 - 2 * (number % 2) for number in range(len(policy.sum))]
    return comparison(policy, reference, size=1, scores=labels)


def foreknown(config: type[MethodConfig]) -> dict[str, Any]:
    """What the loss of `config` is told of a whole step: KTO's reference point, SFT's mean token count."""
    loss = build_loss(config())
    known: dict[str, Any] = dict(loss.running) if loss.count is None else {"mean_count": 4.0}
    return known | {"point": torch.tensor(0.0)} if config.mismatched else known


def step_facts(loss: Loss, step: Comparison) -> dict[str, Any]:
    """What `loss` is told of a step of pairs before its first pass."""
    chosen = step.policy.num_tokens[0::2].double().mean().item()
    return dict(loss.running) | ({} if loss.count is None else {"mean_count": chosen})
