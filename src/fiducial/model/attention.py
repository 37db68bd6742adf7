"""Packed attention as one of transformers' attention implementations.

Two registrations under one name: an attention function, and a mask builder that builds no mask but hands on
the model's own mask function. Which tokens belong together arrives as the keyword argument `segments` of the
model's forward, so nothing is global and checkpointed layers see the same plan when they are recomputed.
Some models' layers drop keyword arguments; for them the plan rides on a 4-D `attention_mask`, which
transformers' mask code returns untouched (`carrier`). The mask builder does not run then, and a layer's
window is what it says by keyword.

Every keyword a model passes must be known here: one that is not could change what attention computes.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fiducial.errors import ModelError
from fiducial.model.attention_blocks import ScoreRule, block_attention
from fiducial.model.attention_plan import AttentionPlan, MaskNote, Visibility
from fiducial.model.attention_varlen import can_run, variable_length_attention

PACKED = "fiducial_packed"
"""The name under which transformers finds it."""

_IRRELEVANT = frozenset(
    {
        "cache_position",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)
"""Keywords that change nothing in attention itself: positions are already in queries and keys."""


class SegmentsMissingError(ModelError):
    """The model's layers dropped the keyword that says which tokens belong together."""


def register() -> None:
    """Make the implementation known to transformers. Doing so again changes nothing."""
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _note_mask)


def carrier(plan: AttentionPlan, device: torch.device) -> Float[Tensor, "1 1 1 1"]:
    """`plan` as an attention mask, for models whose layers drop keyword arguments."""
    tensor = torch.empty(1, 1, 1, 1, device=device)
    tensor.segments = plan  # type: ignore[attr-defined]  # a tensor may carry attributes; torch declares none
    return tensor


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads row head_dim"],
    key: Float[Tensor, "1 kv_heads row head_dim"],
    value: Float[Tensor, "1 kv_heads row value_dim"],
    attention_mask: MaskNote | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 row heads value_dim"], None]:
    """Attention of every segment to its prompt and to itself.

    Raises:
        SegmentsMissingError: `segments` did not arrive.
        ModelError: the layer asks for something that packed attention does not compute.
    """
    plan = _plan(module, attention_mask, kwargs.pop("segments", None))
    window, softcap, sinks = (kwargs.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
    _refuse(module, kwargs, dropout)
    assert plan.blocks[-1].stop == query.shape[2], "the segments are not those of this row"
    if isinstance(attention_mask, MaskNote):
        visibility = attention_mask.visibility(plan.longest, query.device)
    else:
        visibility = Visibility(window=window)
    rule = ScoreRule(query.shape[-1] ** -0.5 if scaling is None else scaling, visibility, softcap)
    if plan.variable_length is not None and can_run(query[0], value[0], rule, sinks):
        out = variable_length_attention(query[0], key[0], value[0], plan.variable_length, rule)
    else:
        out = block_attention(query[0], key[0], value[0], plan, rule, sinks)
    return out[None], None


def _note_mask(*, mask_function: Any = None, local_size: int | None = None, **_: object) -> MaskNote:
    return MaskNote(mask_function, local_size)


def _plan(module: nn.Module, mask: object, segments: AttentionPlan | None) -> AttentionPlan:
    plan = segments if segments is not None else getattr(mask, "segments", None)
    if plan is None:
        raise SegmentsMissingError(
            f"{type(module).__name__} was asked for packed attention without the segments of the row. "
            "Score through fiducial's Scorer; before calling the model otherwise, "
            "call the Scorer's restore_attention()."
        )
    assert isinstance(plan, AttentionPlan), f"segments is a {type(plan).__name__}"
    return plan


def _refuse(module: nn.Module, kwargs: dict[str, Any], dropout: float) -> None:
    name = type(module).__name__
    if dropout:
        raise ModelError(
            f"{name} applies dropout {dropout} to attention, which packed attention does not compute. "
            "Set it to 0 with model_config, for example model_config: {attention_dropout: 0.0}."
        )
    unknown = {key for key, given in kwargs.items() if given is not None} - _IRRELEVANT
    if kwargs.get("is_causal") is True:
        unknown -= {"is_causal"}
    if unknown:
        raise ModelError(
            f"{name} passes {', '.join(sorted(unknown))} to attention, which packed attention does not "
            "compute. Remove the setting of model_config or gradient_checkpointing_kwargs it comes from."
        )
