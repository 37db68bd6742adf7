"""What a loss returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """One value per group, unreduced: the trainer reduces once, over every group of the optimizer step."""

    loss: Float[Tensor, " groups"]
    metrics: Mapping[str, Tensor]
    """Numbers to be averaged and logged, detached, by the name they are logged under."""
    running: Mapping[str, float] = field(default_factory=dict)
    """What the loss carries from one optimizer step to the next."""
    counted: Mapping[str, Bool[Tensor, " groups"]] = field(default_factory=dict)
    """Which numbers of a metric count, where not all do. Picked out, they would have a size that a GPU is
    waited for."""

    @classmethod
    def of_rewards(
        cls,
        loss: Float[Tensor, " groups"],
        chosen: Float[Tensor, " groups"],
        rejected: Float[Tensor, " groups"],
    ) -> "LossOutput":
        """With metrics of rewards: beta times the log-ratio to the reference, or the log-prob without one.

        A tie counts as half an accurate pair: a policy that still equals its reference stands at 0.5.
        """
        chosen, rejected = chosen.detach(), rejected.detach()
        margins = chosen - rejected
        return cls(
            loss,
            {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": margins,
                "rewards/accuracies": 0.5 * (margins.sign() + 1),
            },
        )
