"""What policy and reference have in common and need not compute, or hold, twice: decided from names alone.

Below the lowest layer in which something is trained both are one network. A reference scored live goes on
from where the policy's own pass leaves it. Under an adapter the layers above have their weights in common,
which are worth sharing where each call of a layer gathers them from other processes. Imports no torch.
"""

from dataclasses import dataclass

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.holding import why_approximate
from fiducial.reference.kinds import Schedule, Source
from fiducial.reference.start import names_another_policy, reads_distributions
from fiducial.reference.trained import layer_of, trains_below_layers, untrained_layers

_LAYER_BY_LAYER = "TRANSFORMER_BASED_WRAP"
_OFF = ("false", "0", "no", "off", "n", "f")
"""As transformers reads a switch of `fsdp_config`."""


@dataclass(frozen=True, slots=True)
class SharedLayers:
    """What is computed or gathered once for both, and why, or why nothing is."""

    layers: int
    """How many of the lowest are computed once."""
    gathered_once: bool
    """Whether the weights of each layer above them are."""
    why: str


def shared_layers(cfg: RunConfig, facts: Facts, source: Source, schedule: Schedule) -> SharedLayers | None:
    """What a live reference shares with the policy's pass; None for one that has passes of its own."""
    if schedule is not Schedule.LIVE:
        return None
    objection, total = _why_apart(cfg, facts, source), facts.model.sizes.layers
    layers = 0 if objection else untrained_layers(cfg, facts)
    once = layers < total and _why_gathered_twice(cfg, facts, source) is None
    if not layers and not once:
        return SharedLayers(0, False, f"Each has a pass of its own: {objection}.")
    said = []
    if layers:
        said.append(
            f"The lowest {layers} of {total} layers hold nothing that is trained: both compute them once."
        )
    if once:
        said.append(f"The sharded weights of each layer{' above' * bool(layers)} are gathered once for both.")
    return SharedLayers(layers, once, " ".join(said))


def holds_frozen_once(cfg: RunConfig, source: Source, schedule: Schedule) -> bool:
    """Whether a second model holds only what is trained, and has the policy's own tensors for the rest."""
    return (
        source is Source.SEPARATE_MODEL
        and schedule.beside_policy
        and cfg.adapter is None
        and cfg.model.unfrozen_parameters is not None
        and cfg.reference.offload is None
        and cfg.distributed.fsdp_version is None
        and not names_another_policy(cfg)
        and why_approximate(cfg, source) is None
    )


def share_above(facts: Facts, layers: int) -> float:
    """The share of the model's weights that a pass still meets above its lowest `layers`."""
    below = sum(
        tensor.size
        for name, tensor in facts.model.tensors.items()
        if (layer := layer_of(name)) is not None and layer < layers
    )
    return 1 - below / facts.model.num_parameters


def _why_apart(cfg: RunConfig, facts: Facts, source: Source) -> str | None:
    """Why no layer is computed once; None if some are."""
    if names_another_policy(cfg):
        return "they are two different networks"
    if objection := _why_no_common_pass(cfg, source):
        return objection
    return None if untrained_layers(cfg, facts) else _trained_from_below(cfg, facts, source)


def _why_no_common_pass(cfg: RunConfig, source: Source) -> str | None:
    """Why the reference can use nothing of the policy's pass; None if it can."""
    approximate = why_approximate(cfg, source)
    reasons = {
        f"the reference is {approximate}": approximate is not None,
        "the policy's pass already reads the reference's distributions": reads_distributions(cfg),
        "reentrant checkpoints take gradients down to the embeddings": (
            cfg.model.gradient_checkpointing and cfg.model.gradient_checkpointing_kwargs.get("use_reentrant")
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _why_gathered_twice(cfg: RunConfig, facts: Facts, source: Source) -> str | None:
    """Why the weights of a layer are not gathered once for both; None if they are."""
    options = cfg.distributed.fsdp_config or {}
    reasons = {
        "weights alone are not worth sharing": cfg.distributed.fsdp_version is None,
        "each has weights of its own": source not in (Source.ADAPTER_OFF, Source.FROZEN_ADAPTER),
        "weights stay gathered from one pass to the other (reshard_after_forward)": (
            str(options.get("reshard_after_forward", True)).lower() in _OFF
        ),
        "it is not layers that are gathered (auto_wrap_policy)": (
            options.get("auto_wrap_policy", _LAYER_BY_LAYER) != _LAYER_BY_LAYER
        ),
        "what the lowest layer reads may be trained": trains_below_layers(cfg, facts),
    }
    found = next((reason for reason, applies in reasons.items() if applies), None)
    return found or _why_no_common_pass(cfg, source)


def _trained_from_below(cfg: RunConfig, facts: Facts, source: Source) -> str:
    if cfg.adapter is not None:
        why = _why_gathered_twice(cfg, facts, source)
        return f"the adapter begins in the lowest layer, or below it, and {why}"
    if cfg.model.unfrozen_parameters is None:
        return "all layers are trained"
    return "the lowest layer, or what is below it, is trained"
