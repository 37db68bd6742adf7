"""Packed attention on CUDA through variable-length flash attention.

Keys and values of a prompt are gathered once for each completion that sees it; queries stay in row order.
Both kernels align a causal mask to the last query and the last key, which is what `prompt + completion` keys
with only the completion's queries need. Their window counts earlier keys, without the query's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fiducial.model.attention_blocks import Key, Query, ScoreRule, Value
from fiducial.model.attention_plan import VariableLengthIndex

_MAX_HEAD_DIM = 256
_AMPERE = (8, 0)
_SMALL_SHARED_MEMORY = {(8, 6), (8, 7), (8, 8), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities on which flash attention has no backward for some widths."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The functions that launch what is installed."""

    torch: Callable[..., Any]
    """`torch.nn.attention.varlen.varlen_attn`."""
    flash_attn: Callable[..., Any] | None
    """`flash_attn.flash_attn_varlen_func`, which alone caps scores; None where there is none."""


@cache
def installed() -> Kernels:
    """What this machine has."""
    from torch.nn.attention.varlen import varlen_attn  # not every build of torch has it

    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # nor has flash-attn 4, which goes by the same name
        flash_attn_varlen_func = None
    return Kernels(varlen_attn, flash_attn_varlen_func)


@cache
def _groups_heads(kernel: Callable[..., Any]) -> bool:
    """Whether torch's kernel takes fewer key heads than queries: from 2.12 on."""
    return "enable_gqa" in signature(kernel).parameters


def can_run(query: Query, value: Value, rule: ScoreRule, sinks: Tensor | None) -> bool:
    """Whether an installed kernel computes exactly `rule` for these tensors."""
    half = value.dtype in (torch.bfloat16, torch.float16)
    width = query.shape[2]
    same_width = width == value.shape[2] and width <= _MAX_HEAD_DIM and width % 8 == 0
    plain = rule.visibility.function is None and sinks is None
    if not (value.is_cuda and half and same_width and plain and has_kernel(value.device, width)):
        return False
    return rule.softcap is None or installed().flash_attn is not None


@cache
def has_kernel(device: torch.device, width: int) -> bool:
    """Whether flash attention of heads of `width` goes both ways on `device`, by torch's sdp_utils.cpp."""
    capability = torch.cuda.get_device_capability(device)
    trains = not (192 < width <= 224 and capability in _SMALL_SHARED_MEMORY)
    return capability >= _AMPERE and trains


def variable_length_attention(
    query: Query,
    key: Key,
    value: Value,
    index: VariableLengthIndex,
    rule: ScoreRule,
    kernels: Kernels | None = None,
) -> Float[Tensor, "row heads value_dim"]:
    """softmax(scores) · value for every query of the row; `key` and `value` may have fewer heads.

    `kernels` replace those that are installed.
    """
    kernels = kernels or installed()
    queries = query.to(value.dtype).transpose(0, 1).contiguous()
    keys = key.to(value.dtype).transpose(0, 1).index_select(0, index.keys)
    values = value.transpose(0, 1).index_select(0, index.keys)
    earlier = -1 if rule.visibility.window is None else rule.visibility.window - 1
    offsets = (index.query_offsets, index.key_offsets, index.longest_query, index.longest_key)
    launch = _by_torch if rule.softcap is None else _by_flash_attn
    return launch(kernels, (queries, keys, values), offsets, rule, earlier)


Inputs = tuple[Tensor, Tensor, Tensor]
Offsets = tuple[Tensor, Tensor, int, int]


def _by_torch(kernels: Kernels, inputs: Inputs, offsets: Offsets, rule: ScoreRule, earlier: int) -> Tensor:
    query, key, value = inputs
    options: dict[str, Any] = {"scale": rule.scaling}
    if query.shape[1] != key.shape[1]:
        if _groups_heads(kernels.torch):
            options["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    # A tuple: torch compares the window with (-1, 0) to know causal attention.
    out = kernels.torch(query, key, value, *offsets, window_size=(earlier, 0), **options)
    assert isinstance(out, Tensor), "no auxiliary output was asked for"
    return out


def _by_flash_attn(
    kernels: Kernels, inputs: Inputs, offsets: Offsets, rule: ScoreRule, earlier: int
) -> Tensor:
    assert kernels.flash_attn is not None, "`can_run` was asked"
    options: dict[str, Any] = {"softmax_scale": rule.scaling, "causal": True, "softcap": rule.softcap}
    window = (earlier, 0) if earlier >= 0 else (-1, -1)
    out: Tensor = kernels.flash_attn(*inputs, *offsets, window_size=window, **options)
    return out
