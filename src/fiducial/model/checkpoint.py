"""A checkpoint's config and weights, or a message that says what is wrong with it.

transformers starts a model whose checkpoint lacks weights with random ones and a warning; here that is an
error. Weights are read from safetensors alone, and remote code stays off, unless the run asks otherwise.
Dropout, and noise on what a mixture's router and experts read, are switched off in the config, before the
modules that read it are built.
"""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from fiducial import compat
from fiducial.config.schema import ModelConfig
from fiducial.errors import ModelError
from fiducial.hub import lacks_hub, not_at_hand
from fiducial.reference.plan import Checkpoint

logger = logging.getLogger("fiducial")

_DROPOUT = re.compile(r"(dropout|drop|dropout_prob|dropout_rate|jitter_noise)$")
_NO_NOISE = {"phimoe": "router_jitter_noise"}
"""By family, what is called like noise and decides which experts are near enough to be chosen."""


def read_config(checkpoint: Checkpoint, cfg: ModelConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """The checkpoint's config with `overrides` merged in and every dropout and noise of training at 0.

    Raises:
        ModelError: It cannot be read, or an override names a field it does not have, contradicts another, or
            has no effect.
    """
    _require_effect(overrides)
    try:
        config, unknown = AutoConfig.from_pretrained(
            checkpoint.path,
            revision=checkpoint.revision,
            trust_remote_code=cfg.trust_remote_code,
            return_unused_kwargs=True,
            **overrides,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(_cannot_open(checkpoint, error)) from error
    unknown.pop("trust_remote_code", None)
    if unknown:
        known = ", ".join(sorted(key for key in config.to_dict() if not key.startswith("_")))
        raise ModelError(
            f"model_config: {', '.join(sorted(unknown))}: the config of {checkpoint.path} has no such field; "
            f"it has {known}."
        )
    assert isinstance(config, PreTrainedConfig)
    _require_valid(config, overrides)
    _require_rope_theta(config, overrides)
    _silence_dropout(config)
    return config


def _require_valid(config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    """Ask now what saving asks: a config that contradicts itself could be trained and not saved."""
    if not overrides or not hasattr(config, "validate"):
        return
    try:
        config.validate()
    except StrictDataclassError as error:
        why = str(error.__cause__ or error)
        raise ModelError(f"model_config: the config contradicts itself with {overrides}: {why}.") from error


def _require_rope_theta(config: PreTrainedConfig, overrides: dict[str, Any]) -> None:
    """Raise `ModelError` where `rope_parameters` replace the checkpoint's, and with them its base."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if "rope_parameters" in overrides and "rope_type" in ropes and ropes.get("rope_theta") is None:
        raise ModelError(
            "model_config: rope_parameters replace the checkpoint's own as a whole, and have no rope_theta. "
            "Copy it from its config.json beside the others."
        )


@compat.weights_in_every_process()
def load_weights(
    checkpoint: Checkpoint, config: PreTrainedConfig, cfg: ModelConfig, dtype: torch.dtype, **placement: Any
) -> PreTrainedModel:
    """The checkpoint as a causal language model, every weight of which was in it.

    Raises:
        ModelError: It is damaged, incomplete, no causal language model, or only there as pickle.
    """
    try:
        model, info = auto_class(config).from_pretrained(
            checkpoint.path,
            revision=checkpoint.revision,
            config=config,
            dtype=dtype,
            trust_remote_code=cfg.trust_remote_code,
            use_safetensors=None if cfg.allow_pickle_weights else True,
            attn_implementation=attention_to_load(config, cfg),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the info, with their shapes, and refused below
            **placement,
        )
    # A damaged safetensors file raises a SafetensorError, a bare Exception; remote code raises what it likes.
    except Exception as error:
        raise ModelError(_cannot_open(checkpoint, error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"base_model: {checkpoint.path} holds an adapter. Name the model it was trained on as "
            "`base_model:` and this folder as `lora_model_dir:`."
        )
    _require_complete(checkpoint, info)
    assert isinstance(model, PreTrainedModel)
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """What reads a checkpoint of `config` as a language model: whole where no class is for text alone."""
    with_vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if with_vision and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def attention_to_load(config: PreTrainedConfig, cfg: ModelConfig) -> str | None:
    """The attention of padded rows: what the run asks for, else transformers' choice where that is exact."""
    return cfg.attn_implementation or ("eager" if is_soft_capped(config) else None)


def is_soft_capped(config: PreTrainedConfig) -> bool:
    """Whether scores are capped, which sdpa leaves out: transformers up to 5.20 chose it all the same."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _require_effect(overrides: dict[str, Any]) -> None:
    if overrides.get("output_router_logits"):
        raise ModelError(
            "model_config: output_router_logits: nothing is done with them. The loss that "
            "balances a router's experts is not in this version; remove the field."
        )


def _silence_dropout(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        kept = name == _NO_NOISE.get(config.model_type)
        if isinstance(value, float) and value and _DROPOUT.search(name) and not kept:
            setattr(config, name, 0.0)
    text = config.get_text_config()
    if text is not config:
        _silence_dropout(text)


def _require_complete(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    misshapen = sorted(info["mismatched_keys"])
    if misshapen:
        name, stored, expected = misshapen[0]
        raise ModelError(
            f"{checkpoint.path}: {name} is {tuple(stored)} in the weights and {tuple(expected)} by "
            "config.json: they do not belong together."
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{checkpoint.path} lacks {len(missing)} weights of its own model class ({_first(missing)}): it "
            "is incomplete, or was saved without its language-model head. Save it with AutoModelForCausalLM."
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        logger.warning(
            "%s holds %d weights its model class does not use (%s); they are left out.",
            checkpoint.path,
            len(unexpected),
            _first(unexpected),
        )


def _first(names: list[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def _setting_in_the_way(at: str, reason: str) -> str | None:
    """What to set or remove, where transformers says what it lacks."""
    if "trust_remote_code" in reason:
        return f"{at} runs code of its own. Read it, then set `trust_remote_code: true`.\n{reason}"
    if "FlashAttention" in reason:
        return (
            f"attn_implementation: {at} cannot be loaded with it ({reason}). Install what is missing, or "
            "remove attn_implementation (or flash_attention: true): packed rows have Fiducial's own "
            "attention, and it is asked for padded ones alone."
        )
    if "offload_folder" in reason:
        return (
            f"{at} is converted while it is loaded (as mixtures of experts are), so its layers cannot be "
            "read from its files one by one: remove `reference.offload`, or write cpu."
        )
    return None


def _cannot_open(checkpoint: Checkpoint, error: Exception) -> str:
    path, reason = checkpoint.path, str(error).strip()
    at = path if checkpoint.revision is None else f"{path} (revision {checkpoint.revision})"
    folder = Path(path)
    if path.startswith(("/", ".", "~")) and not folder.exists():
        return f"There is no folder {at}."
    uncached = not_at_hand(f"A file of {at}", error) if lacks_hub(path, error) else None
    if (known := _setting_in_the_way(at, reason) or uncached) is not None:
        return known
    if "Unrecognized configuration class" in reason:
        kind = re.search(r"(\w+)'>", reason)
        return (
            f"{at} is no causal language model ({kind[1] if kind else reason}); preference losses need one."
        )
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return (
            f"{at} holds its weights only as pickle (.bin), which can run code. Convert them to safetensors, "
            "or set `allow_pickle_weights: true` if you trust where they come from."
        )
    if type(error).__name__ == "SafetensorError":
        return f"{at}: a weights file is damaged ({reason}). Download or copy the checkpoint again."
    return f"{at} cannot be loaded as a causal language model: {reason}"
