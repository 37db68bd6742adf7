"""Liger's Triton kernels between a layer's products: rotary embedding, norms, gated activation.

Each replaces a handful of passes over the activations by one. Liger puts them into the modules of
transformers' own model file, so they hold for every model of that family in the process, policy and reference
alike.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "liger_rope": ("rope",),
    "liger_rms_norm": ("rms_norm",),
    "liger_glu_activation": ("swiglu", "geglu"),
}
"""Key of the run to the names that Liger has for it, of which a family knows one at most."""


def fused_layers(cfg: RunConfig, config: PreTrainedConfig) -> dict[str, bool]:
    """Liger's arguments for a model of `config`; empty where the run asks for none.

    Raises:
        ModelError: There is no GPU, no Liger, or no kernel of the kind for this family.
    """
    asked = [key for key in ARGUMENTS if getattr(cfg.model, key)]
    if not asked:
        return {}
    if not torch.cuda.is_available():
        raise ModelError(f"{asked[0]}: Triton's kernels need a GPU, and there is none. Remove it.")
    if cfg.reference.device == "cpu":
        raise ModelError(
            f"{asked[0]}: with reference.device: cpu the reference could not run. Remove one of them."
        )
    if find_spec("liger_kernel") is None:
        raise ModelError(f"{asked[0]}: liger-kernel is not installed. Run `pip install liger-kernel`.")
    known = _parameters(config.model_type)
    chosen = {}
    for key in asked:
        name = next((name for name in ARGUMENTS[key] if name in known), None)
        if name is None:
            raise ModelError(f"{key}: Liger has no such kernel for {config.model_type} models. Remove it.")
        chosen[name] = True
    return {name: chosen.get(name, False) for name in known if name != "model"}


def fuse_layers(model: PreTrainedModel, arguments: Mapping[str, bool]) -> None:
    """Put the kernels that `fused_layers` chose into the model."""
    if arguments:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, dict(arguments))


def _parameters(model_type: str) -> list[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    families: Mapping[str, Callable[..., Any]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return [] if model_type not in families else list(signature(families[model_type]).parameters)
