"""Which policy is the reference, and when it is scored: decided once, purely, before weights are touched.

`plan_reference` answers with the cheapest source that *equals* the reference the loss asks for. `_cheapest`
is the decision; `_objection` says why a source would not be that reference, and judges the user's choice and
our own alike. Nothing here imports torch.
"""

from fiducial.config.schema import RunConfig
from fiducial.errors import PlanError
from fiducial.reference import reasons
from fiducial.reference.facts import Facts
from fiducial.reference.holding import why_approximate
from fiducial.reference.idle import refuse_idle_cache, refuse_idle_holding
from fiducial.reference.kinds import VALID, Checkpoint, ReferencePlan, Schedule, Source, Sync
from fiducial.reference.shared import holds_frozen_once, shared_layers
from fiducial.reference.start import (
    adapter_starts_at_identity,
    frozen_copy_is_start,
    names_another_adapter,
    names_another_policy,
    no_reference_reason,
    on_starting_base,
    reads_distributions,
    resumes_adapter,
    streams,
    trains_outside_adapter,
    why_adapter_off_differs,
    why_cannot_move,
    why_checkpoint_differs,
    why_frozen_copy_differs,
    writes_through,
)
from fiducial.reference.vocabulary import (
    different_vocabulary,
    refuse_other_rows,
    vocabulary_difference,
)

__all__ = [
    "VALID",
    "Checkpoint",
    "ReferencePlan",
    "Schedule",
    "Source",
    "plan_live_reference",
    "plan_reference",
    "possible_plans",
]

SYNC_STEPS, MIXUP_ALPHA = 512, 0.6


def plan_reference(cfg: RunConfig, facts: Facts) -> ReferencePlan:
    """The cheapest source and schedule that equal the reference the loss asks for, and why.

    `facts` are what `gather_facts(cfg)` reads of the run's checkpoints.

    Raises:
        PlanError: a choice of the user's would not be that reference, or could have no effect.
    """
    _refuse_other_adapters(facts)
    if reason := no_reference_reason(cfg):
        return _no_reference(cfg, reason)
    plan = _plan(cfg, facts, _schedule(cfg))
    refuse_idle_cache(cfg, plan)
    return plan


def plan_live_reference(cfg: RunConfig, facts: Facts) -> ReferencePlan:
    """The plan for a trainer that scores its reference live unless the config itself says otherwise.

    Fiducial's own trainer scores ahead of time by default; another one must be handed a live reference. So
    `schedule: auto` means live here, and an explicit schedule (or `initial_policy`) stands.
    """
    _refuse_other_adapters(facts)
    if reason := no_reference_reason(cfg):
        return _no_reference(cfg, reason)
    asked = cfg.reference
    chosen = asked.schedule != "auto" or asked.source == "initial_policy" or asked.endpoint is not None
    return _plan(cfg, facts, _schedule(cfg) if chosen else Schedule.LIVE)


def _cheapest(cfg: RunConfig, facts: Facts, schedule: Schedule) -> Source:
    """The cheapest source that is the starting policy: the table of docs/reference.md, from the top."""
    precomputed = schedule is Schedule.PRECOMPUTED
    if cfg.adapter is None and not precomputed:
        return Source.SEPARATE_MODEL
    if cfg.adapter is None:
        return Source.INITIAL_POLICY
    if resumes_adapter(cfg) and frozen_copy_is_start(cfg, facts):
        return Source.FROZEN_ADAPTER
    moves = schedule is Schedule.SYNCED
    if adapter_starts_at_identity(cfg) and not trains_outside_adapter(cfg, facts) and not moves:
        return Source.ADAPTER_OFF
    if precomputed:
        return Source.INITIAL_POLICY
    return Source.FROZEN_ADAPTER if frozen_copy_is_start(cfg, facts) else Source.SEPARATE_MODEL


def _cheapest_of_another(cfg: RunConfig, facts: Facts) -> Source:
    if cfg.reference.endpoint is not None:
        return Source.ENDPOINT
    beside = names_another_adapter(cfg) and frozen_copy_is_start(cfg, facts)
    return Source.FROZEN_ADAPTER if beside else Source.SEPARATE_MODEL


def _schedule(cfg: RunConfig) -> Schedule:
    asked = cfg.reference
    if asked.schedule != "auto":
        return Schedule(asked.schedule)
    if reads_distributions(cfg):
        return Schedule.LIVE
    # Whoever asks for a second copy of the starting checkpoint wants it beside the policy.
    second_copy = asked.source == "separate_model" and not names_another_policy(cfg)
    return Schedule.LIVE if streams(cfg) or second_copy else Schedule.PRECOMPUTED


def _plan(cfg: RunConfig, facts: Facts, schedule: Schedule) -> ReferencePlan:
    automatic = (
        _cheapest_of_another(cfg, facts) if names_another_policy(cfg) else _cheapest(cfg, facts, schedule)
    )
    source = automatic if cfg.reference.source == "auto" else Source(cfg.reference.source)
    if objection := _objection(source, schedule, cfg, facts):
        works = automatic is not source and _objection(automatic, schedule, cfg, facts) is None
        remedy = reasons.remedy(cfg, schedule, automatic if works else None)
        raise PlanError(reasons.refusal(cfg, source, schedule, objection, remedy))
    refuse_idle_holding(cfg, source)
    _refuse_other_vocabulary(cfg, facts)
    return _described(cfg, facts, source, schedule)


def possible_plans(cfg: RunConfig, facts: Facts) -> tuple[ReferencePlan, ...]:
    """Every plan whose reference is the one the loss asks for; one that moves is another method."""
    if no_reference_reason(cfg):
        return ()
    return tuple(
        _described(cfg, facts, source, schedule)
        for source, schedules in VALID.items()
        for schedule in (Schedule.LIVE, Schedule.PRECOMPUTED)
        if schedule in schedules and _objection(source, schedule, cfg, facts) is None
    )


def _described(cfg: RunConfig, facts: Facts, source: Source, schedule: Schedule) -> ReferencePlan:
    why, shared = reasons.why(cfg, facts, source, schedule), shared_layers(cfg, facts, source, schedule)
    return ReferencePlan(
        source,
        schedule,
        _checkpoint(cfg),
        why if shared is None else f"{why} {shared.why}",
        reasons.notes(cfg, facts, source),
        equals_starting_policy=not names_another_policy(cfg),
        approximate=why_approximate(cfg, source),
        sync=_sync(cfg) if schedule is Schedule.SYNCED else None,
        writes_through=writes_through(cfg, schedule),
        shared_layers=0 if shared is None else shared.layers,
        gathered_once=shared is not None and shared.gathered_once,
        frozen_held_once=holds_frozen_once(cfg, source, schedule),
    )


def _objection(source: Source, schedule: Schedule, cfg: RunConfig, facts: Facts) -> str | None:
    """Why `source` on `schedule` is not the reference the loss asks for; None if it is."""
    if schedule is Schedule.PRECOMPUTED and streams(cfg):
        return "streaming data cannot be scored ahead of time, so nothing can be precomputed"
    if schedule is Schedule.PRECOMPUTED and reads_distributions(cfg):
        return (
            "the loss reads the reference's probability of every token, and only those of the data are kept"
        )
    if schedule is Schedule.SYNCED and (cannot := why_cannot_move(cfg, source, _sync(cfg))):
        return cannot
    if source is Source.NONE:
        return "this loss compares the policy with a reference"
    if other := _why_not_that_other(source, cfg):
        return other
    differs = {
        Source.ADAPTER_OFF: why_adapter_off_differs(cfg, facts),
        Source.FROZEN_ADAPTER: why_frozen_copy_differs(cfg, facts),
        Source.SEPARATE_MODEL: why_checkpoint_differs(cfg, facts),
        Source.ENDPOINT: None
        if schedule is Schedule.PRECOMPUTED
        else "a server is asked once, before step 1, and not at every step",
        Source.INITIAL_POLICY: None
        if schedule is Schedule.PRECOMPUTED
        else "the initial policy exists only before step 1 and cannot be scored beside the policy",
    }
    return differs[source]


def _why_not_that_other(source: Source, cfg: RunConfig) -> str | None:
    """Why `source` cannot be the other policy that was named, or is another one where none was."""
    if source is Source.ENDPOINT:
        return None if cfg.reference.endpoint is not None else "no server was named (reference.endpoint)"
    if not names_another_policy(cfg):
        return None
    if cfg.reference.endpoint is not None:
        return f"the reference is {cfg.reference.model} behind {cfg.reference.endpoint}"
    if source is Source.SEPARATE_MODEL or (source is Source.FROZEN_ADAPTER and names_another_adapter(cfg)):
        return None
    if cfg.reference.adapter is not None:
        return f"the reference is another policy: the base with {cfg.reference.adapter}"
    return f"the reference is another checkpoint ({_checkpoint(cfg).path}), a model of its own"


def _sync(cfg: RunConfig) -> Sync:
    """TR-DPO's setting, https://arxiv.org/abs/2404.09656, with the defaults other trainers have."""
    asked = cfg.reference
    return Sync(asked.sync_steps or SYNC_STEPS, asked.mixup_alpha or MIXUP_ALPHA)


def _checkpoint(cfg: RunConfig) -> Checkpoint:
    asked = cfg.reference
    if names_another_policy(cfg) and asked.model is not None:
        return Checkpoint(asked.model, asked.revision, asked.adapter, asked.endpoint)
    if names_another_policy(cfg):
        return Checkpoint(cfg.model.base_model, cfg.model.revision, asked.adapter)
    return Checkpoint(cfg.model.base_model, cfg.model.revision, cfg.adapter.path if cfg.adapter else None)


def _no_reference(cfg: RunConfig, reason: str) -> ReferencePlan:
    asked = cfg.reference.model_dump(exclude_defaults=True)
    idle = {key: value for key, value in asked.items() if (key, value) != ("source", "none")}
    if idle:
        settings = ", ".join(f"reference.{key}: {value}" for key, value in idle.items())
        raise PlanError(
            f"{settings} cannot have an effect. {reason} Remove it, or set `rl` to a method that compares "
            "with a reference (dpo, ipo, kto)."
        )
    return ReferencePlan(Source.NONE, None, None, reason)


def _refuse_other_vocabulary(cfg: RunConfig, facts: Facts) -> None:
    """Refuse a named checkpoint that reads other token ids, as far as files alone tell."""
    if facts.reference is None or on_starting_base(cfg):
        return
    if facts.vocabulary is not None and facts.reference_vocabulary is not None:
        difference = vocabulary_difference(facts.vocabulary, facts.reference_vocabulary)
        if difference:
            raise PlanError(different_vocabulary(facts.reference.location, difference))
    refuse_other_rows(cfg, facts.model.sizes.vocab_size, facts.reference.sizes.vocab_size)


def _refuse_other_adapters(facts: Facts) -> None:
    for key, adapter in {
        "lora_model_dir": facts.adapter,
        "reference.adapter": facts.reference_adapter,
    }.items():
        if adapter is None or adapter.peft_type == "LORA":
            continue
        raise PlanError(
            f"{key}: {adapter.location} holds a {adapter.peft_type} adapter, and "
            "`adapter: lora` can go on only with LoRA. Prompt and prefix tuning shift the positions that are "
            "scored, so the policy and its reference would not be comparable. Merge it into the base model "
            "first, or give a LoRA adapter."
        )
