"""Everything before step 1, and before evaluation: decided, read, loaded, scored, proved.

run    = read_run(cfg)                the plan, the tokenizer, the data; no weights yet
policy = load_policy(run, …)          the model that trains, in the layout it allows
ahead  = score_ahead(run, policy)     the reference's log-probs, where the plan precomputes them
judged = prove(run, policy, ahead)    the reference the trainer asks, measured against the policy
"""

from dataclasses import dataclass, replace

import torch

from fiducial.agreement import all_or_none
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.loading import (
    Policy,
    Run,
    free_memory,
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
from fiducial.processes import is_first_process
from fiducial.reference.approximation import Approximation, measure_approximation
from fiducial.reference.cache import LogpStore
from fiducial.reference.everywhere import require_same_everywhere
from fiducial.reference.fill import tell_checked, warn
from fiducial.reference.identity import Identity
from fiducial.reference.kept import Kept
from fiducial.reference.kinds import Source
from fiducial.reference.moving import Follower, build_follower
from fiducial.reference.named_adapter import put_named_adapter
from fiducial.reference.one_pass import in_one_pass
from fiducial.reference.sources import (
    InitialPolicy,
    LiveReference,
    NoReference,
    Precomputed,
    Reference,
    SeparateModel,
    build_reference,
)
from fiducial.reference.spot_check import spot_check
from fiducial.reference.verify import Proof, prove_reference, require_adapter_off, require_steady
from fiducial.scoring_ahead import (
    ScoredAhead,
    identify_reference,
    identify_unchanged,
    open_records,
    score_ahead,
)
from fiducial.training.failures import memory_explained
from fiducial.training.objective import Objective

__all__ = [
    "Policy",
    "ProvedReference",
    "Run",
    "ScoredAhead",
    "build_objective",
    "identify_reference",
    "load_policy",
    "load_second_model",
    "main_console",
    "measure_error",
    "prove",
    "read_run",
    "score_ahead",
    "typical_groups",
]


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
        ModelError: the reference is not what it was when the run started, or not the same in every process;
            or the policy's training passes are random.
    """
    groups = typical_groups(run.data.sample if on is None else on)
    if run.plan.source is Source.ADAPTER_OFF:
        require_adapter_off(policy.scorer, groups)
    second = None if run.precomputes else _second_model(run, policy, device)
    reference = _planned(run, policy, second, ahead)
    if isinstance(reference, NoReference):
        return ProvedReference(reference, groups, None)
    with all_or_none():
        require_steady(policy.scorer, groups)
    identity = _identity(run, second or policy.scorer, ahead)
    approximation = measure_error(run, policy, reference, groups)
    with all_or_none():
        proof = prove_reference(
            policy.scorer,
            reference,
            groups,
            expected_equal=run.plan.equals_starting_policy and approximation is None,
            pass_tokens=policy.micro_batch_tokens,
            known_noise=0.0 if ahead is None else ahead.noise,
        )
    require_same_everywhere(proof, groups)
    scorer, tolerance = second or policy.scorer, proof.tolerance
    reference = _in_one_pass(run, policy, reference, scorer, groups=groups, tolerance=tolerance)
    if run.plan.kept and not run.precomputes:
        assert identity is not None, "records are written through"
        reference = _kept(run, policy, reference, second, open_records(run, identity))
    follower = None
    if run.plan.sync is not None:
        follower = build_follower(policy.model, None if second is None else second.model, run.plan.sync)
    return ProvedReference(reference, groups, proof, identity, follower, approximation)


def _second_model(run: Run, policy: Policy, device: torch.device) -> Scorer | None:
    """The model beside the policy, if there is one, with the policy's own tensors as far as planned."""
    second = load_second_model(run, device)
    if second is not None and run.plan.frozen_held_once:
        share_frozen_weights(policy.model, second.model)
        free_memory()
    return second


def _planned(run: Run, policy: Policy, second: Scorer | None, ahead: ScoredAhead | None) -> Reference:
    """What answers for the reference, as planned."""
    if ahead is None:
        put_named_adapter(run.plan, policy.model, pickle=run.cfg.model.allow_pickle_weights)
    reference = build_reference(run.plan, policy.scorer, second, None if ahead is None else ahead.store)
    if ahead is not None and isinstance(reference, Precomputed):
        return replace(reference, same_arithmetic=ahead.same_arithmetic)
    return reference


def _identity(run: Run, scorer: Scorer, ahead: ScoredAhead | None) -> Identity | None:
    """Which weights the reference is; None in processes that need not know."""
    if ahead is not None:
        return ahead.store.identity
    with all_or_none():
        # Weights are hashed once, and by other processes only where they open the records by it.
        needed = is_first_process() or run.plan.writes_through
        return identify_unchanged(run, scorer) if needed else None


def measure_error(
    run: Run, policy: Policy, reference: Reference, groups: list[TokenizedGroup]
) -> Approximation | None:
    """The error of a reference that is held less exactly than the policy; None where it is not.

    Raises:
        TrainingError: it is so large that this is another model.
    """
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
        free_memory()


def build_objective(run: Run, policy: Policy, judged: ProvedReference) -> Objective:
    """What is minimised, and measured on the way."""
    assert run.cfg.method is not None
    logged = (ENTROPY,) if run.cfg.output.log_entropy else ()
    return Objective(policy.scorer, judged.reference, build_loss(run.cfg.method), logged=logged)


def _in_one_pass(
    run: Run,
    policy: Policy,
    reference: Reference,
    scorer: Scorer,
    *,
    groups: list[TokenizedGroup],
    tolerance: float,
) -> Reference:
    """`reference` in the policy's pass as far as planned; as it is where each has a pass of its own."""
    if not (run.plan.shared_layers or run.plan.gathered_once):
        return reference
    assert isinstance(reference, LiveReference), "only a live reference shares a pass"
    try:
        with all_or_none():  # a process with other passes would leave the others waiting
            return in_one_pass(
                reference,
                scorer,
                policy.scorer,
                run.plan.shared_layers,
                groups,
                tolerance=tolerance,
                in_step=run.plan.gathered_once,
            )
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
