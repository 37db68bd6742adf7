"""Where reference log-probs come from while training. The trainer knows only `Reference`.

Every source scores without gradient, in eval mode (a reference has no dropout), and leaves the model as it
found it: training modes, adapters and `requires_grad` are back before the policy's backward begins.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from peft import PeftModel
from torch import nn

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenIds
from fiducial.errors import CacheError
from fiducial.logps import TokenLogps
from fiducial.model.adapters import REFERENCE_ADAPTER, active_adapter, adapters_off, freeze_copy
from fiducial.model.divergence import Distribution
from fiducial.model.mode import evaluating
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore
from fiducial.reference.endpoint import Endpoint
from fiducial.reference.plan import ReferencePlan, Schedule, Source
from fiducial.sending import sent


@runtime_checkable
class Reference(Protocol):
    """Answers with the reference's log-probs of a batch, or None where there is no reference."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs aligned with `batch.target` and on its device, without gradient."""
        ...


@runtime_checkable
class LiveReference(Reference, Protocol):
    """One that is scored beside the policy, and so has whole distributions to give."""

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs as above, and what each token was drawn from, of one forward pass."""
        ...


@runtime_checkable
class OnPolicysWeights(LiveReference, Protocol):
    """One that is the policy's own model, with other adapters."""

    def switch(self, part: nn.Module) -> AbstractContextManager[None]:
        """Inside, `part` of the policy's model computes for the reference."""
        ...


@dataclass(frozen=True, slots=True)
class NoReference:
    """The loss needs none."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """None."""
        return None


@dataclass(frozen=True, slots=True)
class InitialPolicy:
    """The policy as it is: the reference only before step 1, to fill a store."""

    scorer: Scorer

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """Log-probs under the policy's weights of this moment."""
        return _score_frozen(self.scorer, batch)


@dataclass(frozen=True, slots=True)
class AdapterOff:
    """The policy with its adapter switched off."""

    scorer: Scorer

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """Log-probs under the policy's base."""
        with self.switch(self.scorer.model):
            return _score_frozen(self.scorer, batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions under the policy's base."""
        with self.switch(self.scorer.model):
            return _distribution(self.scorer, batch)

    def switch(self, part: nn.Module) -> AbstractContextManager[None]:
        """Inside, `part` of the policy's model has its adapter switched off."""
        return adapters_off(part)


@dataclass(frozen=True, slots=True)
class FrozenAdapter:
    """The policy's base with the frozen copy of the adapter it started from."""

    scorer: Scorer
    name: str = REFERENCE_ADAPTER

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """Log-probs under the base and the adapter `name`."""
        with self.switch(self.scorer.model):
            return _score_frozen(self.scorer, batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions under the base and the adapter `name`."""
        with self.switch(self.scorer.model):
            return _distribution(self.scorer, batch)

    def switch(self, part: nn.Module) -> AbstractContextManager[None]:
        """Inside, `part` of the policy's model computes with the adapter `name`."""
        return active_adapter(part, self.name)


@dataclass(frozen=True, slots=True)
class SeparateModel:
    """A second model."""

    scorer: Scorer

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """Log-probs under the second model, laid out the way it can read."""
        return _onto(_score_frozen(self.scorer, self._laid_out(batch)), batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions under the second model."""
        logps, distribution = _distribution(self.scorer, self._laid_out(batch))
        return _onto(logps, batch), distribution.to(batch.target.device)

    def _laid_out(self, batch: PackedBatch) -> PackedBatch:
        # Both layouts hold the same scored tokens in the same order.
        packed = batch.segments is not None
        return batch if packed == (self.scorer.layout == "packed") else self.scorer.pack(batch.groups)


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a server, which is asked before training alone."""

    endpoint: Endpoint

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """Log-probs the server gives, one request a completion."""
        values = [
            torch.from_numpy(self.endpoint.logps(group.prompt.tolist(), completion.tolist()))
            for group in batch.groups
            for completion in group.completions
        ]
        joined = torch.cat(values) if values else torch.zeros(0)
        return TokenLogps(sent(joined, batch.target.device), batch.sequence, batch.num_sequences)


@dataclass(frozen=True, slots=True)
class Precomputed:
    """Log-probs scored before training."""

    store: LogpStore
    same_arithmetic: bool = True
    """Whether by the products that the policy computes its own by."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        """The stored log-probs of the batch's completions.

        Raises:
            CacheError: A completion has none. It is never taken as zero.
        """
        values = [self._values(key, len(completion)) for key, completion in _completions(batch)]
        joined = torch.cat(values) if values else torch.zeros(0)
        return TokenLogps(sent(joined, batch.target.device), batch.sequence, batch.num_sequences)

    def _values(self, key: str, num_tokens: int) -> torch.Tensor:
        values = self.store.get(key)
        if values is None:
            raise CacheError(
                f"completion {key} has no reference log-probs in {self.store.folder}. They are scored before "
                "training from the weights it starts from; start the run again so that they are."
            )
        if len(values) != num_tokens:
            raise CacheError(
                f"completion {key} has {num_tokens} tokens, but {len(values)} reference log-probs are "
                f"stored in {self.store.folder}: the records are damaged. Remove that folder; they are "
                "scored again."
            )
        return torch.from_numpy(values)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a source is made of."""

    plan: ReferencePlan
    policy: Scorer
    second: Scorer | None = None
    """The second model's, where the plan has one."""


def _frozen_adapter(parts: Parts) -> Reference:
    model = parts.policy.model
    assert isinstance(model, PeftModel), "only an adapter can be copied"
    if REFERENCE_ADAPTER not in model.peft_config:
        assert parts.plan.equals_starting_policy, "the adapter named for the reference was not loaded"
        freeze_copy(model)
    return FrozenAdapter(parts.policy)


def _separate_model(parts: Parts) -> Reference:
    assert parts.second is not None, "the plan keeps a second model, and none was loaded"
    return SeparateModel(parts.second)


def _served(parts: Parts) -> Reference:
    checkpoint = parts.plan.checkpoint
    assert checkpoint is not None, "a server was not named"
    assert checkpoint.endpoint is not None, "a server was not named"
    return Served(Endpoint(checkpoint.endpoint, checkpoint.path))


SOURCES: dict[Source, Callable[[Parts], Reference]] = {
    Source.NONE: lambda parts: NoReference(),
    Source.ADAPTER_OFF: lambda parts: AdapterOff(parts.policy),
    Source.FROZEN_ADAPTER: _frozen_adapter,
    Source.SEPARATE_MODEL: _separate_model,
    Source.INITIAL_POLICY: lambda parts: InitialPolicy(parts.policy),
    Source.ENDPOINT: _served,
}
"""From the plan's source to what scores it."""


def build_reference(
    plan: ReferencePlan,
    scorer: Scorer,
    reference_scorer: Scorer | None = None,
    store: LogpStore | None = None,
) -> Reference:
    """What the trainer asks. It may add an adapter: call it before the model is wrapped."""
    if plan.schedule is Schedule.PRECOMPUTED:
        assert store is not None, "the plan is precomputed, and there is no store"
        return Precomputed(store)
    assert plan.source is not Source.INITIAL_POLICY, "the initial policy cannot be scored beside the policy"
    return SOURCES[plan.source](Parts(plan, scorer, reference_scorer))


def build_scoring_reference(
    plan: ReferencePlan, scorer: Scorer, reference_scorer: Scorer | None = None
) -> Reference:
    """What fills the store before step 1, when the policy is what a frozen copy would hold."""
    assert plan.schedule is Schedule.PRECOMPUTED, "nothing is scored ahead of time"
    copied = plan.source is Source.FROZEN_ADAPTER and plan.equals_starting_policy
    source = Source.INITIAL_POLICY if copied else plan.source
    return SOURCES[source](Parts(plan, scorer, reference_scorer))


def _score_frozen(scorer: Scorer, batch: PackedBatch) -> TokenLogps:
    with torch.no_grad(), evaluating(scorer.model):
        return _onto(scorer(batch), batch)


def _distribution(scorer: Scorer, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
    with torch.no_grad(), evaluating(scorer.model):
        logps, distribution = scorer.distribution(batch)
    return _onto(logps, batch), distribution


def _onto(logps: TokenLogps, batch: PackedBatch) -> TokenLogps:
    return replace(logps, values=logps.values.to(batch.target.device), sequence=batch.sequence)


def _completions(batch: PackedBatch) -> Iterator[tuple[str, TokenIds]]:
    for group in batch.groups:
        yield from zip(group.keys, group.completions, strict=True)
