"""How much memory a run needs, and how many tokens one pass may hold, estimated before anything is loaded.

Weights, gradients and optimizer state follow from parameter counts; activations from `activations.py`. Two
moments are compared: scoring the reference ahead of time (its weights, no gradients) and training. Figures
are per process and without what the allocator wastes.
"""

import sys
from dataclasses import dataclass

from fiducial.config.schema import RunConfig
from fiducial.reference.activations import scoring_pass, training_pass
from fiducial.reference.facts import Facts, ModelFacts
from fiducial.reference.holding import Bits, policy_bits, reference_bits
from fiducial.reference.kinds import ReferencePlan, Schedule, Source
from fiducial.reference.policy_memory import (
    MemoryPart,
    When,
    model_bytes,
    offloads,
    policy_parts,
    trained_width,
)
from fiducial.reference.precision import BYTES, HeldPrecision, held_precision
from fiducial.reference.trained import count_trained, layer_of

LARGEST_BUDGET = {"cpu": 3_072, "gpu": 16_384}
"""Tokens of one pass beyond which matrix products are no faster (docs/performance.md)."""
_KEPT = {"cpu": "in the CPU's memory", "disk": "on disk"}
_SPARE = 0.8
"""Share of free memory the token budget may fill; the rest is for what the formula does not see."""
_STAYS_BELOW = 2**25
"""Bytes of an array. What glibc has handed out at once for larger ones it gives back when they are freed."""
_CAVEAT = (
    "On a CPU, what LoRA's layers free may stay with the allocator: a pass can take twice these activations "
    "(docs/reference.md)."
)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a process needs, part by part."""

    parts: tuple[MemoryPart, ...]
    token_budget: int
    held: tuple[str, ...]
    """Which weights are held how often, a line each."""
    longest: int
    """Tokens of the longest group that was counted with."""
    caveat: str | None = None
    """What is not in it and can be much, in a sentence."""

    def at(self, moment: When) -> int:
        """Bytes needed at once while scoring or training, on the run's own device."""
        now = {"throughout", moment}
        return sum(part.bytes for part in self.parts if part.when in now and not part.on_cpu)

    @property
    def peak(self) -> int:
        """The larger of the two moments."""
        return max(self.at("scoring"), self.at("training"))


def estimate_memory(
    cfg: RunConfig,
    facts: Facts,
    plan: ReferencePlan,
    token_budget: int,
    *,
    gpu: bool | None = None,
    longest: int | None = None,
) -> MemoryEstimate:
    """Bytes of every part of a run whose passes hold `token_budget` tokens.

    Args:
        cfg: The run.
        facts: What is known of its checkpoints.
        plan: The reference it was decided to use.
        token_budget: Most tokens of one pass.
        gpu: Whether the run is on a GPU; None looks for one.
        longest: Most tokens of a group, where the data is known; None takes the longest that is allowed.
    """
    precision = held_precision(cfg, gpu=gpu)
    # A pass holds at least one group, which is never cut, and no more than one optimizer step has.
    longest = longest or longest_group(cfg)
    step = cfg.optimization.groups_per_step * longest
    largest_pass = max(token_budget, longest)
    one_pass = step <= largest_pass
    tokens = min(largest_pass, step) if token_budget else 0
    activations = training_pass(cfg, facts, precision).of(tokens)
    if one_pass and not offloads(cfg, precision):
        activations = _beside_gradients(activations, cfg, facts, precision)
    adapter = count_trained(cfg, facts).adapter * precision.adapter
    parts = [
        *policy_parts(cfg, facts, precision),
        *_reference_parts(cfg, facts, plan, precision, adapter),
        MemoryPart("activations of a training pass", activations, "training"),
    ]
    if _scores_ahead(plan):
        scoring = scoring_pass(facts, precision).of(token_budget)
        parts.append(MemoryPart("activations of a scoring pass", scoring, "scoring"))
    held = (_policy_line(cfg, facts, precision), _reference_line(cfg, facts, plan, precision))
    caveat = _CAVEAT if _fragments(cfg, facts, precision, tokens) else None
    return MemoryEstimate(tuple(part for part in parts if part.bytes), token_budget, held, longest, caveat)


def auto_token_budget(available_bytes: int, facts: Facts, cfg: RunConfig, *, gpu: bool | None = None) -> int:
    """Tokens one training pass may hold, for `micro_batch_tokens: auto`.

    As many as fit, and no more than still make passes faster. A group with more tokens goes alone.

    Args:
        available_bytes: What is free for activations once weights, gradients and optimizer state are held.
        facts: What is known of the checkpoint.
        cfg: The run.
        gpu: Whether the run is on a GPU; None looks for one.
    """
    precision = held_precision(cfg, gpu=gpu)
    needed = training_pass(cfg, facts, precision)
    fits = int(available_bytes * _SPARE - needed.fixed) // needed.per_token
    return max(1, min(LARGEST_BUDGET["gpu" if precision.gpu else "cpu"], fits))


def longest_group(cfg: RunConfig, listed: int | None = None) -> int:
    """Most tokens a group may have: as many times `sequence_len` as the loss compares completions.

    Losses of any number of completions are counted with `listed`, or else two; unpaired ones with one.
    """
    sequence_len = cfg.data.sequence_len if cfg.data else 2048
    if cfg.method is None:
        return sequence_len * 2
    return sequence_len * ((cfg.method.num_completions or listed or 2) if cfg.method.paired else 1)


def _scores_ahead(plan: ReferencePlan) -> bool:
    """Whether the reference is scored in passes of its own, as large as the token budget allows."""
    if plan.schedule is Schedule.SYNCED:
        return plan.writes_through
    return plan.schedule is Schedule.PRECOMPUTED and plan.source is not Source.ENDPOINT


def _fragments(cfg: RunConfig, facts: Facts, precision: HeldPrecision, tokens: int) -> bool:
    """Whether arrays that a pass frees stay with the process, in holes that aligned ones do not fit into.

    Under LoRA they are as many as those it keeps (docs/reference.md has the measurements).
    """
    array = tokens * facts.model.sizes.hidden * precision.products
    glibc = sys.platform == "linux"
    return glibc and not precision.gpu and cfg.adapter is not None and array < _STAYS_BELOW


def _beside_gradients(activations: int, cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> int:
    """What activations add to gradients where a step is one pass.

    Gradients come as the backward frees activations, the head's before any of the layers'. So the peak is the
    larger of all activations with the head's gradient, and all gradients.
    """
    width = trained_width(cfg, precision)
    gradients = count_trained(cfg, facts).total * width
    head = facts.model.sizes.vocab_size * facts.model.sizes.hidden * width
    return max(activations + min(head, gradients) - gradients, 0)


def _reference_parts(
    cfg: RunConfig, facts: Facts, plan: ReferencePlan, precision: HeldPrecision, adapter: int
) -> list[MemoryPart]:
    when: When = "scoring" if plan.schedule is Schedule.PRECOMPUTED else "throughout"
    if plan.source is Source.SEPARATE_MODEL:
        return _second_model(cfg, facts, plan, precision)
    if plan.source is Source.FROZEN_ADAPTER and not plan.equals_starting_policy:
        return [MemoryPart("reference adapter", _named_adapter_bytes(facts, adapter), when)]
    if plan.source is Source.FROZEN_ADAPTER and plan.schedule is not Schedule.PRECOMPUTED:
        return [MemoryPart("reference adapter", adapter, when)]
    return []


def _second_model(
    cfg: RunConfig, facts: Facts, plan: ReferencePlan, precision: HeldPrecision
) -> list[MemoryPart]:
    model, held = facts.reference or facts.model, cfg.reference.dtype or precision.weights
    when: When = "scoring" if plan.schedule is Schedule.PRECOMPUTED else "throughout"
    on_cpu = precision.gpu and cfg.reference.device == "cpu"
    whole = model_bytes(model, held, reference_bits(cfg))
    if plan.frozen_held_once:
        whole = count_trained(cfg, facts).base * BYTES[held]
    if cfg.reference.offload is not None:
        return _offloaded(cfg, model, whole, BYTES[held], when)
    parts = [MemoryPart("reference model", whole, when, on_cpu=on_cpu)]
    if plan.sync is not None and not plan.sync.copies and BYTES[held] < BYTES["float32"]:
        average = count_trained(cfg, facts).base * BYTES["float32"]
        parts.append(MemoryPart("reference average (float32)", average, when, on_cpu=on_cpu))
    return parts


def _offloaded(cfg: RunConfig, model: ModelFacts, whole: int, width: int, when: When) -> list[MemoryPart]:
    """What stays, the layer that computes, and the layers that wait in the CPU's memory if not on disk."""
    layers = sum(tensor.size for name, tensor in model.tensors.items() if layer_of(name) is not None) * width
    here = whole - layers + layers // max(model.sizes.layers, 1)
    parts = [MemoryPart("reference model (one layer at a time)", here, when)]
    if cfg.reference.offload == "cpu":
        parts.append(MemoryPart("reference layers that wait", layers, when, on_cpu=True))
    return parts


def _named_adapter_bytes(facts: Facts, policy_adapter: int) -> int:
    """Of the adapter named for the reference, held in float32; the policy's where its size is not known."""
    named = facts.reference_adapter
    size = None if named is None else named.num_parameters
    return policy_adapter if size is None else size * BYTES["float32"]


def _policy_line(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> str:
    trained = count_trained(cfg, facts)
    kind = _kind(policy_bits(cfg), precision.weights)
    line = f"policy: {_count(facts.model.num_parameters)} weights once, in {kind}"
    if cfg.adapter is not None:
        line += f", and an adapter of {_count(trained.adapter)}"
    if offloads(cfg, precision):
        line += ", in the CPU's memory while they train"
    return f"{line}; {_count(trained.total)} are trained"


def _reference_line(cfg: RunConfig, facts: Facts, plan: ReferencePlan, precision: HeldPrecision) -> str:
    until = "while it scores, then freed" if plan.schedule is Schedule.PRECOMPUTED else "throughout"
    if plan.source is Source.NONE:
        return "reference: none"
    if plan.source is Source.ENDPOINT:
        return "reference: no weights here; a server holds them"
    if plan.source is Source.SEPARATE_MODEL:
        return f"reference: {_second_model_line(cfg, facts, plan, precision)}, {until}"
    if plan.source is Source.FROZEN_ADAPTER and not plan.equals_starting_policy:
        return f"reference: the base with the adapter {cfg.reference.adapter}, {until}"
    if plan.source is Source.FROZEN_ADAPTER and plan.schedule is not Schedule.PRECOMPUTED:
        adapter = count_trained(cfg, facts).adapter
        return f"reference: a frozen copy of the adapter, {_count(adapter)} weights, throughout"
    return "reference: no weights of its own"


def _second_model_line(cfg: RunConfig, facts: Facts, plan: ReferencePlan, precision: HeldPrecision) -> str:
    kind = _kind(reference_bits(cfg), cfg.reference.dtype or precision.weights)
    if plan.frozen_held_once:
        trained = _count(count_trained(cfg, facts).base)
        return f"the {trained} weights that are trained a second time in {kind}, the others are the policy's"
    where = " on the CPU" if cfg.reference.device == "cpu" else ""
    if cfg.reference.offload is not None:
        where = f", its layers kept {_KEPT[cfg.reference.offload]} until they compute"
    weights = _count((facts.reference or facts.model).num_parameters)
    return f"a second model of {weights} weights in {kind}{where}"


def _kind(bits: Bits | None, dtype: str) -> str:
    return f"{bits}-bit" if bits else dtype


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
