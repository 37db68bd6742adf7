"""The forward passes of one optimizer step or evaluation batch, on every process equally many.

What the loss trains on and what it has scored before are cut each by itself: a pass is charged what it holds.
FSDP gathers weights in each pass, so a process makes as many as the one that needs most, over fewer tokens
each; with fewer groups than passes some are over an empty batch, of weight 0. One that made fewer would leave
the others waiting.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fiducial.data.batch import Layout
from fiducial.data.micro_batches import COSTS, Load, cut, largest, leveled
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

    def costliest(self, layout: Layout) -> tuple[int, bool]:
        """Token positions of the largest pass, and whether none holds more than a single group."""
        micro_batches = [*self.trained, *self.ahead]
        singly = all(len(each) <= 1 for each in micro_batches)
        return largest(micro_batches, cost=COSTS[layout]), singly


def cut_step(groups: Sequence[TokenizedGroup], objective: Objective, budget: int) -> Passes:
    """Passes of at most `budget` tokens over what `objective` scores of `groups`."""
    cost = COSTS[objective.scorer.layout]
    trained, ahead = (cut(part, budget, cost=cost) for part in objective.parts(groups))
    own = [len(groups), max(len(trained), 1), len(ahead)]
    everyone = gather_numbers(own, objective.scorer.device)
    num_groups, _, _ = (sum(column) for column in zip(*everyone, strict=True))
    _, most_trained, most_ahead = (max(column) for column in zip(*everyone, strict=True))
    return Passes(
        leveled(trained, most_trained, budget, cost=cost),
        leveled(ahead, most_ahead, budget, cost=cost),
        num_groups,
    )


def floating_point_ops(groups: Sequence[TokenizedGroup], objective: Objective) -> int:
    """Of one step: 2 a weight and token forward, 2 backward, and 2 for the gradient of a trained weight."""
    parameters = list(objective.scorer.model.parameters())
    weights = sum(parameter.numel() for parameter in parameters)
    trained_weights = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    trained, ahead = (Load.of(part).tokens for part in objective.parts(groups))
    return (4 * weights + 2 * trained_weights) * trained + 2 * weights * ahead
