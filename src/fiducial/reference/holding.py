"""How the weights of policy and reference are held, and where the reference's are held less exactly.

Imports no torch.
"""

from typing import Literal

from fiducial.config.schema import ModelConfig, ReferenceConfig, RunConfig
from fiducial.reference.kinds import Source
from fiducial.reference.precision import held_precision

Bits = Literal[4, 8]


def policy_bits(cfg: RunConfig) -> Bits | None:
    """Bits of the policy's quantised weights; None where they are whole numbers of bytes."""
    return _bits(cfg.model)


def reference_bits(cfg: RunConfig) -> Bits | None:
    """Bits of a second model's weights: its own setting, or else the policy's."""
    return _bits(cfg.reference) or policy_bits(cfg)


def offloads_policy(cfg: RunConfig) -> bool:
    """Whether FSDP2 keeps the policy's weights in the CPU's memory between layers' turns."""
    options = cfg.distributed.fsdp_config or {}
    return cfg.distributed.fsdp_version is not None and bool(options.get("offload_params"))


def why_approximate(cfg: RunConfig, source: Source, *, gpu: bool | None = None) -> str | None:
    """How a second model is held otherwise than the policy, so that it answers only almost the same."""
    if source is not Source.SEPARATE_MODEL:
        return None
    precision = held_precision(cfg, gpu=gpu)
    bits, found = reference_bits(cfg), []
    if bits != policy_bits(cfg):
        found.append(f"held in {bits} bits")
    if cfg.reference.dtype not in {None, precision.weights}:
        found.append(f"held in {cfg.reference.dtype}")
    if cfg.reference.device == "cpu" and precision.gpu:
        found.append("computed on the CPU")
    return " and ".join(found) or None


def _bits(held: ModelConfig | ReferenceConfig) -> Bits | None:
    if held.load_in_4bit:
        return 4
    return 8 if held.load_in_8bit else None
