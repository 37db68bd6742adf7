"""What a loss returns."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossOutput:
    """One value per pair, unreduced: the trainer reduces once, over every pair of the optimizer step."""

    loss: Float[Tensor, " pairs"]
    chosen_rewards: Float[Tensor, " pairs"]
    """beta times the log-ratio to the reference (or the log-prob, where a loss has none), detached."""
    rejected_rewards: Float[Tensor, " pairs"]
