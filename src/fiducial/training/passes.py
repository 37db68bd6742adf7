"""The forward passes of one optimizer step or evaluation batch, on every process equally many.

What the loss trains on and what it has scored before are cut each by itself: a pass is charged what it holds.
FSDP gathers weights in each pass, so a process with nothing left makes passes over an empty batch, of weight
0; one that made fewer would leave the others waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fiducial.data.micro_batches import COSTS, Load, cut, largest
from fiducial.data.tokenize import TokenizedGroup
from fiducial.training.gather import gather_numbers
from fiducial.training.objective import Objective

MicroBatches = list[list[TokenizedGroup]]


@dataclass(frozen=True, slots=True)
class Passes:
    """One process's share of a step."""

    trained: MicroBatches
    """What the loss reads; at least one pass, which may be empty."""
    ahead: MicroBatches
    """What is scored before, without gradient; none where the loss needs nothing of the kind."""
    num_groups: int
    """Groups of the step in all processes."""


def cut_step(groups: Sequence[TokenizedGroup], objective: Objective, budget: int) -> Passes:
    """Passes of at most `budget` tokens over what `objective` scores of `groups`."""
    trained, ahead = _cut(groups, objective, budget)
    own = [len(groups), max(len(trained), 1), len(ahead)]
    everyone = gather_numbers(own, objective.scorer.device)
    num_groups, _, _ = (sum(column) for column in zip(*everyone, strict=True))
    _, most_trained, most_ahead = (max(column) for column in zip(*everyone, strict=True))
    return Passes(_filled(trained, most_trained), _filled(ahead, most_ahead), num_groups)


def costliest(groups: Sequence[TokenizedGroup], objective: Objective, budget: int) -> tuple[int, bool]:
    """Tokens of the largest pass that `cut_step` makes, and whether every pass holds a single group."""
    micro_batches = [each for part in _cut(groups, objective, budget) for each in part]
    tokens = largest(micro_batches, cost=COSTS[objective.scorer.layout])
    return tokens, all(len(each) == 1 for each in micro_batches)


def floating_point_ops(groups: Sequence[TokenizedGroup], objective: Objective) -> int:
    """Of one step: 2 a weight and token forward, 2 backward, and 2 for the gradient of a trained weight."""
    parameters = list(objective.scorer.model.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    trained_weights = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    trained, ahead = (Load.of(part).tokens for part in objective.parts(groups))
    return (4 * weights + 2 * trained_weights) * trained + 2 * weights * ahead


def _cut(
    groups: Sequence[TokenizedGroup], objective: Objective, budget: int
) -> tuple[MicroBatches, MicroBatches]:
    cost = COSTS[objective.scorer.layout]
    trained, ahead = (cut(part, budget, cost=cost) for part in objective.parts(groups))
    return trained, ahead


def _filled(micro_batches: MicroBatches, passes: int) -> MicroBatches:
    return micro_batches + [[] for _ in range(passes - len(micro_batches))]
