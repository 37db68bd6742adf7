"""In which precision weights are held and matrix products computed."""

from dataclasses import dataclass

import torch

from fiducial.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Precision:
    """How weights are held, and what the products are cast to."""

    weights: torch.dtype
    autocast: torch.dtype | None
    """None where products are computed in the weights' own precision."""

    @property
    def adapter(self) -> torch.dtype:
        """What an adapter trains: float32, unless all weights are meant to be half (`bf16: full`)."""
        return torch.float32 if self.autocast is not None else self.weights


def resolve_precision(cfg: RunConfig, device: torch.device | str | None = None) -> Precision:
    """What the run's dtype and autocast mean on `device` (by default a GPU where there is one).

    `auto` is bfloat16 on a GPU that computes in it; elsewhere weights are float32 and nothing is cast.
    """
    bfloat16 = _computes_bfloat16(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    weights, autocast = cfg.model.dtype, cfg.model.autocast
    if weights == "auto":
        weights = "bfloat16" if bfloat16 else "float32"
    if autocast == "auto":
        autocast = "bfloat16" if bfloat16 else None
    return Precision(getattr(torch, weights), getattr(torch, autocast) if autocast else None)


def _computes_bfloat16(device: torch.device) -> bool:
    # Emulated bfloat16 (GPUs before Ampere) would be slower than float32 and no smaller in the optimizer.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
