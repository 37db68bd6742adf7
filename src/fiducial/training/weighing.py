"""The loss of a whole optimizer step, shared out to the forward passes it was cut into.

On detached numbers the loss L of the step is cheap to take and to differentiate. In the pass that holds
log-prob x, Σ ∂L/∂x · x has the gradient that L has: the chain rule, so nothing is approximated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fiducial.logps import Comparison, SequenceLogps
from fiducial.losses.output import LossOutput


@dataclass(frozen=True, slots=True)
class WeighedPass:
    """One forward pass's share of its step's loss."""

    comparison: Comparison
    output: LossOutput
    weights: tuple[Float[Tensor, " sequences"], ...]
    """Gradient of the step's loss with respect to each of the policy's quantities."""

    def with_gradient(self, policy: SequenceLogps) -> LossOutput:
        """The share's value, with the gradient that the step's loss has through `policy`."""
        change = torch.zeros_like(self.output.loss)
        for quantity, weight in zip(quantities(policy), self.weights, strict=True):
            change = change.index_add(
                0, self.comparison.completions.group, weight * (quantity - quantity.detach())
            )
        return replace(self.output, loss=self.output.loss + change)


def weigh(parts: Sequence[Comparison], loss: Callable[[Comparison], LossOutput]) -> list[WeighedPass]:
    """The share of each of `parts`, which together are the optimizer step."""
    leaves = [_leaves(part) for part in parts]
    with torch.enable_grad():
        output = loss(Comparison.concatenate(leaves))
        given = [quantity for leaf in leaves for quantity in quantities(leaf.policy)]
        gradients = iter(
            torch.autograd.grad(output.loss.sum(), given, allow_unused=True, materialize_grads=True)
        )
    shares: list[WeighedPass] = []
    start, total = 0, sum(part.completions.num_groups for part in parts)
    for part in parts:
        stop = start + part.completions.num_groups
        weights = tuple(next(gradients) for _ in quantities(part.policy))
        shares.append(WeighedPass(part, share(output, start, stop, total), weights))
        start = stop
    return shares


def quantities(policy: SequenceLogps) -> list[Float[Tensor, " sequences"]]:
    """Everything of the policy that a loss may depend on."""
    return [policy.sum, *(policy.statistics[name] for name in sorted(policy.statistics))]


def _leaves(part: Comparison) -> Comparison:
    policy = part.policy
    statistics = {name: values.detach().requires_grad_() for name, values in policy.statistics.items()}
    return replace(
        part, policy=SequenceLogps(policy.sum.detach().requires_grad_(), policy.num_tokens, statistics)
    )


def share(output: LossOutput, start: int, stop: int, total: int) -> LossOutput:
    """The groups `start` up to `stop` of `total`; a metric of the step as a whole goes to the first ones."""
    assert len(output.loss) == total, "a loss gives one value a group"
    metrics = {
        name: values[start:stop] if len(values) == total else values[: len(values) if start == 0 else 0]
        for name, values in output.metrics.items()
    }
    counted = {name: which[start:stop] for name, which in output.counted.items()}
    return LossOutput(output.loss[start:stop].detach(), metrics, counted=counted)
