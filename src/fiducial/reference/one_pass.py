"""A reference scored together with the policy, in one pass over what both have in common.

Below the lowest layer that trains the policy's pass is the reference's too, which goes on from there. Above,
each computes for itself: the reference afterwards, or where weights are gathered for each call of a layer, in
the same call. Two passes are the naive way, and what everything else that asks a reference still makes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.logps import TokenLogps
from fiducial.model.divergence import Distribution
from fiducial.model.in_step import Beside, InStepError, in_step
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import Trunk, decoder_layers, recorded, replayed
from fiducial.reference.sources import LiveReference, OnPolicysWeights, Reference

Answer = Callable[[], TokenLogps | None]


@runtime_checkable
class BesidePolicy(Protocol):
    """A reference that has less to compute where it sees the policy's own pass."""

    def beside_policy(self, batch: PackedBatch) -> AbstractContextManager[Answer]:
        """Inside, the policy scores `batch`; afterwards the answer gives the reference's log-probs of it."""
        ...


@contextmanager
def beside_policy(reference: Reference, batch: PackedBatch) -> Iterator[Answer]:
    """Inside, the policy scores `batch`; afterwards the answer gives `reference`'s log-probs of it.

    A reference with passes of its own makes its own here before, while nothing is kept for backward yet.
    """
    if isinstance(reference, BesidePolicy):
        with reference.beside_policy(batch) as answer:
            yield answer
    else:
        logps = reference.token_logps(batch)
        yield lambda: logps


@dataclass(frozen=True, slots=True)
class OnePass:
    """A live reference that goes on from where the policy's lowest layers leave a batch, or beside it."""

    reference: LiveReference
    scorer: Scorer
    """Scores the reference: the second model's, or the policy's own."""
    policy: Scorer
    depth: int
    """How many of the lowest layers are computed once."""
    in_step: bool = False
    """Whether each layer above them computes for both in one call."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs of the batch in a pass of the reference's own."""
        return self.reference.token_logps(batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions of the batch in a pass of the reference's own."""
        return self.reference.distribution(batch)

    @contextmanager
    def beside_policy(self, batch: PackedBatch) -> Iterator[Answer]:
        """The policy's pass is watched; the answer passes what is left, the upper layers or only the head."""
        with self.watched(batch) as (_, answer):
            yield answer

    @contextmanager
    def watched(self, batch: PackedBatch, *, traced: bool = False) -> Iterator[tuple[Trunk, Answer]]:
        """As `beside_policy`, with what is seen; `traced` back to what trains in it."""
        trunk, seeing = self._seeing(traced)

        def answer() -> TokenLogps | None:
            assert trunk.said is not None, "the policy has made no pass"
            with replayed(self.scorer.model, trunk):
                return self.reference.token_logps(batch)

        with seeing:
            yield trunk, answer

    def _seeing(self, traced: bool) -> tuple[Trunk, AbstractContextManager[None]]:
        """What the reference has no more to pass, and the watching of the policy's pass for it."""
        if not self.in_step:
            trunk = Trunk(self.depth)
            return trunk, recorded(self.policy.model, trunk)
        assert isinstance(self.reference, OnPolicysWeights), (
            "its weights are not those of the policy's layers"
        )
        trunk = Trunk(len(decoder_layers(self.policy.model)))
        beside = Beside(trunk, self.reference.switch, traced)
        return trunk, in_step(self.policy.model, self.depth, beside)


def in_one_pass(
    reference: LiveReference,
    scorer: Scorer,
    policy: Scorer,
    depth: int,
    groups: Sequence[TokenizedGroup],
    *,
    tolerance: float,
    in_step: bool = False,
) -> OnePass:
    """`reference` in the policy's pass, where that was measured to answer the same.

    Args:
        reference: What is scored live.
        scorer: Scores it.
        policy: Scores the policy.
        depth: Lowest layers that hold nothing that is trained, and are computed once.
        groups: A few real ones.
        tolerance: Nats a token that can be rounding.
        in_step: Whether each layer above computes for both in one call.

    Raises:
        ModelError: It would not be the same reference.
    """
    found = OnePass(reference, scorer, policy, depth, in_step)
    if reason := _why_not(found, groups, tolerance):
        what = "pass each layer in one call" if in_step else f"share their lowest {depth} layers"
        raise ModelError(f"policy and reference cannot {what}: {reason}.")
    return found


def _why_not(joint: OnePass, groups: Sequence[TokenizedGroup], tolerance: float) -> str | None:
    if any(len(decoder_layers(each.model)) < joint.depth for each in (joint.scorer, joint.policy)):
        return "there are not so many, one after another"
    if joint.scorer.layout != joint.policy.layout:
        return f"rows are {joint.policy.layout} for one and {joint.scorer.layout} for the other"
    batch = joint.policy.pack(groups).to(joint.policy.device)
    alone = joint.token_logps(batch)  # first: a scorer's first call also measures its head
    try:
        with torch.enable_grad(), joint.watched(batch, traced=True) as (trunk, answer):
            joint.policy(batch)
    except InStepError as error:
        return str(error)
    if trunk.has_gradient:
        return "something that trains has a part in them"
    together = answer()
    assert together is not None, "there is no reference"
    assert alone is not None, "there is no reference"
    difference = (together.values - alone.values).abs().max().item()
    if difference <= tolerance:
        return None
    return (
        f"log-probs change by up to {difference:.2g} nats a token, so more than hidden states go up from them"
    )
