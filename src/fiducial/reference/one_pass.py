"""A reference scored together with the policy, in one pass over what both have in common.

The policy passes first, and below the lowest layer that trains its pass is the reference's too, which goes on
from there. Two passes are the naive way, and what everything else that asks a reference still makes.
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
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import Trunk, decoder_layers, recorded, replayed
from fiducial.reference.sources import LiveReference, Reference

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
class OnTrunk:
    """A live reference that goes on from where the policy's lowest layers leave a batch."""

    reference: LiveReference
    scorer: Scorer
    """Scores the reference: the second model's, or the policy's own."""
    policy: Scorer
    depth: int
    """How many layers are computed once."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs of the batch in a pass of the reference's own."""
        return self.reference.token_logps(batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions of the batch in a pass of the reference's own."""
        return self.reference.distribution(batch)

    @contextmanager
    def beside_policy(self, batch: PackedBatch) -> Iterator[Answer]:
        """The policy's pass is watched; the answer passes the upper layers alone."""
        with self.watched(batch) as (_, answer):
            yield answer

    @contextmanager
    def watched(self, batch: PackedBatch) -> Iterator[tuple[Trunk, Answer]]:
        """As `beside_policy`, with what is seen."""
        trunk = Trunk(self.depth)

        def answer() -> TokenLogps | None:
            assert trunk.said is not None, "the policy has made no pass"
            with replayed(self.scorer.model, trunk):
                return self.reference.token_logps(batch)

        with recorded(self.policy.model, trunk):
            yield trunk, answer


def on_trunk(
    reference: LiveReference,
    scorer: Scorer,
    policy: Scorer,
    depth: int,
    groups: Sequence[TokenizedGroup],
    *,
    tolerance: float,
) -> OnTrunk:
    """`reference` on the policy's lowest `depth` layers, where that was measured to answer the same.

    Args:
        reference: What is scored live.
        scorer: Scores it.
        policy: Scores the policy.
        depth: Lowest layers that hold nothing that is trained.
        groups: A few real ones.
        tolerance: Nats a token that can be rounding.

    Raises:
        ModelError: It would not be the same reference.
    """
    if reason := _why_not(found := OnTrunk(reference, scorer, policy, depth), groups, tolerance):
        raise ModelError(f"policy and reference cannot share their lowest {depth} layers: {reason}.")
    return found


def _why_not(joint: OnTrunk, groups: Sequence[TokenizedGroup], tolerance: float) -> str | None:
    if any(len(decoder_layers(each.model)) < joint.depth for each in (joint.scorer, joint.policy)):
        return "there are not so many, one after another"
    if joint.scorer.layout != joint.policy.layout:
        return f"rows are {joint.policy.layout} for one and {joint.scorer.layout} for the other"
    batch = joint.policy.pack(groups).to(joint.policy.model.device)
    alone = joint.token_logps(batch)  # first: a scorer's first call also measures its head
    with torch.enable_grad(), joint.watched(batch) as (trunk, answer):
        joint.policy(batch)
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
