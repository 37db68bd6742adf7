"""What a new adapter is put on, and that everything the run names for it is there.

PEFT asks for one match: a misspelt name beside a right one would be passed over.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fiducial.config.schema import ALL_LINEAR, AdapterConfig
from fiducial.errors import ModelError

_MAMBA = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
"""Model types in which PEFT refuses to adapt `out_proj`."""


def choose_targets(cfg: AdapterConfig, model: PreTrainedModel) -> list[str] | str | None:
    """PEFT's `target_modules`; None where the architecture's usual ones are meant.

    With `target_linear` these are all linear layers but the head, and what `target_modules` names beside.

    Raises:
        ModelError: both, and `target_modules` is a regular expression.
    """
    chosen = [cfg.target_modules] if isinstance(cfg.target_modules, str) else list(cfg.target_modules or ())
    if cfg.target_linear:
        if isinstance(cfg.target_modules, str) and cfg.target_modules != ALL_LINEAR:
            raise ModelError(
                "lora_target_modules: an expression beside lora_target_linear names targets twice; keep one "
                "of them, or write a list of names."
            )
        linear = _linear_layers(model)
        others = [name for name in chosen if name != ALL_LINEAR and not _is_found(name, linear)]
        return [*_in_layers(linear, cfg), *others] if others else _all_linear(model, cfg)
    if cfg.target_modules == ALL_LINEAR:
        return _all_linear(model, cfg)
    if isinstance(cfg.target_modules, str):
        return cfg.target_modules
    if chosen or cfg.target_parameters:
        return chosen
    known = model.config.model_type in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return None if known else _all_linear(model, cfg)


def _all_linear(model: PreTrainedModel, cfg: AdapterConfig) -> list[str] | str:
    linear = _linear_layers(model)
    named = cfg.layers_to_transform or len(linear) < len(list(_linear_modules(model)))
    return _in_layers(linear, cfg) if named else ALL_LINEAR


def _in_layers(linear: list[str], cfg: AdapterConfig) -> list[str]:
    """Names for PEFT, which chooses layers among names that are not full ones alone."""
    return sorted({name.rpartition(".")[2] for name in linear}) if cfg.layers_to_transform else linear


def require_all_found(policy: PeftModel, cfg: AdapterConfig, adapter: str) -> None:
    """Raise `ModelError` for a name that the run gives and that no part of the adapted model has."""
    adapted, saved = list(_names_of(policy, BaseTunerLayer)), list(_names_of(policy, ModulesToSaveWrapper))
    config = policy.peft_config[adapter]  # after PEFT's own renaming of fused layers
    assert isinstance(config, LoraConfig)
    targets = config.target_modules if cfg.target_modules else None
    if not isinstance(targets, str):
        _require(
            "lora_target_modules", (name for name in targets or () if not _is_found(name, adapted)), policy
        )
    tuner: Any = policy.base_model
    parameters: list[str] = tuner.targeted_parameter_names
    missing = (name for name in cfg.target_parameters if not _is_found(name, parameters))
    _require("lora_target_parameters", missing, policy)
    missing = (name for name in cfg.modules_to_save if not _is_found(name, saved))
    _require("lora_modules_to_save", missing, policy)
    for key, pattern in (
        ("lora_rank_pattern", cfg.rank_pattern),  # PEFT adds its own for fused experts
        ("lora_alpha_pattern", cfg.alpha_pattern),
    ):
        unmatched = (
            each for each in pattern if not any(_matches(each, name) for name in (*adapted, *parameters))
        )
        _require(key, unmatched, policy)
    layers = {int(part) for name in adapted for part in name.split(".") if part.isdecimal()}
    beyond = (str(index) for index in cfg.layers_to_transform if index not in layers)
    _require("peft_layers_to_transform", beyond, policy)


def _require(key: str, missing: Iterable[str], policy: PeftModel) -> None:
    names = sorted(missing)
    if names:
        layers = (name for name in _names_of(policy, nn.Linear | nn.Embedding) if ".lora_" not in name)
        known = sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name in layers})
        raise ModelError(
            f"{key}: {', '.join(names)}: the adapter finds nothing of that name, so it has no effect. "
            f"Correct it or remove it; layers of this model are called {', '.join(known)}."
        )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of all linear layers that PEFT takes for `all-linear` (all but the head) and can adapt."""
    return [name for name, module in _linear_modules(model) if _can_be_adapted(name, module, model)]


def _linear_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def _can_be_adapted(name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether an adapter's product can be added to what the linear layer answers.

    A router that is one by class (Llama 4, Phi-3.5-MoE) answers with a choice of experts. Mamba's kernels
    multiply by `out_proj` themselves, and PEFT refuses it.
    """
    kernels = model.config.model_type in _MAMBA and name.endswith("out_proj")
    return not kernels and not type(module).__name__.endswith("Router")


def _names_of(model: nn.Module, kind: type | object) -> Iterator[str]:
    """Names, in the model below the adapter, of its modules of one kind."""
    for name, module in model.named_modules():
        if isinstance(module, kind):  # type: ignore[arg-type]
            yield name.removeprefix("base_model.model.")


def _is_found(name: str, modules: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _matches(pattern: str, module: str) -> bool:
    """As PEFT reads the keys of its patterns."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
