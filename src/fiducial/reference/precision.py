"""How many bytes a weight and an activation take, decided without torch.

`dtype: auto` depends on the hardware, which only torch knows for sure. Here a visible NVIDIA device stands
for a GPU that computes in bfloat16; on an older one the run uses float32 and the estimate is too low.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fiducial.config.schema import RunConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class HeldPrecision:
    """Byte widths of one run."""

    weights: str
    """Dtype the weights are held in, before quantization."""
    autocast: str | None
    gpu: bool = False
    quantised: bool = False
    """Whether weights are held in 8 or 4 bits, and then embeddings and norms in float32 beside them."""

    @property
    def products(self) -> int:
        """Bytes of what matrix products return."""
        return BYTES[self.autocast or self.weights]

    @property
    def residual(self) -> int:
        """Bytes of the residual stream, which starts as the embedding's output."""
        return BYTES["float32" if self.quantised else self.weights]

    @property
    def casts(self) -> bool:
        """Whether products are computed in another dtype than the residual stream's."""
        return self.products != self.residual

    @property
    def adapter(self) -> int:
        """Bytes of an adapter's weight: float32 unless everything is meant to be half."""
        return 4 if self.autocast is not None else BYTES[self.weights]


def held_precision(cfg: RunConfig, *, gpu: bool | None = None) -> HeldPrecision:
    """What `dtype` and `autocast` come to on this machine, or on one with or without a GPU."""
    on_gpu = sees_gpu() if gpu is None else gpu
    weights, autocast = cfg.model.dtype, cfg.model.autocast
    return HeldPrecision(
        weights=("bfloat16" if on_gpu else "float32") if weights == "auto" else weights,
        autocast=("bfloat16" if on_gpu else None) if autocast == "auto" else autocast,
        gpu=on_gpu,
        quantised=cfg.model.load_in_8bit or cfg.model.load_in_4bit,
    )


def sees_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether an NVIDIA device is visible to this process.

    A container that is given one GPU of several has its number, which need not be 0.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}
    return not hidden and any(devices.glob("nvidia[0-9]*"))
