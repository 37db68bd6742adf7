"""Packed attention on CUDA through variable-length flash attention.

Keys and values of a prompt are gathered once for each completion that sees it; queries stay in row order.
Both kernels align a causal mask to the last query and the last key, which is what `prompt + completion` keys
with only the completion's queries need. Their window counts earlier keys, without the query's own.
"""

from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fiducial.model.attention_blocks import Key, Query, ScoreRule, Value
from fiducial.model.attention_plan import VariableLengthIndex

_MAX_HEAD_DIM = 256


def can_run(query: Query, value: Value, rule: ScoreRule, sinks: Tensor | None) -> bool:
    """Whether an installed kernel computes exactly `rule` for these tensors."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[2]
    same_width = width == value.shape[2] and width <= _MAX_HEAD_DIM and width % 8 == 0
    plain = rule.visibility.function is None and sinks is None
    capped = rule.softcap is not None and find_spec("flash_attn") is None
    return value.is_cuda and half and same_width and plain and not capped


def variable_length_attention(
    query: Query, key: Key, value: Value, index: VariableLengthIndex, rule: ScoreRule
) -> Float[Tensor, "row heads value_dim"]:
    """softmax(scores) · value for every query of the row; `key` and `value` may have fewer heads."""
    queries = query.to(value.dtype).transpose(0, 1).contiguous()
    keys = key.to(value.dtype).transpose(0, 1).index_select(0, index.keys)
    values = value.transpose(0, 1).index_select(0, index.keys)
    earlier = -1 if rule.visibility.window is None else rule.visibility.window - 1
    offsets = (index.query_offsets, index.key_offsets, index.longest_query, index.longest_key)
    kernel = _torch_kernel if rule.softcap is None else _flash_attn_kernel
    return kernel(queries, keys, values, offsets, rule, earlier)


@cache
def _groups_heads() -> bool:
    """Whether torch's kernel takes fewer key heads than queries: from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


Offsets = tuple[Tensor, Tensor, int, int]


def _torch_kernel(
    query: Tensor, key: Tensor, value: Tensor, offsets: Offsets, rule: ScoreRule, earlier: int
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # not every build of torch has it

    options: dict[str, Any] = {"scale": rule.scaling}
    if query.shape[1] != key.shape[1]:
        if _groups_heads():
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # A tuple: torch compares the window with (-1, 0) to know causal attention.
    out = varlen_attn(query, key, value, *offsets, window_size=(earlier, 0), **options)
    assert isinstance(out, Tensor), "no auxiliary output was asked for"
    return out


def _flash_attn_kernel(
    query: Tensor, key: Tensor, value: Tensor, offsets: Offsets, rule: ScoreRule, earlier: int
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    assert rule.softcap is not None, "soft-capping is why this kernel was chosen"
    options: dict[str, Any] = {"softmax_scale": rule.scaling, "causal": True, "softcap": rule.softcap}
    window = (earlier, 0) if earlier >= 0 else (-1, -1)
    out: Tensor = flash_attn_varlen_func(query, key, value, *offsets, window_size=window, **options)
    return out
