"""The policy and the reference, loaded from the same checkpoint so that they are equal at step 0.

Whatever a load draws at random (new embedding rows, re-initialised weights, an adapter's start) comes from
the run's seed and leaves the global random state alone, so a second load draws the same numbers. Models stay
on the CPU, from where accelerate moves them, except quantised ones, which bitsandbytes places while reading.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from fiducial import compat
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model import adapters
from fiducial.model.checkpoint import load_weights, read_config
from fiducial.model.precision import Precision, resolve_precision
from fiducial.model.randomness import drawn_from
from fiducial.reference.plan import Checkpoint

__all__ = ["ModelLoader", "Precision", "resolve_precision"]

logger = logging.getLogger("fiducial")


class ModelLoader:
    """Loads what a run's config describes: the policy, or the reference it starts from."""

    def __init__(
        self,
        cfg: RunConfig | Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference_model: bool = False,
    ) -> None:
        self.cfg = validate_config(cfg)
        self.tokenizer = tokenizer
        self.reference_model = reference_model

    def load(self) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
        """The model, and its adapter's config if it has one.

        The policy comes with its adapter attached or resumed, and frozen where it is not to be trained. The
        reference is the starting policy with a resumed adapter merged into it, or the checkpoint that
        `reference.model` names: in eval mode, without dropout, adapter, or a parameter that takes a gradient.

        Raises:
            ModelError: The checkpoint or the adapter cannot be used.
        """
        if self.reference_model:
            return self._load_reference(), None
        return self._load_policy()

    def _load_policy(self) -> tuple[PreTrainedModel | PeftModel, PeftConfig | None]:
        cfg = self.cfg
        precision = resolve_precision(cfg)
        checkpoint = Checkpoint(cfg.model.base_model, cfg.model.revision)
        base = self._load_base(checkpoint, precision.weights, reinit=cfg.model.reinit_weights)
        model: PreTrainedModel | PeftModel = base
        if cfg.adapter is not None:
            model = self._with_adapter(base, precision)
        elif _is_quantised(cfg):
            raise ModelError(
                "load_in_8bit and load_in_4bit freeze the weights: set `adapter: qlora` to train an adapter."
            )
        if cfg.model.unfrozen_parameters is not None:
            unfreeze(model, cfg.model.unfrozen_parameters, precision.adapter)
        if cfg.model.gradient_checkpointing:
            options = {"use_reentrant": False} | cfg.model.gradient_checkpointing_kwargs
            compat.enable_gradient_checkpointing(model, options)
        return model, model.peft_config[adapters.POLICY_ADAPTER] if isinstance(model, PeftModel) else None

    def _with_adapter(self, model: PreTrainedModel, precision: Precision) -> PeftModel:
        assert self.cfg.adapter is not None
        float32 = self.cfg.adapter.autocast_adapter_dtype and precision.adapter == torch.float32
        with drawn_from(self.cfg.optimization.seed):
            if self.cfg.adapter.path is None:
                return adapters.new_adapter(model, self.cfg.adapter, float32=float32)
            return adapters.resume_adapter(
                model,
                self.cfg.adapter.path,
                trainable=True,
                float32=float32,
                pickle=self.cfg.model.allow_pickle_weights,
            )

    def _load_reference(self) -> PreTrainedModel:
        cfg = self.cfg
        dtype = getattr(torch, cfg.reference.dtype) if cfg.reference.dtype else resolve_precision(cfg).weights
        if cfg.reference.model is not None:
            model = self._load_base(Checkpoint(cfg.reference.model, cfg.reference.revision), dtype)
        else:
            checkpoint = Checkpoint(cfg.model.base_model, cfg.model.revision)
            model = self._load_base(checkpoint, dtype, reinit=cfg.model.reinit_weights)
            if cfg.adapter is not None and cfg.adapter.path is not None:
                model = self._merged(model, cfg.adapter.path)
        model.requires_grad_(False).eval()
        return model

    def _merged(self, model: PreTrainedModel, path: str) -> PreTrainedModel:
        if _is_quantised(self.cfg):
            raise ModelError(
                "a separate copy of a quantised base with the adapter of `lora_model_dir` merged in would be "
                "rounded again and differ from the policy: use `reference: {source: frozen_adapter}`."
            )
        resumed = adapters.resume_adapter(
            model, path, trainable=False, float32=True, pickle=self.cfg.model.allow_pickle_weights
        )
        merged: PreTrainedModel = resumed.merge_and_unload()
        return merged

    def _load_base(
        self, checkpoint: Checkpoint, dtype: torch.dtype, *, reinit: bool = False
    ) -> PreTrainedModel:
        cfg = self.cfg
        overrides = cfg.model.config_overrides if checkpoint.path == cfg.model.base_model else {}
        config = read_config(checkpoint, cfg.model, overrides)
        with drawn_from(cfg.optimization.seed):
            if reinit:
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=cfg.model.attn_implementation,
                    trust_remote_code=cfg.model.trust_remote_code,
                )
            else:
                model = load_weights(checkpoint, config, cfg.model, dtype, **_placement(cfg, dtype))
            self._make_room_for_tokens(model)
        _silence_dropout_modules(model)
        if _is_quantised(cfg):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return model

    def _make_room_for_tokens(self, model: PreTrainedModel) -> None:
        """Add embedding rows for tokens the checkpoint has none for; never takes rows away."""
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings, torch.nn.Embedding)
        rows = embeddings.num_embeddings
        wanted = len(self.tokenizer)
        if self.cfg.tokenizer.resize_embeddings_to_32x:
            wanted = -(-wanted // 32) * 32
        if wanted > rows:
            model.resize_token_embeddings(wanted, mean_resizing=self.cfg.tokenizer.mean_resizing_embeddings)
            logger.info("The embeddings grew from %d to %d rows.", rows, wanted)


def unfreeze(model: torch.nn.Module, patterns: tuple[str, ...], dtype: torch.dtype) -> None:
    """Train the parameters whose names match one of `patterns` from their start; freeze the others.

    Names are those of the checkpoint. Under an adapter nothing more is frozen, and what is unfrozen is held
    in `dtype`, the adapter's own.

    Raises:
        ModelError: A pattern matches no parameter, or is no regular expression.
    """
    try:
        compiled = {pattern: re.compile(pattern) for pattern in patterns}
    except re.error as error:
        raise ModelError(
            f"unfrozen_parameters: {error.pattern!r} is no regular expression: {error}."
        ) from error
    unmatched = set(patterns)
    is_adapter = isinstance(model, PeftModel)
    for name, parameter in model.named_parameters():
        matching = {pattern for pattern, regex in compiled.items() if regex.match(adapters.base_name(name))}
        unmatched -= matching
        if matching:
            parameter.data = parameter.data.to(dtype) if is_adapter else parameter.data
            parameter.requires_grad_(True)
        elif not is_adapter:
            parameter.requires_grad_(False)
    if unmatched:
        names = [adapters.base_name(name) for name, _ in model.named_parameters()]
        raise ModelError(
            f"unfrozen_parameters: {', '.join(sorted(unmatched))} matches no parameter. "
            f"Names look like {names[0]} and {names[-1]}."
        )


def _is_quantised(cfg: RunConfig) -> bool:
    return cfg.model.load_in_8bit or cfg.model.load_in_4bit


def _placement(cfg: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """How and where weights are read: nothing to say unless they are quantised."""
    if not _is_quantised(cfg):
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "load_in_8bit and load_in_4bit need bitsandbytes: pip install 'fiducial[quantization]'."
        )
    options: dict[str, Any] = {"load_in_8bit": cfg.model.load_in_8bit, "load_in_4bit": cfg.model.load_in_4bit}
    if cfg.model.load_in_4bit:
        options |= {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": dtype,
        }
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {
        "quantization_config": BitsAndBytesConfig(**(options | cfg.model.bnb_config_kwargs)),
        "device_map": {"": device},
    }


def _silence_dropout_modules(model: PreTrainedModel) -> None:
    # For models that do not read the config's usual fields.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
