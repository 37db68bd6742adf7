"""How much memory a run needs, and how many tokens one pass may hold, estimated before anything is loaded.

Weights, gradients and optimizer state follow from parameter counts; activations from `activations.py`. Two
moments are compared: scoring the reference ahead of time (its weights, no gradients) and training. Figures
are per process and without what the allocator wastes.
"""

from dataclasses import dataclass
from typing import Literal

from fiducial.config.schema import RunConfig
from fiducial.reference.activations import scoring_pass, training_pass
from fiducial.reference.checkpoint import TensorFact
from fiducial.reference.facts import Facts, ModelFacts
from fiducial.reference.holding import Bits, policy_bits, reference_bits
from fiducial.reference.kinds import ReferencePlan, Schedule, Source
from fiducial.reference.precision import BYTES, HeldPrecision, held_precision
from fiducial.reference.trained import count_trained, layer_of

When = Literal["throughout", "training", "scoring"]

LARGEST_BUDGET = {"cpu": 3_072, "gpu": 16_384}
"""Tokens of one pass beyond which matrix products are no faster (docs/performance.md)."""
_KEPT = {"cpu": "in the CPU's memory", "disk": "on disk"}
_SPARE = 0.8
"""Share of free memory the token budget may fill; the rest is for what the formula does not see."""

_QUANTISED_BYTES: dict[Bits, float] = {4: 0.516, 8: 1.0}
"""A weight's; in 4 bits with its scales: blocks of 64 share a byte, and 256 of these a float32."""

_STATE_BYTES: tuple[tuple[str, float], ...] = (
    ("galore", 2.0),
    ("apollo", 2.0),
    ("adafactor", 0.0),
    ("lomo", 0.0),
    ("schedule_free_sgd", 4.0),
    ("sgd", 0.0),
    ("ademamix_8bit", 3.0),
    ("ademamix", 12.0),
    ("lion_8bit", 1.0),
    ("lion", 4.0),
    ("rmsprop_bnb_8bit", 1.0),
    ("rmsprop", 4.0),
    ("adagrad", 4.0),
    ("4bit", 1.0),
    ("8bit", 2.0),
)
"""Bytes of optimizer state a trained weight, by the first part of its name that matches; AdamW's are 8."""


@dataclass(frozen=True, slots=True)
class MemoryPart:
    """One thing that takes memory."""

    name: str
    bytes: int
    when: When
    on_cpu: bool = False
    """Held in the CPU's memory although the run is on another device."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What a process needs, part by part."""

    parts: tuple[MemoryPart, ...]
    token_budget: int
    held: tuple[str, ...]
    """Which weights are held how often, a line each."""
    longest: int
    """Tokens of the longest group that was counted with."""

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
    trained = count_trained(cfg, facts)
    trained_bytes = precision.adapter if cfg.adapter else BYTES[precision.weights]
    bits = policy_bits(cfg)
    base = _model_bytes(facts.model, precision.weights, bits)
    adapter = trained.adapter * precision.adapter
    multiplied = facts.model.num_parameters - _quantised(facts.model, bits)
    copies = multiplied * precision.products if precision.casts else 0
    # A pass holds at least one group, which is never cut, and no more than one optimizer step has.
    longest = longest or longest_group(cfg)
    step = cfg.optimization.groups_per_step * longest
    largest_pass = max(token_budget, longest)
    tokens = min(largest_pass, step) if token_budget else 0
    activations = training_pass(cfg, facts, precision).of(tokens)
    gradients = trained.total * trained_bytes
    if step <= largest_pass:
        head = facts.model.sizes.vocab_size * facts.model.sizes.hidden * trained_bytes
        activations = _beside_gradients(activations, gradients, first=min(head, gradients))
    parts = [
        MemoryPart("policy weights", base, "throughout"),
        MemoryPart("adapter weights", adapter, "throughout"),
        MemoryPart("autocast copies of weights", copies, "training"),
        MemoryPart("gradients", gradients, "training"),
        MemoryPart(
            f"optimizer state ({cfg.optimization.optimizer})",
            int(trained.total * _state_bytes(cfg.optimization.optimizer, trained_bytes)),
            "training",
        ),
        *_reference_parts(cfg, facts, plan, precision, adapter),
        MemoryPart("activations of a training pass", activations, "training"),
    ]
    if plan.schedule is Schedule.PRECOMPUTED and plan.source is not Source.ENDPOINT:
        scoring = scoring_pass(facts, precision).of(token_budget)
        parts.append(MemoryPart("activations of a scoring pass", scoring, "scoring"))
    held = (_policy_line(cfg, facts, precision), _reference_line(cfg, facts, plan, precision))
    return MemoryEstimate(tuple(part for part in parts if part.bytes), token_budget, held, longest)


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


def _beside_gradients(activations: int, gradients: int, *, first: int) -> int:
    """What activations add to gradients where a step is one pass.

    Gradients come as the backward frees activations, the head's (`first`) before any of the layers'. So the
    peak is the larger of all activations with the head's gradient, and all gradients.
    """
    return max(activations + first - gradients, 0)


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
    whole = _model_bytes(model, held, reference_bits(cfg))
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


def _model_bytes(model: ModelFacts, dtype: str, bits: Bits | None) -> int:
    """Quantised weights take 1 byte, or half a byte and their scales; all others are float32 beside them."""
    if bits is None:
        return model.num_parameters * BYTES[dtype]
    matrices = _quantised_matrices(model)
    quantised = sum(tensor.size for tensor in matrices)
    scales = 4 * sum(tensor.shape[0] for tensor in matrices) if bits == 8 else 0  # one a row
    others = (model.num_parameters - quantised) * BYTES["float32"]
    return int(quantised * _QUANTISED_BYTES[bits]) + scales + others


def _quantised(model: ModelFacts, bits: Bits | None) -> int:
    """Weights that bitsandbytes holds in fewer bits."""
    return 0 if bits is None else sum(tensor.size for tensor in _quantised_matrices(model))


def _quantised_matrices(model: ModelFacts) -> list[TensorFact]:
    """The matrices of layers; not embeddings, head and norms."""
    return [
        tensor
        for name, tensor in model.tensors.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and layer_of(name) is not None
    ]


def _state_bytes(optimizer: str, trained_bytes: int) -> float:
    listed = next((size for part, size in _STATE_BYTES if part in optimizer), None)
    return 2.0 * trained_bytes if listed is None else listed


def _policy_line(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> str:
    trained = count_trained(cfg, facts)
    kind = _kind(policy_bits(cfg), precision.weights)
    line = f"policy: {_count(facts.model.num_parameters)} weights once, in {kind}"
    if cfg.adapter is not None:
        line += f", and an adapter of {_count(trained.adapter)}"
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
