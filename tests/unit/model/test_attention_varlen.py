"""The path to variable-length kernels, launched into naive ones that are as strict: no GPU is needed.

They refuse what the real ones refuse (flash_api.cpp of torch 2.11 to 2.13, and of flash-attn) and what the
real ones silently get wrong.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fiducial.data.batch import Segment, pack
from fiducial.model.attention_blocks import ScoreRule, block_attention
from fiducial.model.attention_plan import AttentionPlan, Visibility, _variable_length, plan_attention
from fiducial.model.attention_varlen import Kernels, can_run, has_kernel, variable_length_attention
from tiny import random_groups

CPU = torch.device("cpu")
SCALE = 0.3
ROUNDING = {torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Of one product's result, as a share of a tensor's norm."""
Window = tuple[int, int]


def varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
) -> Tensor:
    """As `torch.nn.attention.varlen.varlen_attn` before 2.12."""
    assert query.shape[1] == key.shape[1], "it knows no groups of heads"
    assert return_aux is None
    return naive((query, key, value), (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def varlen_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: Window = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """The same from 2.12 on."""
    assert query.shape[1] == key.shape[1] or enable_gqa, "groups of heads must be asked for"
    assert return_aux is seqused_k is block_table is num_splits is None
    assert cu_seq_k is not None
    return naive((query, key, value), (cu_seq_q, cu_seq_k), (max_q, max_k), scale, window_size)


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """As `flash_attn.flash_attn_varlen_func`, the arguments behind `softcap` left out."""
    assert dropout_p == 0
    window = (window_size[0], 0) if causal else window_size
    offsets, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
    return naive((q, k, v), offsets, longest, softmax_scale, window, softcap)


def naive(
    inputs: tuple[Tensor, Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float | None,
    window: Window,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of each sequence by itself, masks aligned to its last query and its last key."""
    require_launchable(inputs, offsets, longest, window)
    query, key, value = (tensor.float() for tensor in inputs)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    spans = zip(*(pairwise(each.tolist()) for each in offsets), strict=True)
    parts = []
    for (first, last), (start, stop) in spans:
        scores = torch.einsum("qhd,khd->hqk", query[first:last], key[start:stop])
        scores = scores * (query.shape[2] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen(last - first, stop - start, window), -torch.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:stop]))
    return torch.cat(parts).to(inputs[0].dtype)


def seen(queries: int, keys: int, window: Window) -> Tensor:
    at = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)[None]
    left, right = window
    return ((key <= at + right) | (right < 0)) & ((key >= at - left) | (left < 0))


def require_launchable(
    inputs: tuple[Tensor, Tensor, Tensor],
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: Window,
) -> None:
    query, key, value = inputs
    assert query.dtype in (torch.float16, torch.bfloat16), "only half precision"
    assert key.dtype == value.dtype == query.dtype
    assert key.shape == value.shape
    assert key.shape[2] == query.shape[2] <= 256
    assert query.shape[2] % 8 == 0
    assert query.shape[1] % key.shape[1] == 0
    assert all(tensor.dim() == 3 and tensor.stride(-1) == 1 for tensor in inputs)
    for tensor, offset, most in zip((query, key), offsets, longest, strict=True):
        assert offset.dtype == torch.int32
        assert offset.is_contiguous()
        assert offset.shape == offsets[0].shape
        assert offset.device == tensor.device
        assert type(most) is int
        lengths = offset.diff().tolist()
        assert min(lengths) > 0, "a query without keys is NaN, and so is its gradient"
        assert max(lengths) == most
        assert offset[0] == 0
        assert offset[-1] == len(tensor), "rows beyond the last sequence have gradients of NaN"
    assert type(window) is tuple, "a list is not (-1, 0), by which torch knows causal attention"


TORCHS = {"2.11": Kernels(varlen_2_11, None), "2.13": Kernels(varlen_2_13, None)}
FLASH_ATTN = Kernels(lambda *_, **__: pytest.fail("torch's caps no scores"), flash_attn_varlen)


def segments_of(completions: int) -> tuple[Segment, ...]:
    groups = random_groups(4, longest=90, completions=completions)
    found = pack(groups, layout="packed").segments
    assert found is not None
    return found


def heads(length: int, dtype: torch.dtype, kv_heads: int) -> list[Tensor]:
    """Numbers that half precision holds exactly, as models hand them in: by row, then head."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, 8, 16), (length, kv_heads, 16), (length, kv_heads, 16)]
    drawn = [torch.randn(shape, generator=generator).to(dtype).transpose(0, 1) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


def with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


def by_kernel(
    kernels: Kernels, segments: tuple[Segment, ...], inputs: list[Tensor], rule: ScoreRule
) -> list[Tensor]:
    index = _variable_length(segments, CPU)
    return with_gradients(variable_length_attention(*inputs, index, rule, kernels), inputs)


def by_blocks(plan: AttentionPlan, inputs: list[Tensor], rule: ScoreRule) -> list[Tensor]:
    wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
    return with_gradients(block_attention(*wide, plan, rule), wide)


def distance(ours: list[Tensor], exact: list[Tensor]) -> float:
    """The largest, of the output and each gradient, as a share of its norm."""
    pairs = list(zip(ours, exact, strict=True))
    assert all(left.isfinite().all() for left, _ in pairs)
    return max(((left.float() - right).norm() / right.norm()).item() for left, right in pairs)


def assert_equals_blocks(kernels: Kernels, rule: ScoreRule, dtype: torch.dtype, kv_heads: int) -> None:
    segments = segments_of(completions=3)
    inputs = heads(segments[-1].stop, dtype, kv_heads)
    ours = by_kernel(kernels, segments, inputs, rule)
    plan = plan_attention(segments, CPU)
    assert [each.dtype for each in ours] == [dtype] * 4
    assert distance(ours, by_blocks(plan, inputs, rule)) < ROUNDING[dtype]
    other = ScoreRule(SCALE, Visibility(3), rule.softcap)
    assert distance(ours, by_blocks(plan, inputs, other)) > 0.1


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("window", [None, 2, 20, 500])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("torch_release", TORCHS)
def test_torchs_kernel_equals_blocks(
    torch_release: str, kv_heads: int, window: int | None, dtype: torch.dtype
) -> None:
    assert_equals_blocks(TORCHS[torch_release], ScoreRule(SCALE, Visibility(window)), dtype, kv_heads)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attn_caps_scores_as_blocks_do(kv_heads: int, window: int | None) -> None:
    rule = ScoreRule(SCALE, Visibility(window), softcap=0.8)
    assert_equals_blocks(FLASH_ATTN, rule, torch.float16, kv_heads)


def test_queries_and_keys_that_autocast_left_in_float32_follow_the_values() -> None:
    segments, rule = segments_of(completions=2), ScoreRule(SCALE, Visibility())
    half = heads(segments[-1].stop, torch.bfloat16, 2)
    mixed = [half[0].detach().float().requires_grad_(), half[1].detach().float().requires_grad_(), half[2]]
    expected = by_kernel(TORCHS["2.13"], segments, half, rule)
    ours = by_kernel(TORCHS["2.13"], segments, mixed, rule)
    assert [each.dtype for each in ours] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    assert distance(ours, [each.float() for each in expected]) == 0


def test_a_batch_without_groups_is_one_token_that_sees_itself() -> None:
    segments = pack([], layout="packed").segments
    assert segments is not None
    inputs = heads(1, torch.bfloat16, 2)
    ours = by_kernel(TORCHS["2.13"], segments, inputs, ScoreRule(SCALE, Visibility()))
    assert torch.equal(ours[0][0], inputs[2][:, 0].repeat_interleave(4, 0))
    assert not any(gradient.any() for gradient in ours[1:3])


def test_a_kernel_that_aligns_to_the_first_key_would_be_seen() -> None:
    def top_left(*arguments: Any, **options: Any) -> Tensor:
        query, key, value, cu_seq_q, cu_seq_k, *_ = arguments
        lengths = [stop - start for start, stop in pairwise(cu_seq_q.tolist())]
        rows = [
            torch.arange(start, start + length)
            for (start, _), length in zip(pairwise(cu_seq_k.tolist()), lengths, strict=True)
        ]
        first = torch.cat(rows)
        return varlen_2_13(
            query, key[first], value[first], cu_seq_q, cu_seq_q, max(lengths), max(lengths), **options
        )

    with pytest.raises(AssertionError):
        assert_equals_blocks(Kernels(top_left, None), ScoreRule(SCALE, Visibility()), torch.bfloat16, 8)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, cq, ck, mq, mk: (q.float(), k, v, cq, ck, mq, mk),
        lambda q, k, v, cq, ck, mq, mk: (q, k, v, cq.long(), ck, mq, mk),
        lambda q, k, v, cq, ck, mq, mk: (q, k, v, cq, ck, torch.tensor(mq), mk),
        lambda q, k, v, cq, ck, mq, mk: (q, k[:-1], v[:-1], cq, ck, mq, mk),
        lambda q, k, v, cq, ck, mq, mk: (
            q.transpose(1, 2).contiguous().transpose(1, 2),
            k,
            v,
            cq,
            ck,
            mq,
            mk,
        ),
    ],
    ids=["precision", "offsets", "longest", "rows", "memory"],
)
def test_the_naive_kernel_is_strict(change: Callable[..., tuple[Any, ...]]) -> None:
    def changed(*arguments: Any, enable_gqa: bool = False, **options: Any) -> Tensor:
        return varlen_2_13(*change(*arguments), enable_gqa=enable_gqa, **options)

    segments = segments_of(completions=2)
    inputs = heads(segments[-1].stop, torch.bfloat16, 2)
    with pytest.raises(AssertionError):
        by_kernel(Kernels(changed, None), segments, inputs, ScoreRule(SCALE, Visibility()))


def test_no_kernel_runs_on_a_cpu() -> None:
    query, _, value = heads(3, torch.bfloat16, 2)
    assert not can_run(query, value, ScoreRule(SCALE, Visibility()), None)


@pytest.mark.parametrize(
    ("capability", "width", "runs"),
    [
        ((7, 5), 64, False),  # T4: float16 alone, and no flash attention
        ((8, 0), 208, True),
        ((8, 9), 208, False),
        ((8, 9), 256, True),
        ((9, 0), 208, True),
        ((12, 0), 224, False),
    ],
)
def test_a_gpu_without_such_a_kernel_computes_by_blocks(
    capability: tuple[int, int], width: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has_kernel.cache_clear()
    with FakeTensorMode():
        heads = torch.empty(2, 3, width, dtype=torch.float16, device="cuda:0")
        assert can_run(heads, heads, ScoreRule(SCALE, Visibility()), None) is runs
    has_kernel.cache_clear()
