"""What is minimised: the loss of a policy's and a reference's log-probs, as one callable."""

from collections.abc import Sequence
from dataclasses import dataclass

from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import SequenceLogps
from fiducial.losses import Loss
from fiducial.losses.output import LossOutput
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import Reference


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch's log-probs and what the loss makes of them."""

    policy: SequenceLogps
    reference: SequenceLogps | None
    output: LossOutput


@dataclass(frozen=True, slots=True)
class Objective:
    """Scores groups under policy and reference. Which loss and which reference they are is not known here."""

    scorer: Scorer
    reference: Reference
    loss: Loss

    def __call__(self, groups: Sequence[TokenizedGroup]) -> Scored:
        """One forward pass; the policy's log-probs and the loss carry gradient where grad mode is on."""
        batch = self.scorer.pack(groups).to(self.scorer.model.device)
        reference = self.reference.token_logps(batch)
        policy = self.scorer(batch).reduce()
        compared = reference.reduce() if reference is not None else None
        return Scored(policy, compared, self.loss(policy, compared))
