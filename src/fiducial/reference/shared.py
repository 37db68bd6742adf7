"""What policy and reference have in common and need not compute, or hold, twice: decided from names alone.

Below the lowest layer in which something is trained both are one network. A reference scored live goes on
from where the policy's own pass leaves it. Imports no torch.
"""

from dataclasses import dataclass

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.holding import why_approximate
from fiducial.reference.kinds import Schedule, Source
from fiducial.reference.start import names_another_policy, reads_distributions
from fiducial.reference.trained import layer_of, untrained_layers


@dataclass(frozen=True, slots=True)
class SharedLayers:
    """How many of the lowest layers are computed once for both, and why, or why none are."""

    layers: int
    why: str


def shared_layers(cfg: RunConfig, facts: Facts, source: Source, schedule: Schedule) -> SharedLayers | None:
    """What a live reference shares with the policy's pass; None for one that has passes of its own."""
    if schedule is not Schedule.LIVE:
        return None
    if objection := _why_apart(cfg, facts, source):
        return SharedLayers(0, f"Each has a pass of its own: {objection}.")
    layers, total = untrained_layers(cfg, facts), facts.model.sizes.layers
    return SharedLayers(
        layers,
        f"The lowest {layers} of {total} layers hold nothing that is trained: both compute them once.",
    )


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
    """Why nothing is shared; None if something is."""
    approximate = why_approximate(cfg, source)
    reasons = {
        "they are two different networks": names_another_policy(cfg),
        f"the reference is {approximate}": approximate is not None,
        "the policy's pass already reads the reference's distributions": reads_distributions(cfg),
        "reentrant checkpoints take gradients down to the embeddings": (
            cfg.model.gradient_checkpointing and cfg.model.gradient_checkpointing_kwargs.get("use_reentrant")
        ),
        _trained_from_below(cfg): untrained_layers(cfg, facts) == 0,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _trained_from_below(cfg: RunConfig) -> str:
    if cfg.adapter is not None:
        return "the adapter begins in the lowest layer, or below it, and weights alone are not worth sharing"
    if cfg.model.unfrozen_parameters is None:
        return "all layers are trained"
    return "the lowest layer, or what is below it, is trained"
