"""The reference's log-probs of all data, before step 1: whose they are, where they are kept, scoring them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fiducial.agreement import all_or_none
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.prepare import PreparedData
from fiducial.loading import Policy, Run, free_memory, load_second_model
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.known import remember
from fiducial.reference.cache.opening import open_store
from fiducial.reference.fill import fill, fill_from_server, warn
from fiducial.reference.identity import Identity, identify_served
from fiducial.reference.kinds import Source
from fiducial.reference.named_adapter import put_named_adapter, take_named_adapter
from fiducial.reference.noise import same_arithmetic
from fiducial.reference.predicted import identify_loaded
from fiducial.reference.sources import Served, build_scoring_reference
from fiducial.run_record import require_same_reference
from fiducial.training.failures import memory_explained


@dataclass(frozen=True, slots=True)
class ScoredAhead:
    """The records of a precomputed reference."""

    store: LogpStore
    noise: float
    """By how much records that were there already differ from what is scored now, in nats a token."""
    same_arithmetic: bool
    """Whether they were scored by the products the policy computes its own by."""


@memory_explained("scoring the reference")
def score_ahead(
    run: Run,
    policy: Policy,
    device: torch.device,
    *,
    datasets: Mapping[str, TokenizedDataset] | None = None,
) -> ScoredAhead | None:
    """Score the reference over all data, where the plan precomputes it, and forget any second model.

    Only what the store has no record of is scored. The policy must still hold the weights it starts from: a
    resumed run scores before it loads its checkpoint. `datasets`, by names for people, replace the run's.

    Raises:
        ModelError: the reference is not what it was when the run started.
    """
    if not run.precomputes:
        return None
    if run.plan.source is Source.ENDPOINT:
        return _ask_server(run, policy, _datasets(run.data) if datasets is None else datasets)
    second = load_second_model(run, device)
    scorer = second or policy.scorer
    put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
    store = open_records(run, identify_unchanged(run, scorer))
    reference = build_scoring_reference(run.plan, policy.scorer, second)
    noise = fill(
        store,
        _datasets(run.data) if datasets is None else datasets,
        reference,
        scorer,
        token_budget=policy.micro_batch_tokens,
        console=run.console,
        flush_seconds=run.cfg.reference.flush_seconds,
    )
    alike = same_arithmetic(policy.scorer, reference)
    del second, scorer, reference
    take_named_adapter(run.plan, policy.model)
    free_memory()
    return ScoredAhead(store, noise, alike)


def identify_reference(run: Run, policy: Policy, second: Scorer | None) -> Identity:
    """The identity of the run's reference.

    The policy is left with the adapter that is named for the reference, if there is one beside its own.

    Raises:
        ModelError: The reference's weights are kept elsewhere, and are not those of its files.
    """
    if run.plan.checkpoint is not None and run.plan.source is Source.ENDPOINT:
        return identify_served(run.plan.checkpoint)
    put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
    with all_or_none():
        return identify_loaded(run.cfg, run.plan, run.tokenizer, second or policy.scorer)


def _ask_server(run: Run, policy: Policy, datasets: Mapping[str, TokenizedDataset]) -> ScoredAhead:
    assert run.plan.checkpoint is not None, "a server was named"
    store = _store_of(run, _unchanged(run, identify_served(run.plan.checkpoint)))
    reference = build_scoring_reference(run.plan, policy.scorer)
    assert isinstance(reference, Served)
    fill_from_server(
        store,
        datasets,
        reference,
        policy.scorer,
        console=run.console,
        flush_seconds=run.cfg.reference.flush_seconds,
    )
    return ScoredAhead(store, 0.0, same_arithmetic=False)


def identify_unchanged(run: Run, scorer: Scorer) -> Identity:
    """The reference's identity, which must be the one the run's record has; before weights are sharded."""
    return _unchanged(run, identify_loaded(run.cfg, run.plan, run.tokenizer, scorer))


def _unchanged(run: Run, identity: Identity) -> Identity:
    if run.record is not None:
        for change in require_same_reference(run.record, identity.as_dict()):
            warn(run.console, f"the reference is the same as when the run started, but {change}.")
    return identity


def open_records(run: Run, identity: Identity) -> LogpStore:
    """The records of the run's reference, whose identity later plans are told."""
    remember(run.cfg, run.plan, identity.digest)
    return _store_of(run, identity)


def _store_of(run: Run, identity: Identity) -> LogpStore:
    return open_store(run.cfg, identity, tell=lambda sentence: warn(run.console, sentence))


def _datasets(data: PreparedData) -> dict[str, TokenizedDataset]:
    assert isinstance(data.train, TokenizedDataset), "streamed rows cannot be scored ahead"
    held_out = {"held-out": data.evaluation} if data.evaluation is not None else {}
    return {"training": data.train} | held_out
