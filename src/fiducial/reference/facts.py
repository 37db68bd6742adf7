"""What a plan must know of the checkpoints, read from their files without loading them.

`gather_facts` reads JSON and safetensors headers only, so planning takes a blink and needs no torch. Where a
hub checkpoint's weights are not cached, its tensors are those its config.json implies (`shapes_are_exact`
False).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.reference.adapter_facts import (
    DRAWN_INIT,
    AdapterFacts,
    check_adapter_fits,
    check_own_settings,
    read_adapter_facts,
)
from fiducial.reference.checkpoint import (
    CheckpointFiles,
    TensorFact,
    open_checkpoint,
    read_sharded_tensor_facts,
)
from fiducial.reference.same_base import differing_weight
from fiducial.reference.shapes import UNGATED, Sizes, implied_tensors, read_sizes
from fiducial.reference.vocabulary import Vocabulary, read_vocabulary, with_tokens

__all__ = ["AdapterFacts", "Facts", "ModelFacts", "gather_facts"]

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_HEADS = ("lm_head.weight", "embed_out.weight")
_GATES = ("gate_proj", "gate_up_proj", ".w3.", ".linear_v.")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A causal language model's shape."""

    location: str
    model_type: str
    architecture: str | None
    num_parameters: int
    """Elements of all weights; tied ones count once."""
    sizes: Sizes
    gated: bool
    """Whether the MLP has a gate beside its up-projection."""
    tied_embeddings: bool
    has_biases: bool | None
    """Whether linear layers have biases; None where the weights' names are not known."""
    dtype: str
    """How the weights are stored."""
    quantized: bool
    tensors: Mapping[str, TensorFact]
    shapes_are_exact: bool
    """Whether `tensors` was read from the weights rather than implied by config.json."""


@dataclass(frozen=True, slots=True)
class Facts:
    """All a plan needs beside the configuration."""

    model: ModelFacts
    adapter: AdapterFacts | None = None
    """The adapter the run resumes."""
    reference: ModelFacts | None = None
    """The checkpoint `reference.model` names."""
    notes: tuple[str, ...] = ()
    reference_adapter: AdapterFacts | None = None
    """The adapter `reference.adapter` names."""
    vocabulary: Vocabulary | None = None
    """The policy's, where another checkpoint is the reference and files tell it."""
    reference_vocabulary: Vocabulary | None = None


def gather_facts(cfg: RunConfig) -> Facts:
    """Read what planning needs of the base model, the resumed adapter and the named reference.

    Raises:
        ModelError: a checkpoint or adapter is missing, damaged, no causal LM, or they do not fit together.
    """
    model = _model_facts(cfg, cfg.model.base_model, cfg.model.revision, key="base_model")
    if model.quantized and cfg.adapter is None:
        raise ModelError(
            f"base_model: {cfg.model.base_model} holds quantized weights, which cannot be trained in full. "
            "Set adapter: lora, or use a checkpoint in float32 or bfloat16."
        )
    reference = None
    served = cfg.reference.endpoint is not None  # its name there is no place of files
    if cfg.reference.model is not None and not served:
        reference = _model_facts(cfg, cfg.reference.model, cfg.reference.revision, key="reference.model")
    adapter, note = _adapter_facts(cfg, cfg.adapter.path if cfg.adapter else None, model, "lora_model_dir")
    other, other_note = _adapter_facts(
        cfg, None if served else cfg.reference.adapter, reference or model, "reference.adapter"
    )
    policy, theirs = _vocabularies(cfg) if reference is not None else (None, None)
    notes = tuple(found for found in (note, other_note) if found)
    return Facts(model, adapter, reference, notes, other, policy, theirs)


def _adapter_facts(
    cfg: RunConfig, location: str | None, base: ModelFacts, key: str
) -> tuple[AdapterFacts | None, str | None]:
    """The adapter at `location` if there is one, and a note where its base has another name."""
    if location is None:
        return None, None
    adapter = read_adapter_facts(location, key, allow_pickle=cfg.model.allow_pickle_weights)
    _require_split_again(adapter)
    if key == "lora_model_dir" and cfg.adapter is not None:
        check_own_settings(adapter, cfg.adapter)
    stored = base.tensors if base.shapes_are_exact else None
    note = check_adapter_fits(adapter, base.location, stored, tied=base.tied_embeddings)
    if note is not None and key == "reference.adapter":
        _require_its_base(adapter, base)
    return adapter, note


def _require_split_again(adapter: AdapterFacts) -> None:
    """Refuse an adapter whose base was split by random numbers: when it is loaded, it is split anew."""
    if str(adapter.init_lora_weights).startswith(DRAWN_INIT):
        raise ModelError(
            f"{adapter.key}: {adapter.location} began with init_lora_weights: {adapter.init_lora_weights}, "
            "which splits the base weights by random numbers that are not saved. Loaded again it is "
            "another policy than was trained. Name the merged model instead: fiducial merge, of the run that "
            "trained it."
        )


def _require_its_base(adapter: AdapterFacts, base: ModelFacts) -> None:
    """Refuse a reference's adapter on another base than its own, where both are at hand to be compared."""
    assert adapter.base_model is not None, "its name was compared"
    try:
        own = open_checkpoint(adapter.base_model, None, key=adapter.key)
        different = differing_weight(own, open_checkpoint(base.location, None, key=adapter.key))
    except ModelError:  # the base it was trained on is not here
        return
    if different is not None:
        raise ModelError(
            f"{adapter.key}: {adapter.location} was trained on {adapter.base_model}, and {base.location} is "
            f"another base: {different} differs. Set reference.model: {adapter.base_model}."
        )


def _vocabularies(cfg: RunConfig) -> tuple[Vocabulary | None, Vocabulary | None]:
    """What the tokenizers of policy and named reference say, as far as their files are at hand."""
    assert cfg.reference.model is not None
    settings = cfg.tokenizer
    place, revision = settings.path, None
    if place is None:
        place, revision = cfg.model.base_model, cfg.model.revision
    own = read_vocabulary(open_checkpoint(place, revision, key="tokenizer_config"))
    if own is not None:
        own = with_tokens(own, (*settings.special_tokens.values(), *settings.tokens))
    return own, read_vocabulary(
        open_checkpoint(cfg.reference.model, cfg.reference.revision, key="reference.model")
    )


def _model_facts(cfg: RunConfig, location: str, revision: str | None, *, key: str) -> ModelFacts:
    files = open_checkpoint(location, revision, key=key)
    config = files.read_json("config.json")
    if config is None:
        raise _no_config(files)
    policy = key == "base_model"
    config = {**config, **(config.get("text_config") or {}), **(cfg.model.config_overrides if policy else {})}
    _check_causal(config, files)
    tensors = read_sharded_tensor_facts(files, "model")
    drawn_at_random = policy and cfg.model.reinit_weights
    if tensors is None and files.folder is not None and not drawn_at_random:
        _check_pickled(files, allowed=cfg.model.allow_pickle_weights)
    # Stored shapes are not the built model's where the config is overridden or the weights are packed
    # integers.
    differ = "quantization_config" in config or drawn_at_random or (policy and cfg.model.config_overrides)
    return _describe(config, None if differ else tensors, files)


def _describe(
    config: Mapping[str, Any], stored: Mapping[str, TensorFact] | None, files: CheckpointFiles
) -> ModelFacts:
    sizes = read_sizes(config)
    if sizes is None:
        raise ModelError(
            f"{files.key}: config.json of {files.location} does not give hidden_size, num_hidden_layers and "
            "vocab_size, so it does not describe a language model that is supported. Check the checkpoint."
        )
    tied = bool(config.get("tie_word_embeddings", True)) if stored is None else _is_tied(config, stored)
    gated = str(config.get("model_type")) not in UNGATED
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if stored is None:
        short = next((short for short, name in _DTYPES.items() if name == dtype), "F32")
        tensors: Mapping[str, TensorFact] = implied_tensors(sizes, tied=tied, gated=gated, dtype=short)
    else:
        tensors = {name: fact for name, fact in stored.items() if not (tied and name.endswith(_HEADS))}
        gated = any(gate in name for name in tensors for gate in _GATES)
        dtype = _most_common_dtype(tensors) or dtype
    return ModelFacts(
        location=files.location,
        model_type=str(config.get("model_type", "unknown")),
        architecture=next(iter(config.get("architectures") or ()), None),
        num_parameters=sum(tensor.size for tensor in tensors.values()),
        sizes=sizes,
        gated=gated,
        tied_embeddings=tied,
        has_biases=None if stored is None else _has_biases(tensors),
        dtype=dtype,
        quantized="quantization_config" in config,
        tensors=tensors,
        shapes_are_exact=stored is not None,
    )


def _is_tied(config: Mapping[str, Any], stored: Mapping[str, TensorFact]) -> bool:
    has_head = any(name.endswith(_HEADS) for name in stored)
    return bool(config.get("tie_word_embeddings", not has_head))


def _has_biases(tensors: Mapping[str, TensorFact]) -> bool:
    """Whether a matrix (not a norm) has a bias."""
    return any(
        name.endswith(".bias") and len(weight.shape) > 1
        for name in tensors
        if (weight := tensors.get(name.removesuffix("bias") + "weight"))
    )


def _most_common_dtype(tensors: Mapping[str, TensorFact]) -> str | None:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return _DTYPES.get(max(sizes, key=lambda name: sizes[name])) if sizes else None


def _check_causal(config: Mapping[str, Any], files: CheckpointFiles) -> None:
    """A text decoder by its architecture's name; one without a name is left to transformers to judge."""
    architecture = next(iter(config.get("architectures") or ()), None)
    decoder = architecture is None or architecture.endswith(("ForCausalLM", "LMHeadModel"))
    with_vision = "text_config" in config and str(architecture).endswith("ForConditionalGeneration")
    remote = "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if not (decoder or with_vision or remote) or config.get("is_encoder_decoder"):
        raise ModelError(
            f"{files.key}: {files.location} is a {architecture}, not a causal language model. Preference "
            "losses need the log-probs of a decoder: give a checkpoint whose config.json names a "
            "…ForCausalLM architecture."
        )


def _no_config(files: CheckpointFiles) -> ModelError:
    adapter = files.read_json("adapter_config.json")
    if adapter is None:
        return ModelError(
            f"{files.key}: {files.location} has no config.json, so it is no transformers checkpoint. Give "
            "the folder that save_pretrained wrote."
        )
    base = adapter.get("base_model_name_or_path") or "its base model"
    return ModelError(
        f"{files.key}: {files.location} is an adapter, not a model. Set base_model: {base}, adapter: lora "
        f"and lora_model_dir: {files.location}."
    )


def _check_pickled(files: CheckpointFiles, *, allowed: bool) -> None:
    pickled = files.find("pytorch_model.bin") or files.find("pytorch_model.bin.index.json")
    if pickled is None:
        raise ModelError(
            f"{files.key}: {files.location} has a config.json and no weights (model.safetensors). Download "
            "the checkpoint again, or set reinit_weights: true to draw them at random."
        )
    if not allowed:
        raise ModelError(
            f"{files.key}: {files.location} holds its weights as pickle ({pickled.name}), which can run code "
            "when opened. Save it as safetensors, or set allow_pickle_weights: true if you trust its author."
        )
