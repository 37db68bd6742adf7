"""What a plan tells its user: why this reference, what to watch for, and what to write instead."""

from fiducial.config.schema import RunConfig
from fiducial.reference.adapter_facts import DRAWN_INIT
from fiducial.reference.facts import Facts
from fiducial.reference.holding import why_approximate
from fiducial.reference.kinds import Schedule, Source
from fiducial.reference.precision import sees_gpu
from fiducial.reference.shared import holds_frozen_once
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
    off_differs = (
        cfg.adapter is not None and not names_another_policy(cfg) and why_adapter_off_differs(cfg, facts)
    )
    found = []
    if off_differs and not second:
        found.append(
            "Handed to a trainer that only switches adapters off, this run would be compared with the wrong "
            f"policy: {off_differs}."
        )
    if source is Source.FROZEN_ADAPTER and not off_differs and not names_another_policy(cfg):
        found.append("adapter_off would be the same policy, without a copy of the adapter.")
    if approximate := why_approximate(cfg, source):
        found.append(
            f"The reference is {approximate}, and the policy is not: rewards at step 0 are zero only up to "
            "that rounding, which is measured before step 1."
        )
    if cfg.reference.device == "cpu" and not sees_gpu():
        found.append(
            "reference.device: cpu is so already: this machine has no GPU, and the policy is on the CPU too."
        )
    if cfg.adapter is not None and cfg.adapter.bias != "none" and facts.model.has_biases is False:
        found.append(
            "This checkpoint's linear layers have no biases, so the adapter's bias setting trains none."
        )
    if cfg.adapter is not None and str(cfg.adapter.init_lora_weights).startswith(DRAWN_INIT):
        found.append(
            f"peft_init_lora_weights: {cfg.adapter.init_lora_weights} splits the base by random numbers that "
            "no adapter file holds: loaded with PEFT, the trained one is another model. Use what fiducial "
            "merge makes of it, or write pissa."
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
        return _remedy_for_live(cfg)
    if works is None and names_another_policy(cfg):
        return _remedy_for_another(cfg, schedule)
    if works is not None:
        return f"Write reference.source: auto, which picks {works} here."
    if schedule is Schedule.SYNCED:
        return _remedy_for_moving(cfg)
    if streams(cfg):
        return "Write streaming: false with reference.source: auto, so that it can be scored before step 1."
    return "Write reference.source: auto with reference.schedule: precomputed, to score it before step 1."


def _remedy_for_moving(cfg: RunConfig) -> str:
    """Where no source could follow the policy."""
    if cfg.adapter is None:
        return "Remove reference.load_in_8bit, reference.load_in_4bit and reference.offload."
    if cfg.adapter.bias != "none" and cfg.adapter.path is None:  # an adapter that is resumed has its own
        return "Write peft_bias: none, train without adapter, or leave reference.schedule out."
    if cfg.reference.mixup_alpha != 1:
        return "Write reference.mixup_alpha: 1, train without adapter, or leave reference.schedule out."
    return "Remove reference.schedule, or train without adapter."


def _remedy_for_live(cfg: RunConfig) -> str:
    """Where nothing can be scored ahead."""
    if cfg.reference.endpoint is not None:
        return _remedy_for_server(cfg)
    known = "live, or leave it out" if reads_distributions(cfg) else "auto, or streaming: false"
    return f"Write reference.schedule: {known}."


def _remedy_for_server(cfg: RunConfig) -> str:
    write = "streaming: false" if streams(cfg) else "reference.schedule: precomputed"
    if reads_distributions(cfg):
        write = "another loss, for example rl: dpo"
    return f"Write {write}, or name a checkpoint without reference.endpoint."


def _remedy_for_another(cfg: RunConfig, schedule: Schedule) -> str:
    """Where no source could be the other policy that was named."""
    if cfg.reference.endpoint is not None:
        return _remedy_for_server(cfg)
    if schedule is Schedule.SYNCED:
        return "Remove reference.model and reference.adapter, or write reference.schedule: precomputed."
    return "Write reference.model: with that adapter merged into its base, and remove reference.adapter."


def _identity(cfg: RunConfig, facts: Facts, source: Source) -> str:
    if names_another_policy(cfg):
        return f"The reference is another policy than the one the run starts from: {_named(cfg)}."
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


def _named(cfg: RunConfig) -> str:
    asked = cfg.reference
    name = asked.model or cfg.model.base_model
    if asked.adapter is not None:
        name += f" with the adapter {asked.adapter}"
    return name if asked.endpoint is None else f"{name}, served by {asked.endpoint}"


def _moment(cfg: RunConfig, source: Source, schedule: Schedule) -> str:
    if schedule is Schedule.PRECOMPUTED:
        return _ahead(cfg, source)
    held = _held(cfg, source, schedule)
    if schedule is Schedule.SYNCED:
        return f"{_while_it_moves(cfg)} {held[0].upper()}{held[1:]}."
    if writes_through(cfg, schedule):
        return (
            "A streamed row cannot be scored ahead: it is scored when it is first seen, and read from the "
            f"cache from then on; {held}."
        )
    cause = "as a live reference"
    if reads_distributions(cfg):
        cause = "the loss reads its probability of every token, which is too much to keep"
    return f"It is scored at every step ({cause}); {held}."


def _held(cfg: RunConfig, source: Source, schedule: Schedule) -> str:
    if source is Source.FROZEN_ADAPTER and names_another_policy(cfg):
        return "the adapter that was named is held"
    if holds_frozen_once(cfg, source, schedule):
        return "the weights that are trained are held a second time"
    return _HELD[source]


def _ahead(cfg: RunConfig, source: Source) -> str:
    if source is Source.SEPARATE_MODEL:
        return "It scores the data once before step 1 and is then freed."
    if source is Source.ENDPOINT:
        return "The server is asked for the log-probs of the data once, before step 1."
    if names_another_policy(cfg):
        return "It scores the data once before step 1, on the policy's base, and is then forgotten."
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
    same_rows = facts.reference is None or facts.reference.sizes.vocab_size == facts.model.sizes.vocab_size
    if facts.reference is None or same_rows or facts.reference_vocabulary is not None:
        return ()
    return (
        f"The reference's vocabulary has {facts.reference.sizes.vocab_size} entries and the policy's "
        f"{facts.model.sizes.vocab_size}: both must split text into the same tokens.",
    )
