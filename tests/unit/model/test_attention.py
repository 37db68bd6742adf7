"""Packed attention against the naive twin, kernel by kernel; whole models are in test_scoring.py."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import oracles
from fiducial.data.batch import Segment, pack
from fiducial.errors import ModelError
from fiducial.model import attention_plan
from fiducial.model.attention import SegmentsMissingError, carrier, packed_attention
from fiducial.model.attention_blocks import ScoreRule, block_attention
from fiducial.model.attention_plan import (
    MaskNote,
    Visibility,
    _variable_length,
    plan_attention,
)
from tiny import random_groups

CPU = torch.device("cpu")


def _segments(*, longest: int = 24, completions: int = 3) -> tuple[Segment, ...]:
    segments = pack(
        random_groups(3, seed=3, longest=longest, completions=completions), layout="packed"
    ).segments
    assert segments is not None
    return segments


def _seen(segments: tuple[Segment, ...], window: int | None = None) -> Tensor:
    """Who sees whom in the whole row, by definition."""
    length = segments[-1].stop
    seen = torch.zeros(length, length, dtype=torch.bool)
    for segment in segments:
        prefix = range(segment.prefix_start, segment.prefix_stop)
        for query in range(segment.start, segment.stop):
            visible = [*prefix, *range(segment.start, query + 1)]
            seen[query, visible[-window:] if window else visible] = True
    return seen


def _heads(length: int, *, heads: int = 4, kv_heads: int = 2, value_dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, length, 8), (kv_heads, length, 8), (kv_heads, length, value_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


def _close(ours: list[Tensor], naive: list[Tensor], tolerance: float = 1e-12) -> bool:
    return all((a - b).abs().max() <= tolerance for a, b in zip(ours, naive, strict=True))


@pytest.mark.parametrize("block_rows", [192, 5], ids=["one block", "many blocks"])
@pytest.mark.parametrize("window", [None, 7, 10_000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 4, "value_dim": 4}], ids=["grouped", "value size"])
def test_equals_masked_attention(
    block_rows: int,
    window: int | None,
    softcap: float | None,
    shape: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_plan, "MAX_BLOCK_ROWS", block_rows)
    segments = _segments()
    assert (block_rows < 24) == (len(plan_attention(segments, CPU).blocks) > len(segments))
    inputs = _heads(segments[-1].stop, **shape)
    rule = ScoreRule(0.3, Visibility(window), softcap)
    ours = block_attention(*inputs, plan_attention(segments, CPU), rule).transpose(0, 1)
    naive = oracles.attention(*inputs, _seen(segments, window), scaling=0.3, softcap=softcap)
    assert _close(_gradients(ours, inputs), _gradients(naive, inputs))


def test_a_rejected_branch_that_sees_the_chosen_one_is_not_equal() -> None:
    segments = _segments(completions=2)
    inputs = _heads(segments[-1].stop)
    leaking = tuple(
        Segment(s.start, s.stop, s.prefix_start, s.start) if s.prefix_stop > s.prefix_start else s
        for s in segments
    )
    rule = ScoreRule(0.3, Visibility())
    ours = block_attention(*inputs, plan_attention(leaking, CPU), rule).transpose(0, 1)
    naive = oracles.attention(*inputs, _seen(segments), scaling=0.3)
    assert (ours - naive).abs().max() > 0.1


def test_sinks_take_part_in_the_softmax_and_learn() -> None:
    segments = _segments()
    query, key, value = inputs = _heads(segments[-1].stop, kv_heads=4)
    sinks = torch.randn(4, dtype=torch.float64).requires_grad_()
    ours = block_attention(*inputs, plan_attention(segments, CPU), ScoreRule(0.3, Visibility()), sinks)
    scores = (query @ key.transpose(1, 2) * 0.3).masked_fill(~_seen(segments), -torch.inf)
    column = sinks[:, None, None].expand(4, len(scores[0]), 1)
    naive = torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value
    both = [*inputs, sinks]
    assert _close(_gradients(ours.transpose(0, 1), both), _gradients(naive, both))


def test_bfloat16_errs_by_rounding_only() -> None:
    segments = _segments(longest=100)
    exact = _heads(segments[-1].stop)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    rounded = [tensor.detach().double().requires_grad_() for tensor in half]
    plan, rule = plan_attention(segments, CPU), ScoreRule(0.3, Visibility())
    truth = _gradients(block_attention(*rounded, plan, rule), rounded)
    ours = _gradients(block_attention(*half, plan, rule), half)
    for approximate, right in zip(ours, truth, strict=True):
        assert (approximate - right).norm() / right.norm() < 6e-3


def test_on_a_cpu_bfloat16_rounds_only_what_goes_in_and_comes_out() -> None:
    segments = _segments(longest=100)
    half = [tensor.detach().bfloat16() for tensor in _heads(segments[-1].stop)]
    plan, rule = plan_attention(segments, CPU), ScoreRule(0.3, Visibility())
    wide = block_attention(*(tensor.float() for tensor in half), plan, rule)
    assert torch.equal(block_attention(*half, plan, rule), wide.bfloat16())


def test_autocast_does_not_reach_into_the_kernel() -> None:
    segments = _segments()
    inputs = [tensor.detach().float().requires_grad_() for tensor in _heads(segments[-1].stop)]
    plan, rule = plan_attention(segments, CPU), ScoreRule(0.3, Visibility())
    outside = _gradients(block_attention(*inputs, plan, rule), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = _gradients(block_attention(*inputs, plan, rule), inputs)
    assert _close(inside, outside, 0.0)


def test_known_mask_functions_are_recognised() -> None:
    def read(function: Any, local_size: int | None = None, longest: int = 50) -> Visibility:
        return MaskNote(function, local_size).visibility(longest, CPU)

    assert read(causal_mask_function) == Visibility()
    assert read(None) == Visibility()
    assert read(sliding_window_causal_mask_function(8), 8) == Visibility(window=8)
    assert read(sliding_window_causal_mask_function(50), 50) == Visibility()  # no sequence is longer
    assert read(sliding_window_causal_mask_function(8), 9).function is not None
    assert read(lambda b, h, q, k: (k <= q) & (q // 8 == k // 8), 8).function is not None


def test_an_unknown_mask_function_is_evaluated_on_positions() -> None:
    segments = _segments()
    inputs = _heads(segments[-1].stop)

    def odd(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key <= query) & ((key % 3 == 0) | (key == query))

    rule = ScoreRule(0.3, MaskNote(odd, None).visibility(99, CPU))
    ours = block_attention(*inputs, plan_attention(segments, CPU), rule).transpose(0, 1)
    seen = torch.zeros_like(_seen(segments))
    for s in segments:
        rows = [*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)]
        positions = torch.arange(len(rows))
        allowed = odd(0, 0, positions[:, None], positions[None])
        for query in range(s.start, s.stop):
            seen[query, rows] = allowed[rows.index(query)]
    naive = oracles.attention(*inputs, seen, scaling=0.3)
    assert _close(_gradients(ours, inputs), _gradients(naive, inputs))


def test_variable_length_index_gathers_prompt_and_completion() -> None:
    segments = _segments()
    index = _variable_length(segments, CPU)
    queries, keys = index.query_offsets.tolist(), index.key_offsets.tolist()
    seen = _seen(segments)
    for segment, (first, last), (start, stop) in zip(
        segments, pairwise(queries), pairwise(keys), strict=True
    ):
        assert (first, last) == (segment.start, segment.stop)
        assert index.keys[start:stop].tolist() == seen[segment.stop - 1].nonzero()[:, 0].tolist()
    assert index.longest_key == max(stop - start for start, stop in pairwise(keys))


def _call(**kwargs: Any) -> Tensor:
    query, key, value = (tensor[None].float() for tensor in _heads(9, kv_heads=4))
    mask = kwargs.pop("mask", None)
    return packed_attention(nn.Identity(), query, key, value, mask, **kwargs)[0]


def test_the_plan_arrives_by_keyword_or_on_the_mask() -> None:
    plan = plan_attention([Segment(0, 9, 0, 0)], CPU)
    assert torch.equal(_call(segments=plan), _call(mask=carrier(plan, CPU)))
    with pytest.raises(SegmentsMissingError, match="Identity was asked for packed attention"):
        _call()


def test_what_is_not_computed_is_refused() -> None:
    plan = plan_attention([Segment(0, 9, 0, 0)], CPU)
    _call(segments=plan, is_causal=True, position_ids=torch.arange(9), position_bias=None)
    with pytest.raises(ModelError, match=r"position_bias.*Remove the setting"):
        _call(segments=plan, position_bias=torch.zeros(1))
    with pytest.raises(ModelError, match="is_causal"):
        _call(segments=plan, is_causal=False)
    with pytest.raises(ModelError, match=r"dropout 0\.1"):
        _call(segments=plan, dropout=0.1)
