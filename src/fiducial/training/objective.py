"""What is minimised: the loss of a policy's and a reference's log-probs, one forward pass at a time.

Which loss and which reference they are is not known here, only what the loss must be told before the first
gradient of an optimizer step. A loss that reads the whole step is exact however the step is cut: all passes
are scored without gradient first, the loss of the whole step is taken on those numbers, and its gradient with
respect to each log-prob becomes that log-prob's weight in the pass that carries gradient (Gao et al. 2021,
https://arxiv.org/abs/2101.06983, do this for contrastive losses). It costs one more forward pass, and only
where a step has several passes or processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError
from fiducial.logps import Comparison, SequenceLogps, TokenLogps
from fiducial.losses import Loss
from fiducial.losses.output import LossOutput
from fiducial.model.mode import evaluating
from fiducial.model.randomness import Replay
from fiducial.model.scoring import Scorer
from fiducial.processes import num_processes
from fiducial.reference.one_pass import beside_policy
from fiducial.reference.sources import LiveReference, Reference
from fiducial.training.gather import gather_comparisons, gather_mean
from fiducial.training.weighing import WeighedPass, weigh

Groups = Sequence[TokenizedGroup]


@dataclass(frozen=True, slots=True)
class Scored:
    """A micro-batch's log-probs and what the loss makes of them."""

    comparison: Comparison
    output: LossOutput


@dataclass(slots=True)
class Objective:
    """Scores groups under policy and reference."""

    scorer: Scorer
    reference: Reference
    loss: Loss
    running: dict[str, float] = field(default_factory=dict)
    """Numbers that the loss carries from step to step."""
    logged: tuple[str, ...] = ()
    """What the head is asked for besides what the loss reads, to be logged: names of `fiducial.logps`."""

    def __post_init__(self) -> None:
        self.running = dict(self.loss.running) | self.running

    def parts(self, groups: Groups) -> tuple[list[TokenizedGroup], list[TokenizedGroup]]:
        """What the loss reads of each group, and what is scored before it, if anything is."""
        trained, ahead = self.loss.trained, self.loss.ahead
        return (
            [trained(group) for group in groups] if trained else list(groups),
            [ahead(group) for group in groups] if ahead else [],
        )

    def step(self, passes: Sequence[Groups], ahead: Sequence[Groups] = ()) -> "Step":
        """The forward passes of one optimizer step on this process: as many as on every other process.

        Args:
            passes: those that the loss reads, over what `parts` gives first.
            ahead: those that are scored before, without gradient, over what it gives second.
        """
        return Step(self, passes, ahead)

    def score_ahead(self, passes: Sequence[Groups]) -> list[Comparison]:
        """Each pass without gradient, and without dropout, which would only blur an estimate.

        Nothing of them is logged.
        """
        with torch.no_grad(), evaluating(self.scorer.model):
            return [self.compare(each, logged=()) for each in passes]

    def known(self, ahead: Sequence[Comparison], counts: Sequence[float]) -> dict[str, object]:
        """What the loss is told of all processes' groups, from what was scored ahead here and `counts`."""
        known = dict[str, object](self.running)
        if self.loss.foreknow is not None:
            known |= self.loss.foreknow(Comparison.concatenate(gather_comparisons(ahead)[0]))
        if self.loss.count is not None:
            known["mean_count"] = gather_mean(counts, self.scorer.device)
        return known

    def counts(self, passes: Sequence[Groups]) -> list[int]:
        """The number that the loss counts of each group, if it counts one."""
        count = self.loss.count
        return [] if count is None else [count(group) for each in passes for group in each]

    def compare(self, groups: Groups, *, logged: tuple[str, ...] | None = None) -> Comparison:
        """One forward pass; the policy's log-probs carry gradient where grad mode is on.

        `logged` replaces what the objective logs.
        """
        self._require_comparable(groups)
        batch, weights = self._packed(groups)
        reference, policy = self._score(batch, self._statistics(self.logged if logged is None else logged))
        return Comparison(
            policy.reduce(weights),
            reference.reduce(weights) if reference is not None else None,
            batch.completions,
        )

    def policy(self, groups: Groups) -> SequenceLogps:
        """The policy's part of `compare`, which asks the reference for its distributions alone."""
        if self.loss.needs_distribution:
            return self.compare(groups).policy
        batch, weights = self._packed(groups)
        return self.scorer(batch, self._statistics(self.logged)).reduce(weights)

    def _packed(self, groups: Groups) -> tuple[PackedBatch, Tensor | None]:
        """The groups on the model's device, and what the loss weighs their tokens by."""
        batch = self.scorer.pack(groups).to(self.scorer.device)
        return batch, None if self.loss.token_weights is None else self.loss.token_weights(batch)

    def _statistics(self, logged: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.loss.statistics, *logged)))

    def _score(self, batch: PackedBatch, statistics: tuple[str, ...]) -> tuple[TokenLogps | None, TokenLogps]:
        """Reference and policy."""
        if not self.loss.needs_distribution:
            with beside_policy(self.reference, batch) as reference_logps:
                policy = self.scorer(batch, statistics)
            return reference_logps(), policy
        assert isinstance(self.reference, LiveReference), "the plan of such a loss is live"
        reference, distribution = self.reference.distribution(batch)
        return reference, self.scorer(batch, statistics, distribution)

    def _require_comparable(self, groups: Groups) -> None:
        """Rows of a stream may differ from those it was judged by."""
        wanted = self.loss.num_completions
        for group in groups:
            if wanted is not None and len(group.completions) != wanted:
                raise DataError(
                    f"datasets: a row has {len(group.completions)} completions, and the loss compares "
                    f"{wanted}. Leave such rows out, or take rl: plackett_luce, which compares any number."
                )
            if self.loss.needs_better_first and not group.scores[0] > group.scores[1]:
                raise DataError(
                    "datasets: a row scores its two completions equally, and the loss takes the logarithm of "
                    "their difference. Leave such rows out, or write odpo_offset: identity."
                )


class Step:
    """The forward passes of one optimizer step, each called once and in order."""

    def __init__(self, objective: Objective, passes: Sequence[Groups], ahead: Sequence[Groups]) -> None:
        self.objective = objective
        self.loss = objective.loss
        self.passes = passes
        self._known = objective.known(objective.score_ahead(ahead), objective.counts(passes))
        self._running: Mapping[str, float] = {}
        self._weighed: list[WeighedPass] = []
        self._replays: list[Replay] = []
        if self.loss.whole_step and (len(self.passes) > 1 or num_processes() > 1):
            self._weigh()

    def __call__(self, index: int) -> Scored:
        """Pass number `index`, whose loss carries gradient."""
        if not self._weighed:
            comparison = self.objective.compare(self.passes[index])
            return Scored(comparison.detach(), self._loss(comparison))
        weighed = self._weighed[index]
        with self._replays[index].again():
            policy = self.objective.policy(self.passes[index])
        return Scored(weighed.comparison, weighed.with_gradient(policy))

    def finish(self) -> None:
        """The step is taken: keep what the loss carries on to the next."""
        self.objective.running |= self._running

    def _loss(self, comparison: Comparison) -> LossOutput:
        output = self.loss(comparison, **self._known)
        self._running = output.running
        return output

    def _weigh(self) -> None:
        """The whole step's loss on numbers alone, and its gradient with respect to each of them."""
        parts: list[Comparison] = []
        with torch.no_grad():
            for each in self.passes:
                self._replays.append(Replay.from_here(self.objective.scorer.device))
                parts.append(self.objective.compare(each))
        everyone, own = gather_comparisons(parts)
        self._weighed = weigh(everyone, self._loss)[own]
