"""The policy and the reference, loaded from the same checkpoint so that they are equal at step 0.

Whatever a load draws at random (new embedding rows, re-initialised weights, an adapter's start) comes from
the run's seed and leaves the global random state alone, so a second load draws the same numbers. Models stay
on the CPU, from where accelerate moves them, except quantised ones, which bitsandbytes places while reading.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fiducial import compat
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model import adapters
from fiducial.model.checkpoint import attention_to_load, auto_class, load_weights, read_config
from fiducial.model.fused_layers import fuse_layers, fused_layers
from fiducial.model.offload import is_offloaded, layer_placement
from fiducial.model.precision import Precision, resolve_precision
from fiducial.model.quantisation import is_quantised, placement, prepare, require_computable
from fiducial.model.randomness import drawn_from
from fiducial.model.text_path import freeze_beside_text
from fiducial.model.tokenizer import require_same_vocabulary
from fiducial.reference.checkpoint import same_place
from fiducial.reference.holding import Bits, policy_bits, reference_bits
from fiducial.reference.plan import Checkpoint
from fiducial.reference.start import on_starting_base

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
        reference is the starting policy with a resumed adapter merged into it, or what `reference.model`
        and `reference.adapter` name: in eval mode, without dropout, adapter, or a parameter that takes a
        gradient.

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
        quantised = self._placement(checkpoint, precision.weights, policy_bits(cfg))
        base = self._load_base(checkpoint, precision.weights, quantised, reinit=cfg.model.reinit_weights)
        freeze_beside_text(base)
        model: PreTrainedModel | PeftModel = base
        if cfg.adapter is not None:
            model = self._with_adapter(base, precision)
        elif is_quantised(base):
            raise ModelError(
                "load_in_8bit and load_in_4bit freeze the weights: set `adapter: qlora` to train an adapter."
            )
        if cfg.model.unfrozen_parameters is not None:
            unfreeze(model, cfg.model.unfrozen_parameters, precision.adapter)
        if cfg.model.gradient_checkpointing:
            if not base.supports_gradient_checkpointing:
                raise ModelError(
                    f"gradient_checkpointing: {type(base).__name__} cannot compute its layers again. Remove "
                    "it, and take a smaller micro_batch_tokens where memory is short."
                )
            options = {"use_reentrant": False} | cfg.model.gradient_checkpointing_kwargs
            compat.enable_gradient_checkpointing(model, options)
        return model, model.peft_config[adapters.POLICY_ADAPTER] if isinstance(model, PeftModel) else None

    def _with_adapter(self, model: PreTrainedModel, precision: Precision) -> PeftModel:
        assert self.cfg.adapter is not None
        float32 = self.cfg.adapter.autocast_adapter_dtype and precision.adapter == torch.float32
        with drawn_from(self.cfg.optimization.seed):
            if self.cfg.adapter.path is None:
                policy = adapters.new_adapter(model, self.cfg.adapter, float32=float32)
            else:
                policy = adapters.resume_adapter(
                    model,
                    self.cfg.adapter.path,
                    trainable=True,
                    float32=float32,
                    pickle=self.cfg.model.allow_pickle_weights,
                )
        require_computable(policy)
        return policy

    def _load_reference(self) -> PreTrainedModel:
        cfg, asked = self.cfg, self.cfg.reference
        dtype = getattr(torch, asked.dtype) if asked.dtype else resolve_precision(cfg).weights
        starts_there = asked.model is None
        if asked.model is None:
            checkpoint = Checkpoint(cfg.model.base_model, cfg.model.revision)
        else:
            checkpoint = Checkpoint(asked.model, asked.revision)
            if not on_starting_base(cfg):
                trust = cfg.model.trust_remote_code
                require_same_vocabulary(self.tokenizer, checkpoint, trust_remote_code=trust)
        reinit = starts_there and cfg.model.reinit_weights
        model = self._load_base(
            checkpoint, dtype, self._reference_placement(checkpoint, dtype), reinit=reinit
        )
        if asked.adapter is not None:
            model = self._merged(model, asked.adapter, "reference.adapter")
        elif starts_there and cfg.adapter is not None and cfg.adapter.path is not None:
            model = self._merged(model, cfg.adapter.path, "lora_model_dir")
        model.requires_grad_(False).eval()
        return model

    def _merged(self, model: PreTrainedModel, path: str, key: str) -> PreTrainedModel:
        if is_quantised(model):
            raise ModelError(
                f"{key}: merging {path} into quantised weights would round them again, and the reference "
                "would be another one. Use `reference: {source: frozen_adapter}`, or hold it in full."
            )
        if is_offloaded(model):
            raise ModelError(
                f"{key}: {path} cannot be merged into weights that are kept elsewhere (offload)."
            )
        resumed = adapters.resume_adapter(
            model, path, trainable=False, float32=True, pickle=self.cfg.model.allow_pickle_weights, key=key
        )
        return adapters.merge_into_base(resumed, f"{key}: {path}")

    def _load_base(
        self, checkpoint: Checkpoint, dtype: torch.dtype, placed: dict[str, Any], *, reinit: bool = False
    ) -> PreTrainedModel:
        cfg, config = self.cfg, self._config(checkpoint)
        fused = fused_layers(cfg, config)
        with drawn_from(cfg.optimization.seed):
            if reinit:
                model: PreTrainedModel = auto_class(config).from_config(
                    config,
                    dtype=dtype,
                    attn_implementation=attention_to_load(config, cfg.model),
                    trust_remote_code=cfg.model.trust_remote_code,
                )
            else:
                model = load_weights(checkpoint, config, cfg.model, dtype, **placed)
            self._make_room_for_tokens(model)
        _silence_dropout_modules(model)
        fuse_layers(model, fused)
        return prepare(model) if is_quantised(model) else model

    def _config(self, checkpoint: Checkpoint) -> PreTrainedConfig:
        model = self.cfg.model
        overrides = model.config_overrides if same_place(checkpoint.path, model.base_model) else {}
        return read_config(checkpoint, model, overrides)

    def _placement(
        self, checkpoint: Checkpoint, dtype: torch.dtype, bits: Bits | None, *, on_cpu: bool = False
    ) -> dict[str, Any]:
        options = self.cfg.model.bnb_config_kwargs if bits == policy_bits(self.cfg) else {}
        return placement(bits, self._config(checkpoint), dtype, options, on_cpu=on_cpu)

    def _reference_placement(self, checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, Any]:
        asked = self.cfg.reference
        if asked.offload is None:
            bits, on_cpu = reference_bits(self.cfg), asked.device == "cpu"
            return self._placement(checkpoint, dtype, bits, on_cpu=on_cpu)
        trust = self.cfg.model.trust_remote_code
        return layer_placement(self._config(checkpoint), asked.offload, trust_remote_code=trust)

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


def _silence_dropout_modules(model: PreTrainedModel) -> None:
    # For models that do not read the config's usual fields.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
