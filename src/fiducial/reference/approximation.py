"""How far a reference that is held less exactly is from the exact one, measured on real groups."""

from collections.abc import Sequence
from dataclasses import dataclass

from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import Reference

LARGEST_MEAN = 1.0
"""Nats a token beyond which it is no approximation but another model."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """The error of a reference's log-probs, in nats a token."""

    how: str
    """How it is held, in words."""
    mean_difference: float
    max_difference: float
    num_tokens: int

    def sentence(self) -> str:
        """What was measured, for people."""
        return (
            f"The reference is an approximation, {self.how}: on {self.num_tokens} tokens its log-probs "
            f"differ from the exact reference's by {self.mean_difference:.2g} nats a token on average, at "
            f"most {self.max_difference:.2g}."
        )


def measure_approximation(
    reference: Reference, exact: Reference, policy: Scorer, groups: Sequence[TokenizedGroup], how: str
) -> Approximation:
    """The difference between `reference` and the `exact` one on `groups`, which `policy` lays out.

    Raises:
        TrainingError: It is so large that this is another model.
    """
    batch = policy.pack(groups)
    answers = [each.token_logps(batch) for each in (reference, exact)]
    values = [each.values.float().cpu() for each in answers if each is not None]
    assert len(values) == 2, "there is no reference to measure"
    difference = (values[0] - values[1]).abs()
    found = Approximation(how, difference.mean().item(), difference.max().item(), len(difference))
    if not found.mean_difference <= LARGEST_MEAN:
        raise TrainingError(
            f"the reference is {how}, and its log-probs differ from the exact reference's by "
            f"{found.mean_difference:.2g} nats a token on average: that is another model, no approximation. "
            "Hold it as the policy is held (remove reference.load_in_4bit, load_in_8bit and dtype)."
        )
    return found
