"""What the policy takes beside activations: its weights, their gradients, and the optimizer's state.

FSDP2 can keep all three in the CPU's memory (`fsdp_config: {offload_params: true}`). On the GPU are then the
weights outside of the layers, those of the layer that computes and of the one that comes next, and their
gradients, which leave in every pass.
"""

from dataclasses import dataclass
from typing import Literal

from fiducial.config.schema import RunConfig
from fiducial.reference.checkpoint import TensorFact
from fiducial.reference.facts import Facts, ModelFacts
from fiducial.reference.holding import Bits, offloads_policy, policy_bits
from fiducial.reference.precision import BYTES, HeldPrecision
from fiducial.reference.trained import count_trained, is_trained, layer_of

When = Literal["throughout", "training", "scoring"]

_AT_ONCE = 2
"""Layers whose weights are gathered at once: the one that computes, and the one that is fetched meanwhile."""
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


def policy_parts(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> list[MemoryPart]:
    """Weights, autocast's copies of them, gradients and optimizer state."""
    trained, bits = count_trained(cfg, facts), policy_bits(cfg)
    width = trained_width(cfg, precision)
    weights = model_bytes(facts.model, precision.weights, bits)
    adapter = trained.adapter * precision.adapter
    multiplied = facts.model.num_parameters - _quantised(facts.model, bits)
    copies = multiplied * precision.products if precision.casts else 0
    state = int(trained.total * _state_bytes(cfg.optimization.optimizer, width))
    away = offloads(cfg, precision)
    parts = [
        MemoryPart("autocast copies of weights", copies, "training"),
        MemoryPart("gradients", trained.total * width, "training", on_cpu=away),
        MemoryPart(f"optimizer state ({cfg.optimization.optimizer})", state, "training", on_cpu=away),
    ]
    if not away:
        return [
            MemoryPart("policy weights", weights, "throughout"),
            MemoryPart("adapter weights", adapter, "throughout"),
            *parts,
        ]
    return [
        MemoryPart("policy weights, before they are offloaded", weights + adapter, "scoring"),
        MemoryPart("policy weights", weights + adapter, "training", on_cpu=True),
        *_gathered(cfg, facts, precision),
        *parts,
    ]


def offloads(cfg: RunConfig, precision: HeldPrecision) -> bool:
    """Whether FSDP2 keeps the policy's weights in the CPU's memory, and the run is on a GPU."""
    return offloads_policy(cfg) and precision.gpu


def trained_width(cfg: RunConfig, precision: HeldPrecision) -> int:
    """Bytes of a trained weight."""
    return precision.adapter if cfg.adapter else BYTES[precision.weights]


def model_bytes(model: ModelFacts, dtype: str, bits: Bits | None) -> int:
    """Quantised weights take 1 byte, or half a byte and their scales; all others are float32 beside them."""
    if bits is None:
        return model.num_parameters * BYTES[dtype]
    matrices = _quantised_matrices(model)
    quantised = sum(tensor.size for tensor in matrices)
    scales = 4 * sum(tensor.shape[0] for tensor in matrices) if bits == 8 else 0  # one a row
    others = (model.num_parameters - quantised) * BYTES["float32"]
    return int(quantised * _QUANTISED_BYTES[bits]) + scales + others


def _gathered(cfg: RunConfig, facts: Facts, precision: HeldPrecision) -> list[MemoryPart]:
    """What is on the GPU of offloaded weights while a layer computes, and of gradients that leave it."""
    trained, layers, tensors = (
        count_trained(cfg, facts),
        max(facts.model.sizes.layers, 1),
        facts.model.tensors,
    )
    outside = {name: tensor.size for name, tensor in tensors.items() if layer_of(name) is None}
    size_outside = sum(outside.values())
    share = _AT_ONCE / layers
    weights = size_outside + (facts.model.num_parameters - size_outside) * share
    adapter = trained.adapter * precision.adapter * share
    trained_outside = (
        0 if cfg.adapter else sum(size for name, size in outside.items() if is_trained(cfg, name))
    )
    gradients = trained_outside + (trained.total - trained_outside) / layers
    return [
        MemoryPart(
            "policy weights of the layers at hand",
            int(weights * BYTES[precision.weights] + adapter),
            "training",
        ),
        MemoryPart(
            "gradients of the layer at hand", int(gradients * trained_width(cfg, precision)), "training"
        ),
    ]


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


def _state_bytes(optimizer: str, width: int) -> float:
    listed = next((size for part, size in _STATE_BYTES if part in optimizer), None)
    return 2.0 * width if listed is None else listed
