"""The sizes a config.json gives, and the tensors they imply where the weights are not at hand.

The tensors have Llama's names and layout: exact for its family, close for others (no biases, MLP gated
unless the family is known not to be). Good enough to estimate memory before a download; never used to judge
whether weights fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiducial.reference.checkpoint import TensorFact

UNGATED = frozenset(
    {
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "gpt_bigcode",
        "opt",
        "bloom",
        "falcon",
        "phi",
        "codegen",
        "starcoder2",
        "apertus",
        "arcee",
        "nemotron",
        "persimmon",
        "mpt",
        "biogpt",
        "xglm",
    }
)
"""Families whose MLP has one matrix up, not two."""
LEARNED_POSITIONS = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "opt", "biogpt"})
"""Families with an embedding for each position, and none for those beyond."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers a decoder is built from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of one MLP, or of one expert."""
    vocab_size: int
    experts: int = 1
    """MLPs a layer holds."""
    active_experts: int = 1
    """MLPs a token passes through in a layer."""
    per_layer_embeddings: int = 0
    """Embeddings of tokens that layers read beside their input (Gemma 3n and 4), all layers' together."""
    positions: int | None = None
    """Tokens of the longest sequence it was made for; None where its config does not say."""

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads together; values have the same."""
        return self.kv_heads * self.head_dim


def read_sizes(config: Mapping[str, Any]) -> Sizes | None:
    """The sizes in a config.json under the names families use; None where it describes no decoder."""
    hidden = _number(config, "hidden_size", "n_embd", "d_model", "dim")
    layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    layers = layers or len(config.get("layers_block_type") or config.get("layer_types") or ())
    vocab_size = _number(config, "vocab_size")
    if not (hidden and layers and vocab_size):
        return None
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", "num_heads") or 1
    width = _number(config, "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden
    experts = _number(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts") or 1
    mixture = experts > 1
    return Sizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_number(config, "num_key_value_heads") or heads,
        head_dim=_number(config, "head_dim") or hidden // heads,
        intermediate=(_number(config, "moe_intermediate_size") if mixture else None) or width,
        vocab_size=vocab_size,
        experts=experts,
        active_experts=(_number(config, "num_experts_per_tok", "moe_k") if mixture else None) or 1,
        per_layer_embeddings=_per_layer_embeddings(config, layers),
        positions=None
        if _is_stretched(config)
        else _number(config, "max_position_embeddings", "n_positions"),
    )


def _per_layer_embeddings(config: Mapping[str, Any], layers: int) -> int:
    width = _number(config, "hidden_size_per_layer_input") or 0
    return layers * width * (_number(config, "vocab_size_per_layer_input") or 0)


def _is_stretched(config: Mapping[str, Any]) -> bool:
    """Whether positions are scaled, so that there may be more of them than the config's number."""
    return bool((config.get("rope_parameters") or config.get("rope_scaling") or {}).get("factor"))


def implied_tensors(sizes: Sizes, *, tied: bool, gated: bool, dtype: str) -> dict[str, TensorFact]:
    """Names and shapes of a decoder with these sizes; `dtype` is safetensors' name of it."""
    hidden = sizes.hidden
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (sizes.queries, hidden),
        "self_attn.k_proj": (sizes.keys, hidden),
        "self_attn.v_proj": (sizes.keys, hidden),
        "self_attn.o_proj": (hidden, sizes.queries),
    }
    if sizes.experts > 1:
        layer["mlp.router"] = (sizes.experts, hidden)
    for expert in range(sizes.experts):
        mlp = "mlp" if sizes.experts == 1 else f"mlp.experts.{expert}"
        layer |= {
            f"{mlp}.up_proj": (sizes.intermediate, hidden),
            f"{mlp}.down_proj": (hidden, sizes.intermediate),
        }
        if gated:
            layer[f"{mlp}.gate_proj"] = (sizes.intermediate, hidden)
    shapes = {"model.embed_tokens.weight": (sizes.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for index in range(sizes.layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if sizes.per_layer_embeddings:
        shapes["model.embed_tokens_per_layer.weight"] = (sizes.per_layer_embeddings,)
    if not tied:
        shapes["lm_head.weight"] = (sizes.vocab_size, hidden)
    return {name: TensorFact(dtype, shape) for name, shape in shapes.items()}


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    firsts = (value[0] if isinstance(value, list) and value else value for value in values)  # one a layer
    return next((value for value in firsts if isinstance(value, int)), None)
