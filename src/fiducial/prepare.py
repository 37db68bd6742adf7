"""Everything before step 1, and before evaluation: decided, read, loaded, scored, proved.

run    = read_run(cfg)                the plan, the tokenizer, the data; no weights yet
policy = load_policy(run, …)          the model that trains, in the layout it allows
ahead  = score_ahead(run, policy)     the reference's log-probs, where the plan precomputes them
judged = prove(run, policy, ahead)    the reference the trainer asks, measured against the policy
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fiducial.agreement import all_or_none
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.prepare import PreparedData
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.loading import (
    Policy,
    Run,
    is_first_process,
    load_exact_model,
    load_policy,
    load_second_model,
    main_console,
    read_run,
    typical_groups,
)
from fiducial.logps import ENTROPY
from fiducial.losses import build_loss
from fiducial.model.held_once import share_frozen_weights
from fiducial.model.scoring import Scorer
from fiducial.reference.approximation import Approximation, measure_approximation
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.known import remember
from fiducial.reference.cache.opening import open_store
from fiducial.reference.fill import fill, fill_from_server, tell_checked, warn
from fiducial.reference.identity import Identity, identify_served
from fiducial.reference.kept import Kept
from fiducial.reference.kinds import Source
from fiducial.reference.moving import Follower, build_follower
from fiducial.reference.named_adapter import put_named_adapter, take_named_adapter
from fiducial.reference.noise import same_arithmetic
from fiducial.reference.one_pass import on_trunk
from fiducial.reference.predicted import identify_loaded
from fiducial.reference.sources import (
    InitialPolicy,
    LiveReference,
    NoReference,
    Precomputed,
    Reference,
    SeparateModel,
    Served,
    build_reference,
    build_scoring_reference,
)
from fiducial.reference.spot_check import spot_check
from fiducial.reference.verify import Proof, prove_reference, require_adapter_off
from fiducial.run_record import require_same_reference
from fiducial.training.failures import memory_explained
from fiducial.training.objective import Objective

__all__ = [
    "Policy",
    "ProvedReference",
    "Run",
    "ScoredAhead",
    "build_objective",
    "identify_reference",
    "is_first_process",
    "load_policy",
    "load_second_model",
    "main_console",
    "prove",
    "read_run",
    "score_ahead",
    "typical_groups",
]


@dataclass(frozen=True, slots=True)
class ScoredAhead:
    """The records of a precomputed reference."""

    store: LogpStore
    noise: float
    """By how much records that were there already differ from what is scored now, in nats a token."""
    same_arithmetic: bool
    """Whether they were scored by the products the policy computes its own by."""


@dataclass(frozen=True, slots=True)
class ProvedReference:
    """What the trainer asks for the reference's log-probs, and what was measured of it before step 1."""

    reference: Reference
    groups: list[TokenizedGroup]
    """The groups it was measured on."""
    proof: Proof | None
    """None where there is no reference. Where answers are kept, the reference itself was measured."""
    identity: Identity | None = None
    """Which weights it was before step 1; None without a reference, and in all processes but the first where
    they keep no records."""
    follower: Follower | None = None
    """What moves the reference, where the plan has it follow the policy."""
    approximation: Approximation | None = None
    """How far it is from the exact reference, where it is held less exactly."""


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
    with all_or_none():
        put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
    store = _open_store(run, _identify(run, scorer))
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
    _free()
    return ScoredAhead(store, noise, alike)


def identify_reference(run: Run, policy: Policy, second: Scorer | None) -> Identity:
    """The identity of the run's reference.

    The policy is left with the adapter that is named for the reference, if there is one beside its own.

    Raises:
        ModelError: The reference's weights are kept elsewhere, and are not those of its files.
    """
    if run.plan.checkpoint is not None and run.plan.source is Source.ENDPOINT:
        return identify_served(run.plan.checkpoint)
    with all_or_none():
        put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
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


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@memory_explained("proving the reference")
def prove(
    run: Run,
    policy: Policy,
    ahead: ScoredAhead | None,
    device: torch.device,
    *,
    on: TokenizedDataset | None = None,
) -> ProvedReference:
    """The reference the trainer asks, measured against the policy on a few groups of `on`, or of the run's.

    Raises:
        PlanError: switching the adapter off is not the starting policy.
        TrainingError: the reference should be the starting policy, and is not.
        ModelError: the reference is not what it was when the run started.
    """
    groups = typical_groups(run.data.sample if on is None else on)
    if run.plan.source is Source.ADAPTER_OFF:
        require_adapter_off(policy.scorer, groups)
    second = None if run.precomputes else _second_model(run, policy, device)
    if not run.precomputes:
        with all_or_none():
            put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
    reference = build_reference(run.plan, policy.scorer, second, None if ahead is None else ahead.store)
    if ahead is not None and isinstance(reference, Precomputed):
        reference = replace(reference, same_arithmetic=ahead.same_arithmetic)
    if isinstance(reference, NoReference):
        return ProvedReference(reference, groups, None)
    identity = None
    if ahead is not None:
        identity = ahead.store.identity
    else:
        with all_or_none():
            # Weights are hashed once, and by other processes only where they open the records by it.
            if is_first_process() or run.plan.writes_through:
                identity = _identify(run, second or policy.scorer)
    approximation = _measured(run, policy, reference, groups)
    proof = prove_reference(
        policy.scorer,
        reference,
        groups,
        expected_equal=run.plan.equals_starting_policy and approximation is None,
        pass_tokens=policy.micro_batch_tokens,
        known_noise=0.0 if ahead is None else ahead.noise,
    )
    scorer, tolerance = second or policy.scorer, proof.tolerance
    reference = _in_one_pass(run, policy, reference, scorer, groups=groups, tolerance=tolerance)
    if run.plan.kept and not run.precomputes:
        assert identity is not None, "records are written through"
        reference = _kept(run, policy, reference, second, _open_store(run, identity))
    follower = None
    if run.plan.sync is not None:
        follower = build_follower(policy.model, None if second is None else second.model, run.plan.sync)
    return ProvedReference(reference, groups, proof, identity, follower, approximation)


def _second_model(run: Run, policy: Policy, device: torch.device) -> Scorer | None:
    """The model beside the policy, if there is one, with the policy's own tensors as far as planned."""
    second = load_second_model(run, device)
    if second is not None and run.plan.frozen_held_once:
        share_frozen_weights(policy.model, second.model)
        _free()
    return second


def _measured(
    run: Run, policy: Policy, reference: Reference, groups: list[TokenizedGroup]
) -> Approximation | None:
    """The error of a reference that is held less exactly than the policy; None where it is not."""
    how = run.plan.approximate
    if how is None:
        return None
    with all_or_none():
        starts_there = run.plan.equals_starting_policy
        exact: Reference = (
            InitialPolicy(policy.scorer) if starts_there else SeparateModel(load_exact_model(run))
        )
    try:
        return measure_approximation(reference, exact, policy.scorer, groups, how)
    finally:
        del exact
        _free()


def build_objective(run: Run, policy: Policy, judged: ProvedReference) -> Objective:
    """What is minimised, and measured on the way."""
    assert run.cfg.method is not None
    logged = (ENTROPY,) if run.cfg.output.log_entropy else ()
    return Objective(policy.scorer, judged.reference, build_loss(run.cfg.method), logged=logged)


def _identify(run: Run, scorer: Scorer) -> Identity:
    """The reference's identity, which must be the one the run's record has; before weights are sharded."""
    return _unchanged(run, identify_loaded(run.cfg, run.plan, run.tokenizer, scorer))


def _unchanged(run: Run, identity: Identity) -> Identity:
    if run.record is not None:
        for change in require_same_reference(run.record, identity.as_dict()):
            warn(run.console, f"the reference is the same as when the run started, but {change}.")
    return identity


def _open_store(run: Run, identity: Identity) -> LogpStore:
    """The records of the run's reference, whose identity later plans are told."""
    remember(run.cfg, run.plan, identity.digest)
    return _store_of(run, identity)


def _store_of(run: Run, identity: Identity) -> LogpStore:
    return open_store(run.cfg, identity, tell=lambda sentence: warn(run.console, sentence))


def _in_one_pass(
    run: Run,
    policy: Policy,
    reference: Reference,
    scorer: Scorer,
    *,
    groups: list[TokenizedGroup],
    tolerance: float,
) -> Reference:
    """`reference` on the layers it shares with the policy; as it is where there are none."""
    if not run.plan.shared_layers:
        return reference
    assert isinstance(reference, LiveReference), "only a live reference shares a pass"
    try:
        return on_trunk(reference, scorer, policy.scorer, run.plan.shared_layers, groups, tolerance=tolerance)
    except ModelError as error:
        warn(run.console, f"{error} Each has a pass of its own.")
        return reference


def _kept(run: Run, policy: Policy, live: Reference, second: Scorer | None, store: LogpStore) -> Kept:
    """`live` behind the cache, whose records it is compared with on the first rows."""
    checked = spot_check(run.data.sample, live, second or policy.scorer, store)
    tell_checked(run.console, "streamed", checked)
    return Kept(
        live,
        policy.scorer,
        store,
        tell=lambda sentence: warn(run.console, sentence),
        flush_seconds=run.cfg.reference.flush_seconds,
    )


def _datasets(data: PreparedData) -> dict[str, TokenizedDataset]:
    assert isinstance(data.train, TokenizedDataset), "streamed rows cannot be scored ahead"
    held_out = {"held-out": data.evaluation} if data.evaluation is not None else {}
    return {"training": data.train} | held_out
