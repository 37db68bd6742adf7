"""What a plan must know of an adapter on disk, and whether it belongs to this base model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fiducial.config.schema import ALL_LINEAR, AdapterConfig
from fiducial.errors import ModelError
from fiducial.reference.checkpoint import (
    TensorFact,
    open_checkpoint,
    read_sharded_tensor_facts,
    same_place,
)

_BASE_KEY = {"lora_model_dir": "base_model", "reference.adapter": "reference.model"}
_PREFIX = "base_model.model."
DRAWN_INIT = "pissa_niter"
"""How the name of a start begins that PEFT draws anew, and otherwise, whenever the adapter is loaded."""
_HEADS = ("lm_head", "embed_out")
_FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter on disk, as adapter_config.json and the weights' header describe it."""

    location: str
    peft_type: str
    key: str = "lora_model_dir"
    """The YAML key that names it."""
    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ()
    """Names, or one regular expression."""
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    """Ranges of the base's layers that it stacked them from; empty where the layers are the base's own."""
    base_model: str | None = None
    """The base it was trained on, as its config names it."""
    tensors: Mapping[str, TensorFact] | None = None
    """None where the weights cannot be seen: on the hub and not cached, or pickled."""

    @property
    def num_parameters(self) -> int | None:
        """Elements of all its tensors, if they can be seen."""
        return None if self.tensors is None else sum(tensor.size for tensor in self.tensors.values())


def read_adapter_facts(location: str, key: str = "lora_model_dir", *, allow_pickle: bool) -> AdapterFacts:
    """Read the adapter that the YAML key `key` names.

    Raises:
        ModelError: there is no adapter, it is damaged, of a kind that does not act on every token, or its
            weights are pickled and that is not allowed.
    """
    files = open_checkpoint(location, None, key=key)
    config = files.read_json("adapter_config.json")
    if config is None:
        raise ModelError(
            f"{key}: {location} has no adapter_config.json, so it is no PEFT adapter. Give the folder that "
            "save_pretrained of a PEFT model wrote."
        )
    if config.get("alora_invocation_tokens"):
        raise ModelError(
            f"{key}: {location} is an activated LoRA, which waits in each sequence for its "
            "alora_invocation_tokens and changes nothing before them. That is not in this version: give an "
            "adapter that acts on every token."
        )
    tensors = read_sharded_tensor_facts(files, "adapter_model")
    if tensors is None and files.folder is not None:
        _check_pickled(
            key, location, exists=files.find("adapter_model.bin") is not None, allowed=allow_pickle
        )
    return AdapterFacts(
        location=location,
        peft_type=str(config.get("peft_type", "unknown")),
        key=key,
        r=config.get("r"),
        alpha=config.get("lora_alpha"),
        dropout=config.get("lora_dropout") or 0.0,
        init_lora_weights=config.get("init_lora_weights", True),
        bias=config.get("bias") or "none",
        use_dora=bool(config.get("use_dora")),
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        target_modules=_names(config, "target_modules"),
        modules_to_save=_names(config, "modules_to_save"),
        target_parameters=_names(config, "target_parameters"),
        layer_replication=tuple((first, stop) for first, stop in config.get("layer_replication") or ()),
        base_model=config.get("base_model_name_or_path") or None,
        tensors=tensors,
    )


_OWN = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_bias": "bias",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
}
"""Keys of a new adapter, of which a resumed one has its own."""


def check_own_settings(adapter: AdapterFacts, cfg: AdapterConfig) -> None:
    """Refuse what the run asks of a resumed adapter and would not get.

    A value that is the default may be one that nobody wrote, and says nothing.

    Raises:
        ModelError: a setting other than the adapter's own.
    """
    for key, name in _OWN.items():
        asked, own = getattr(cfg, name), getattr(adapter, name)
        default = AdapterConfig.model_fields[name].get_default(call_default_factory=True)
        if asked == default or own is None or _plain(asked) == _plain(own):
            continue
        if name == "target_modules" and (cfg.target_linear or ALL_LINEAR in _plain(asked)):
            continue  # the adapter has the names that this stood for
        raise ModelError(
            f"{key}: {_plain(asked)} has no effect: lora_model_dir goes on with the adapter in "
            f"{adapter.location} as it is, with {_plain(own) or 'none'}. Write that, or remove {key}."
        )


def _plain(setting: Any) -> Any:
    """A setting as YAML has it; of several names the order means nothing."""
    if not isinstance(setting, tuple):
        return setting
    return setting[0] if len(setting) == 1 else sorted(setting)


def check_adapter_fits(
    adapter: AdapterFacts, base: str, base_tensors: Mapping[str, TensorFact] | None, *, tied: bool
) -> str | None:
    """Compare the adapter with the base it is to be put on; answers with a note where only the name differs.

    Args:
        adapter: The adapter to resume.
        base: Where the run's base model is.
        base_tensors: The base's tensors as stored; None where they cannot be seen.
        tied: Whether the base's head is its embedding, and so is not stored.

    Raises:
        ModelError: the adapter was trained on another base.
    """
    same_name = adapter.base_model is None or same_place(adapter.base_model, base)
    misfit = None
    if adapter.tensors is not None and base_tensors is not None:
        misfit = _misfit(adapter, adapter.tensors, base_tensors, tied=tied)
    if misfit:
        trained_on = f" It was trained on {adapter.base_model}." if adapter.base_model else ""
        raise ModelError(
            f"{adapter.key}: {adapter.location} does not fit base_model {base}: {misfit}.{trained_on} Set "
            f"{_BASE_KEY[adapter.key]} to the model the adapter was trained on."
        )
    if same_name:
        return None
    compared = adapter.tensors is not None and base_tensors is not None
    advice = (
        "Its shapes fit; make sure that the weights are the same."
        if compared
        else "Whether its shapes fit is known when they are loaded."
    )
    return (
        f"{adapter.key}: the adapter was trained on {adapter.base_model}, and base_model is {base}. {advice}"
    )


def _misfit(
    adapter: AdapterFacts, tensors: Mapping[str, TensorFact], base: Mapping[str, TensorFact], *, tied: bool
) -> str | None:
    """The first module whose low-rank factors do not multiply to the base weight's shape."""
    modules = {
        name.removeprefix(_PREFIX).removesuffix(first): (fact, tensors.get(name.replace(first, second)))
        for first, second in _FACTORS
        for name, fact in tensors.items()
        if name.endswith(first)
    }
    for module, (down, up) in modules.items():
        weight = base.get(f"{_in_base(module, adapter)}.weight")
        if weight is None:
            if tied and module.endswith(_HEADS):
                continue
            return f"the base has no {module}"
        if up is None:
            return f"{module} has only one of its two factors"
        if sorted((down.shape[-1], up.shape[0])) != sorted(weight.shape):
            product = f"{up.shape[0]} x {down.shape[-1]}"
            return f"{module} is {product} in the adapter and {_times(weight)} in the base"
    return None


def _in_base(module: str, adapter: AdapterFacts) -> str:
    """The base's name of a module of the model under the adapter."""
    if not adapter.layer_replication:
        return module
    stacked = [layer for first, stop in adapter.layer_replication for layer in range(first, stop)]

    def original(found: re.Match[str]) -> str:
        number = int(found[2])
        return f"{found[1]}{stacked[number] if number < len(stacked) else number}."

    return re.sub(r"(\blayers\.|\bh\.)(\d+)\.", original, module, count=1)


def _times(tensor: TensorFact) -> str:
    return " x ".join(str(size) for size in tensor.shape)


def _names(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = config.get(key) or ()
    return (value,) if isinstance(value, str) else tuple(value)


def _check_pickled(key: str, location: str, *, exists: bool, allowed: bool) -> None:
    if not exists:
        raise ModelError(f"{key}: {location} has no adapter_model.safetensors: the adapter has no weights.")
    if not allowed:
        raise ModelError(
            f"{key}: {location} holds its weights as pickle (adapter_model.bin), which can run code when "
            "opened. Save it as safetensors, or set allow_pickle_weights: true if you trust its author."
        )
