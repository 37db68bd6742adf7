"""Weights held in 8 or 4 bits, through bitsandbytes."""

import importlib.metadata
import importlib.util
import logging
import os
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from fiducial import compat
from fiducial.errors import ModelError
from fiducial.reference.holding import Bits

_OLDEST = (0, 48)
"""Older ones round on a CPU what 8-bit layers read, in training too: a tiny model's log-probs then differ by
0.7 nats a token between batches of other shapes."""


def placement(
    bits: Bits | None, config: PreTrainedConfig, dtype: torch.dtype, options: dict[str, Any], *, on_cpu: bool
) -> dict[str, Any]:
    """How and where the weights of a checkpoint are read: nothing to say unless they are quantised.

    Args:
        bits: What to quantise to while reading; None leaves them as they are stored.
        config: The checkpoint's, which says whether they are stored quantised.
        dtype: Of products with 4-bit weights.
        options: Fields of `BitsAndBytesConfig` that replace ours.
        on_cpu: Whether they go to the CPU although there is a GPU.

    Raises:
        ModelError: bitsandbytes is not installed, or too old.
    """
    stored = _stored_by_bitsandbytes(config)
    if bits is None and not stored:
        return {}
    _require_bitsandbytes()
    gpu = torch.cuda.is_available() and not on_cpu
    device_map = {"": int(os.environ.get("LOCAL_RANK", "0")) if gpu else "cpu"}
    if bits is None or stored:
        return {"device_map": device_map}
    chosen: dict[str, Any] = {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4}
    if bits == 4:
        chosen |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"quantization_config": BitsAndBytesConfig(**(chosen | options)), "device_map": device_map}


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """A quantised model as adapters are trained on it: frozen, and what is not quantised in float32."""
    # It says at every call that inputs are cast to float16, which is what 8-bit products are.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    compat.score_quantised_as_trained(prepared)
    return prepared


def require_computable(model: PeftModel) -> None:
    """Refuse an adapter that bitsandbytes' weights do not go with.

    Raises:
        ModelError: DoRA on 8-bit weights on a CPU, where PEFT and bitsandbytes lose the weights' scales.
    """
    dora = any(getattr(config, "use_dora", False) for config in model.peft_config.values())
    if dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
        raise ModelError(
            "peft_use_dora: does not work on 8-bit weights on a CPU. Use load_in_4bit, a GPU, or plain LoRA."
        )


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights; it stays where it was loaded to."""
    return bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("weights in 8 or 4 bits need bitsandbytes: pip install 'fiducial[quantization]'.")
    installed = importlib.metadata.version("bitsandbytes")
    if tuple(map(int, installed.split(".")[:2])) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ModelError(
            f"weights in 8 or 4 bits need bitsandbytes {oldest} or newer, and {installed} is installed: "
            "pip install -U 'fiducial[quantization]'."
        )


def _stored_by_bitsandbytes(config: PreTrainedConfig) -> bool:
    stored: Any = getattr(config, "quantization_config", None) or {}
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    return str(settings.get("quant_method", "")).endswith("bitsandbytes")
