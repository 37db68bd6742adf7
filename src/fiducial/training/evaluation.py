"""An evaluation is one optimizer step that is not taken: the whole evaluation set at once.

Losses that read a whole step, or are told something of it, would depend on how many groups an evaluation
batch holds and how many processes share them. So batches only bound what a forward pass holds: log-probs are
collected, a few numbers a completion, and the loss is taken once, on all of them from all processes.
"""

from collections.abc import Sequence

import torch

from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Comparison
from fiducial.training.gather import gather_comparisons
from fiducial.training.objective import Objective, Scored
from fiducial.training.weighing import share


class Evaluation:
    """What was scored so far of one evaluation on this process."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._scored: list[Comparison] = []
        self._ahead: list[Comparison] = []
        self._counts: list[int] = []

    @torch.no_grad()
    def score(
        self, passes: Sequence[Sequence[TokenizedGroup]], ahead: Sequence[Sequence[TokenizedGroup]]
    ) -> None:
        """Score more groups; if it fails, for lack of memory, nothing of them is kept."""
        foreknown = self.objective.score_ahead(ahead)
        scored = [self.objective.compare(each) for each in passes]
        self._ahead += foreknown
        self._scored += scored
        self._counts += self.objective.counts(passes)

    @torch.no_grad()
    def finish(self) -> Scored:
        """This process's groups, and what the loss of everyone's makes of them."""
        loss = self.objective.loss
        own = Comparison.concatenate(self._scored)
        known = self.objective.known(
            [Comparison.concatenate(self._ahead)] if self._ahead else [], self._counts
        )
        if not loss.whole_step:
            return Scored(own, loss(own, **known))
        everyone, place = gather_comparisons([own])
        output = loss(Comparison.concatenate(everyone), **known)
        before = sum(part.completions.num_groups for part in everyone[: place.start])
        groups = len(output.loss)
        return Scored(own, share(output, before, before + own.completions.num_groups, groups))
