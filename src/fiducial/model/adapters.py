"""PEFT adapters: a new one, a resumed one, a frozen copy of one, and switching between them.

A frozen copy is never loaded the ordinary way: PiSSA and OLoRA would decompose the base weights a second time
and change the policy. It is added with a neutral start and the tensors are copied.
"""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from fiducial import compat
from fiducial.config.schema import AdapterConfig
from fiducial.errors import ModelError
from fiducial.model.adapter_targets import choose_targets, require_all_found
from fiducial.model.randomness import drawn_from
from fiducial.model.text_path import beside_text

POLICY_ADAPTER = "default"
"""PEFT's own name for the first adapter, which other programs expect in a saved one."""
REFERENCE_ADAPTER = "reference"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _SavedAdapter:
    """An adapter on disk, and how to speak of it in errors."""

    path: str
    """As the user named it."""
    folder: str
    key: str


_NEEDS_DATA = ("eva", "corda", "lora_ga")


def lora_config(cfg: AdapterConfig, model: PreTrainedModel) -> LoraConfig:
    """The run's new adapter in PEFT's terms.

    Without `target_modules` the architecture's usual ones are taken, or all linear layers where PEFT knows
    none.

    Raises:
        ModelError: PEFT refuses the combination, or the start needs a pass over data.
    """
    if str(cfg.init_lora_weights).startswith(_NEEDS_DATA):
        raise ModelError(
            f"peft_init_lora_weights: {cfg.init_lora_weights} starts from statistics of a dataset, which "
            "this version does not gather. Initialise and save the adapter with PEFT, then name it as "
            "`lora_model_dir:`."
        )
    given = cfg.model_dump(
        include={
            *("r", "target_parameters", "modules_to_save", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
            *("layers_to_transform", "layers_pattern", "layer_replication", "use_dora", "use_rslora"),
            *("init_lora_weights", "trainable_token_indices", "ensure_weight_tying", "bias"),
        }
    )
    options = {name: _as_lists(value) for name, value in given.items() if value not in ((), {}, None)}
    if beside := beside_text(model):
        options["exclude_modules"] = rf"({'|'.join(map(re.escape, beside))})(\..*)?"
    if cfg.loftq_bits is not None:
        options["loftq_config"] = {"loftq_bits": cfg.loftq_bits}
    try:
        return LoraConfig(
            lora_alpha=cfg.alpha,
            lora_dropout=cfg.dropout,
            target_modules=choose_targets(cfg, model),
            task_type="CAUSAL_LM",
            **options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ModelError(f"PEFT refuses this adapter: {error}") from error


def new_adapter(model: PreTrainedModel, cfg: AdapterConfig, *, float32: bool) -> PeftModel:
    """`model` with a new adapter, its weights in float32 or else in the base's precision.

    Raises:
        ModelError: The adapter does not fit the model.
    """
    config = lora_config(cfg, model)
    with _own_word_for("The following .*_pattern keys did not match"):
        policy: PeftModel = _attach(
            lambda: get_peft_model(model, config, adapter_name=POLICY_ADAPTER, autocast_adapter_dtype=float32)
        )
    require_all_found(policy, cfg, POLICY_ADAPTER)
    if float32:
        _trained_modules_in_float32(policy)
    return policy


def resume_adapter(
    model: PreTrainedModel,
    path: str,
    *,
    trainable: bool,
    float32: bool,
    pickle: bool,
    key: str = "lora_model_dir",
) -> PeftModel:
    """`model` with the saved adapter at `path`, a folder or a hub name, that the YAML key `key` names.

    Raises:
        ModelError: It is missing, damaged, only there as pickle, or was trained on another base.
    """
    source = _SavedAdapter(path, _adapter_folder(path, pickle=pickle, key=key), key)
    with _own_word_for("Found missing adapter keys"):
        policy: PeftModel = _attach(
            lambda: PeftModel.from_pretrained(
                model, source.folder, POLICY_ADAPTER, is_trainable=trainable, autocast_adapter_dtype=float32
            ),
            source,
        )
    _require_same_weights(policy, POLICY_ADAPTER, source)
    if float32:
        _trained_modules_in_float32(policy)
    return policy


def add_reference_adapter(
    model: PeftModel, path: str, *, pickle: bool, key: str = "reference.adapter"
) -> None:
    """Put the saved adapter at `path` beside the policy's, frozen and named "reference".

    Raises:
        ModelError: It is missing, damaged, only there as pickle, or was trained on another base.
    """
    source = _SavedAdapter(path, _adapter_folder(path, pickle=pickle, key=key), key)
    with _own_word_for("Found missing adapter keys"):
        _attach(
            lambda: model.load_adapter(
                source.folder, REFERENCE_ADAPTER, is_trainable=False, autocast_adapter_dtype=True
            ),
            source,
        )
    _require_same_weights(model, REFERENCE_ADAPTER, source)


def freeze_copy(model: PeftModel) -> None:
    """Add a frozen copy of the policy's adapter, named "reference". Nothing else about the model changes.

    Raises:
        ModelError: PEFT allows only one adapter of this kind (`bias` other than none).
    """
    config = copy.deepcopy(model.peft_config[POLICY_ADAPTER])
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"a frozen copy of a {config.peft_type} adapter cannot be kept; "
            "set `reference.schedule: precomputed`."
        )
    # Neutral in every way that would rewrite the base again: its decomposition and its layers' replication.
    config.init_lora_weights, config.loftq_config, config.layer_replication = True, {}, None
    with drawn_from(0):  # any seed: what is drawn is overwritten below
        _attach(lambda: model.add_adapter(REFERENCE_ADAPTER, config, autocast_adapter_dtype=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        source = renamed(name, REFERENCE_ADAPTER, POLICY_ADAPTER)
        if source != name:
            parameter.data = parameters[source].detach().clone()
            parameter.requires_grad_(False)


def merge_into_base(model: PeftModel, named: str) -> PreTrainedModel:
    """The base with its adapter's updates added to the weights; `named` is how errors speak of the adapter.

    Raises:
        ModelError: PEFT cannot add one of them, or a sum is not finite.
    """
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{named} cannot be merged into its base: {error}") from error
    return merged


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the model computes what its base computes; no parameter's `requires_grad` is touched.

    Leave it before any backward: gradient checkpointing would recompute another model.
    """
    return compat.peft_switch(model, disabled=True)


def active_adapter(model: nn.Module, name: str) -> AbstractContextManager[None]:
    """Inside, the model computes with the adapter `name`; no parameter's `requires_grad` is touched."""
    return compat.peft_switch(model, active=[name])


def renamed(parameter: str, old: str, new: str) -> str:
    """The parameter of the adapter `new` that stands where `parameter` stands in the adapter `old`."""
    return ".".join(new if part == old else part for part in parameter.split("."))


def base_name(parameter: str) -> str:
    """A parameter's name in the model below the adapter."""
    return parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _as_lists(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_lists(item) for item in value]
    if isinstance(value, dict):
        return {name: _as_lists(item) for name, item in value.items()}
    return value


@contextmanager
def _own_word_for(warning: str) -> Iterator[None]:
    # What PEFT warns of is an error here, raised with its names.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=warning)
        yield


def _attach(attach: Callable[[], _T], source: _SavedAdapter | None = None) -> _T:
    try:
        return attach()
    except (ValueError, RuntimeError, TypeError, KeyError, OSError, ImportError, SafetensorError) as error:
        if source is None:
            raise ModelError(f"the adapter does not fit this model: {error}") from error
        raise ModelError(
            f"{source.key}: the adapter in {source.path} does not fit this base model; was it trained on "
            f"another?\n{error}"
        ) from error


def _adapter_folder(path: str, *, pickle: bool, key: str) -> str:
    folder = Path(path)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(path, allow_patterns=["adapter_config.json", "adapter_model.*"]))
        # An invalid name, no network, no such repository: the hub client has an exception class for each.
        except Exception as error:
            raise ModelError(f"{key}: {path} is no folder, and not on the hub: {error}") from error
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{key}: {path} has no adapter_config.json, so it holds no adapter.")
    if not (folder / "adapter_model.safetensors").is_file() and not pickle:
        raise ModelError(
            f"{key}: {path} has no adapter_model.safetensors. Save the adapter again with PEFT, or "
            "set `allow_pickle_weights: true` if you trust where its .bin file comes from."
        )
    return str(folder)


def _require_same_weights(model: PeftModel, adapter: str, source: _SavedAdapter) -> None:
    stored = set(load_peft_weights(source.folder, device="cpu"))
    held = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    embeddings = {name for name in stored - held if "embed" in name or "lm_head" in name}
    missing, extra = sorted(held - stored), sorted(stored - held - embeddings)
    if missing or extra:
        verb, names = ("lacks", missing) if missing else ("holds", extra)
        raise ModelError(
            f"{source.key}: the adapter in {source.path} {verb} {len(names)} weights that this base model "
            f"{'needs' if missing else 'has no place for'} ({names[0]}, …): it was trained on another base."
        )


def _trained_modules_in_float32(model: PeftModel) -> None:
    # Weights held in bfloat16 lose small updates. The original goes along, so that switching the adapter off
    # changes the values and not the precision of what follows.
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.float()
