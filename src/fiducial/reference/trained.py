"""Which weights a run trains, counted from tensor shapes alone.

Modules are matched as PEFT matches them: a name's end, or a regular expression over the whole name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fiducial.config.schema import ALL_LINEAR, AdapterConfig, RunConfig
from fiducial.reference.checkpoint import TensorFact
from fiducial.reference.facts import Facts

_QUERY_AND_VALUE = (
    *(
        "llama",
        "llama4",
        "mistral",
        "mixtral",
        "stablelm",
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen2",
        "qwen3",
    ),
    *("opt", "gptj", "gpt_neo"),
)
USUAL_TARGETS: Mapping[str, tuple[str, ...]] = (
    dict.fromkeys(_QUERY_AND_VALUE, ("q_proj", "v_proj"))
    | dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",))
    | dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",))
    | {"phi": ("q_proj", "v_proj", "fc1", "fc2")}
)
"""PEFT's target modules by model type; for other types all linear layers are taken."""

_NOT_TARGETS = ("embed", "lm_head", "wte", "wpe", "norm", "router")
_LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.(.*)$")
_ABOVE_LAYERS = re.compile(
    r"(?:^|\.)(?:norm|ln_f|final_layer_?norm|final_norm|lm_head|embed_out)(?:\.(?:weight|bias))?$"
)


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """How many weights an optimizer step changes."""

    base: int
    """Weights of the base model, changed in place."""
    adapter: int
    """Weights an adapter adds."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.adapter


def count_trained(cfg: RunConfig, facts: Facts) -> TrainedWeights:
    """Weights this run trains: the base's, an adapter's, or both."""
    tensors = facts.model.tensors
    patterns = cfg.model.unfrozen_parameters
    unfrozen = 0
    if patterns is not None:
        unfrozen = sum(tensor.size for name, tensor in tensors.items() if is_trained(cfg, name))
    if cfg.adapter is None:
        return TrainedWeights(facts.model.num_parameters if patterns is None else unfrozen, 0)
    if facts.adapter is not None and facts.adapter.num_parameters is not None:
        return TrainedWeights(unfrozen, facts.adapter.num_parameters)
    return TrainedWeights(unfrozen + _biases(cfg.adapter, facts), _new_adapter(cfg.adapter, facts))


def layer_of(name: str) -> int | None:
    """The layer a weight or module is in; None if it is outside of the layers."""
    found = _LAYER.search(f"{name}.")
    return int(found[1]) if found else None


def name_in_first_layer(name: str) -> str | None:
    """What a weight is called inside the lowest layer; None if it is not in it."""
    found = _LAYER.search(name)
    return found[2] if found and int(found[1]) == 0 else None


def is_trained(cfg: RunConfig, name: str) -> bool:
    """Whether a run without adapter trains the base's weight `name`."""
    patterns = cfg.model.unfrozen_parameters
    return patterns is None or any(re.match(pattern, name) for pattern in patterns)


def untrained_layers(cfg: RunConfig, facts: Facts) -> int:
    """How many layers, from the lowest, hold nothing that is trained and have nothing trained below them.

    What cannot be placed by its name counts as below all layers.
    """
    total = facts.model.sizes.layers

    def below(name: str) -> int:
        layer = layer_of(name)
        return layer if layer is not None else total if _ABOVE_LAYERS.search(name) else 0

    return min(map(below, _trained_names(cfg, facts)), default=0)


def trains_below_layers(cfg: RunConfig, facts: Facts) -> bool:
    """Whether something is trained that the lowest layer reads, or that cannot be placed by its name."""
    names = _trained_names(cfg, facts)
    return any(layer_of(name) is None and not _ABOVE_LAYERS.search(name) for name in names)


def _trained_names(cfg: RunConfig, facts: Facts) -> Iterator[str]:
    """Weights and modules in which something is trained; "" for what has no name here."""
    tensors = facts.model.tensors
    adapter = cfg.adapter
    if adapter is None or cfg.model.unfrozen_parameters is not None:
        yield from (name for name in tensors if is_trained(cfg, name))
    if adapter is None:
        return
    if facts.adapter is not None:
        yield from facts.adapter.tensors or ("",)
        return
    if adapter.bias != "none" or adapter.target_parameters or adapter.trainable_token_indices:
        yield ""
    if adapter.layer_replication:
        yield ""
    yield from (module for module, _ in target_weights(adapter, facts))
    yield from (
        name
        for name in tensors
        if any(_ends_with(name.rpartition(".")[0], module) for module in adapter.modules_to_save)
    )


def target_weights(cfg: AdapterConfig, facts: Facts) -> Iterator[tuple[str, TensorFact]]:
    """The base's weight matrices that get low-rank factors."""
    for name, tensor in facts.model.tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(tensor.shape) == 2 and _is_target(module, cfg, facts):
            yield module, tensor


def _is_target(module: str, cfg: AdapterConfig, facts: Facts) -> bool:
    if not _in_chosen_layers(module, cfg):
        return False
    targets = cfg.target_modules
    if isinstance(targets, str) and targets != ALL_LINEAR:
        return re.fullmatch(targets, module) is not None
    if targets is None and not cfg.target_linear:
        if cfg.target_parameters:
            return False
        targets = USUAL_TARGETS.get(facts.model.model_type)
    linear = cfg.target_linear or targets is None or targets == ALL_LINEAR
    if linear and not any(part in module for part in _NOT_TARGETS):
        return True
    return not isinstance(targets, str) and any(_ends_with(module, target) for target in targets or ())


def _in_chosen_layers(module: str, cfg: AdapterConfig) -> bool:
    index = re.search(r"\.(\d+)\.", module)
    return not cfg.layers_to_transform or (index is not None and int(index[1]) in cfg.layers_to_transform)


def _new_adapter(cfg: AdapterConfig, facts: Facts) -> int:
    tensors = facts.model.tensors
    total = 0
    for module, weight in target_weights(cfg, facts):
        rank = next((r for pattern, r in cfg.rank_pattern.items() if _matches(pattern, module)), cfg.r)
        total += rank * sum(weight.shape) + (weight.shape[0] if cfg.use_dora else 0)
    for name, weight in tensors.items():
        if any(_ends_with(name, parameter) for parameter in cfg.target_parameters):
            experts = weight.shape[0] if len(weight.shape) == 3 else 1
            total += experts * cfg.r * sum(weight.shape[-2:])
        if any(_ends_with(name.rpartition(".")[0], module) for module in cfg.modules_to_save):
            total += weight.size
    indices = cfg.trainable_token_indices or ()
    rows = sum(map(len, indices.values())) if isinstance(indices, dict) else len(indices)
    return total + rows * facts.model.sizes.hidden


def _biases(cfg: AdapterConfig, facts: Facts) -> int:
    if cfg.bias == "none":
        return 0
    targets = {f"{module}.bias" for module, _ in target_weights(cfg, facts)}
    return sum(
        tensor.size
        for name, tensor in facts.model.tensors.items()
        if name.endswith(".bias") and (cfg.bias == "all" or name in targets)
    )


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
