"""A model whose layers are in memory, or on the GPU, only while they compute.

Layers stay where `where` says (on disk they are read from the checkpoint itself, no copy is made) and
accelerate's hooks bring each one over for its turn. Embeddings, the last norm and the head stay.
The answers are exactly those of the whole model: only time is spent.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig

from fiducial.model.checkpoint import auto_class

Where = Literal["cpu", "disk"]


def layer_placement(config: PreTrainedConfig, where: Where, *, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` that keep the layers of `config`'s model `where` until they compute."""
    with torch.device("meta"):
        shape = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    computes: int | str = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"device_map": _places(shape, where, computes)}


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of the model are somewhere else until they are needed; it must not be moved."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def _places(module: nn.Module, where: Where, computes: int | str, prefix: str = "") -> dict[str, int | str]:
    found: dict[str, int | str] = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            found |= {f"{prefix}{name}.{number}": where for number in range(len(child))}
        elif any(isinstance(part, nn.ModuleList) for part in child.modules()):
            found |= _places(child, where, computes, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = computes
    return found
