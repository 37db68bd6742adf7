"""What a plan tells its user: why this reference, what to watch for, and what to write instead."""

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.kinds import Schedule, Source
from fiducial.reference.start import (
    names_another_policy,
    reads_distributions,
    resumes_adapter,
    streams,
    why_adapter_off_differs,
    writes_through,
)

_HELD = {
    Source.SEPARATE_MODEL: "a second model is held throughout",
    Source.FROZEN_ADAPTER: "a frozen copy of the adapter is held",
    Source.ADAPTER_OFF: "no copy of anything is held",
}


def why(cfg: RunConfig, facts: Facts, source: Source, schedule: Schedule) -> str:
    """Two plain sentences: which policy it is, and when it is scored."""
    return f"{_identity(cfg, facts, source)} {_moment(cfg, source, schedule)}"


def notes(cfg: RunConfig, facts: Facts, source: Source) -> tuple[str, ...]:
    """What is right in this plan and still surprises people."""
    second = source is Source.SEPARATE_MODEL
    off_differs = cfg.adapter is not None and why_adapter_off_differs(cfg, facts)
    found = []
    if off_differs and not second:
        found.append(
            "Handed to a trainer that only switches adapters off, this run would be compared with the wrong "
            f"policy: {off_differs}."
        )
    if source is Source.FROZEN_ADAPTER and not off_differs:
        found.append("adapter_off would be the same policy, without a copy of the adapter.")
    if second and cfg.reference.dtype not in {None, cfg.model.dtype}:
        found.append(
            f"The reference is held in {cfg.reference.dtype} and the policy in {cfg.model.dtype}: rewards at "
            "step 0 are zero only up to that rounding."
        )
    if cfg.adapter is not None and cfg.adapter.bias != "none" and facts.model.has_biases is False:
        found.append(
            "This checkpoint's linear layers have no biases, so the adapter's bias setting trains none."
        )
    return (*found, *_vocabularies(facts), *facts.notes)


def refusal(cfg: RunConfig, source: Source, schedule: Schedule, objection: str, remedy: str) -> str:
    """The error for a source that would not be the reference."""
    asked = f"reference.source: {source}"
    if cfg.reference.schedule != "auto":
        asked += f" with reference.schedule: {schedule}"
    elif schedule is Schedule.LIVE:
        asked += ", scored live,"
    method = cfg.method and (cfg.method.family or cfg.method.name)
    return f"{asked} would not be the reference that rl: {method} needs: {objection}. {remedy}"


def remedy(cfg: RunConfig, schedule: Schedule, works: Source | None) -> str:
    """What to write instead; `works` is the automatic choice where that would be right."""
    if schedule is Schedule.PRECOMPUTED and (streams(cfg) or reads_distributions(cfg)):
        known = "live, or leave it out" if reads_distributions(cfg) else "auto, or streaming: false"
        return f"Write reference.schedule: {known}."
    if schedule is Schedule.SYNCED and names_another_policy(cfg):
        return "Remove reference.model, or write reference.schedule: precomputed."
    if works is not None:
        return f"Write reference.source: auto, which picks {works} here."
    if schedule is Schedule.SYNCED:
        return "Write reference.mixup_alpha: 1, train without adapter, or leave reference.schedule out."
    if streams(cfg):
        return "Write streaming: false with reference.source: auto, so that it can be scored before step 1."
    return "Write reference.source: auto with reference.schedule: precomputed, to score it before step 1."


def _identity(cfg: RunConfig, facts: Facts, source: Source) -> str:
    if names_another_policy(cfg):
        return f"The reference is another policy than the one the run starts from: {cfg.reference.model}."
    if cfg.adapter is None:
        return "Without an adapter the starting policy is the checkpoint itself."
    if source is Source.ADAPTER_OFF:
        return (
            "The new adapter starts without effect and nothing outside it is trained, so the policy with its "
            "adapter off is the starting policy at every step."
        )
    if resumes_adapter(cfg):
        return f"The run resumes {cfg.adapter.path}, so the starting policy is the base with that adapter."
    if differs := why_adapter_off_differs(cfg, facts):
        return f"Switching the adapter off would not give the starting policy: {differs}."
    return "The new adapter starts without effect, so the starting policy is the base checkpoint."


def _moment(cfg: RunConfig, source: Source, schedule: Schedule) -> str:
    if schedule is Schedule.SYNCED:
        return f"{_while_it_moves(cfg)} {_HELD[source][0].upper()}{_HELD[source][1:]}."
    if schedule is Schedule.LIVE and writes_through(cfg, schedule):
        return (
            "A streamed row cannot be scored ahead: it is scored when it is first seen, and read from the "
            f"cache from then on; {_HELD[source]}."
        )
    if schedule is Schedule.LIVE:
        cause = "as a live reference"
        if reads_distributions(cfg):
            cause = "the loss reads its probability of every token, which is too much to keep"
        return f"It is scored at every step ({cause}); {_HELD[source]}."
    if source is Source.SEPARATE_MODEL:
        return "It scores the data once before step 1 and is then freed."
    return "The policy scores the data itself, once, before step 1; no copy is held."


def _while_it_moves(cfg: RunConfig) -> str:
    if reads_distributions(cfg):
        return "It moves towards the policy every few steps, and is scored at every step."
    when = "when it is first seen after a move" if streams(cfg) else "right after a move, for the steps until"
    rest = "" if streams(cfg) else " the next"
    return (
        f"It moves towards the policy every few steps. A row is scored once between two moves: {when}{rest}."
    )


def _vocabularies(facts: Facts) -> tuple[str, ...]:
    if facts.reference is None or facts.reference.sizes.vocab_size == facts.model.sizes.vocab_size:
        return ()
    return (
        f"The reference's vocabulary has {facts.reference.sizes.vocab_size} entries and the policy's "
        f"{facts.model.sizes.vocab_size}: both must split text into the same tokens.",
    )
