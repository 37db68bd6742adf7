"""What a loss is to the rest of the house: a function, and what it must be told and by whom.

Most losses read the log-probs of one pair at a time. A few need more, and say so here:

- `whole_step`: the function reads every group of the optimizer step at once, over all forward passes and
  processes (AOT sorts them), and so its value never depends on how a step is cut.
- `ahead`: some completions are scored without gradient before the step (KTO's mismatched ones), and
  `foreknow` turns them, over the whole step, into keyword arguments of the function.
- `count`: a number of each group that is known without scoring it; its mean over the step's groups is the
  keyword argument `mean_count`.
- `running`: numbers carried from one optimizer step to the next, and into checkpoints.

An evaluation is one step that is not taken: it holds every group of the evaluation set.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Comparison
from fiducial.losses.output import LossOutput

LossFunction = Callable[..., LossOutput]
"""`(comparison, **known)` to one value per group; `known` holds what `ahead`, `count` and `running` give."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss with its hyperparameters set."""

    function: LossFunction
    needs_reference: bool
    whole_step: bool = False
    num_completions: int | None = None
    """How many completions each group must have, where it is a certain number."""
    needs_better_first: bool = False
    """Whether the first completion of each group must have a higher score than the second."""
    trained: Callable[[TokenizedGroup], TokenizedGroup] | None = None
    """The part of a group that the function reads; None is all of it."""
    ahead: Callable[[TokenizedGroup], TokenizedGroup] | None = None
    """The part of a group that is scored without gradient before the step."""
    foreknow: Callable[[Comparison], Mapping[str, Tensor]] | None = None
    """What the function is told of the parts scored `ahead`."""
    count: Callable[[TokenizedGroup], int] | None = None
    running: Mapping[str, float] = field(default_factory=dict)
    """Numbers carried along, and what they start from."""
    statistics: tuple[str, ...] = ()
    """What the head must give beside the log-probs: names of `fiducial.logps`, as ON_POLICY."""
    needs_distribution: bool = False
    """Whether the policy must bring the statistic KL, and so a live reference its whole distributions."""
    token_weights: Callable[[PackedBatch], Tensor] | None = None
    """Weights of the tokens in a completion's log-prob, policy's and reference's alike."""

    def __call__(self, comparison: Comparison, **known: object) -> LossOutput:
        """The loss of every group in `comparison`."""
        if self.needs_reference:
            assert comparison.reference is not None, "this loss needs reference log-probs"
        return self.function(comparison, **known)

    def __post_init__(self) -> None:
        assert self.whole_step or not self.running, "only a loss of the whole step is called once a step"
        assert (self.ahead is None) == (self.foreknow is None)
