"""Who attends to whom in a packed row: laid out once per batch, read by every layer.

A segment's queries see the segment's prompt and the segment itself. With positions counted from the prompt's
start this is the attention of one ordinary sequence, `prompt + completion`, of which only the last queries
are asked for: the model's own mask function, which knows positions and nothing of packing, stays right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from fiducial.data.batch import Segment
from fiducial.sending import sent

MAX_BLOCK_ROWS = 192
"""Queries computed together: long enough for fast matrix products, short enough to skip most masked keys."""

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""transformers' index function: (batch, head, query position, key position) -> may it be seen."""

Rows = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Block:
    """Up to `MAX_BLOCK_ROWS` consecutive queries of one segment."""

    start: int
    stop: int
    position: int
    """Position of the first query: how many keys stand before it."""
    prefix_start: int
    segment_start: int
    prefix_length: int

    @property
    def rows(self) -> int:
        """How many queries."""
        return self.stop - self.start

    def key_rows(self, first: int = 0) -> list[Rows]:
        """Where in the row the keys at positions `first` up to the last query's stand, in order."""
        prefix = (self.prefix_start + first, self.prefix_start + self.prefix_length)
        own = (self.segment_start + max(first - self.prefix_length, 0), self.stop)
        return [prefix, own] if first < self.prefix_length else [own]


@dataclass(frozen=True, slots=True)
class VariableLengthIndex:
    """What variable-length kernels read: queries stay in row order, keys are gathered by `keys`."""

    keys: Int[Tensor, " gathered"]
    query_offsets: Int[Tensor, " segments_plus_one"]
    key_offsets: Int[Tensor, " segments_plus_one"]
    longest_query: int
    longest_key: int


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The segments of one packed row, prepared for the attention kernels."""

    segments: tuple[Segment, ...]
    blocks: tuple[Block, ...]
    longest: int
    """Tokens of the longest prompt + completion."""
    variable_length: VariableLengthIndex | None
    """Only on devices that have such kernels."""


def plan_attention(segments: Sequence[Segment], device: torch.device) -> AttentionPlan:
    """Prepare `segments`, which must cover the row in order, for kernels on `device`."""
    assert all(a.stop == b.start for a, b in pairwise(segments)), "a hole in the row"
    blocks = tuple(block for segment in segments for block in _blocks(segment))
    longest = max(_visible(segment) for segment in segments)
    index = _variable_length(segments, device) if device.type == "cuda" else None
    return AttentionPlan(tuple(segments), blocks, longest, index)


def _visible(segment: Segment) -> int:
    return segment.prefix_stop - segment.prefix_start + segment.stop - segment.start


def _blocks(segment: Segment) -> list[Block]:
    length = segment.stop - segment.start
    prefix_length = segment.prefix_stop - segment.prefix_start
    count = -(-length // MAX_BLOCK_ROWS)
    edges = [length * index // count for index in range(count + 1)]
    return [
        Block(
            start=segment.start + first,
            stop=segment.start + last,
            position=prefix_length + first,
            prefix_start=segment.prefix_start,
            segment_start=segment.start,
            prefix_length=prefix_length,
        )
        for first, last in pairwise(edges)
    ]


def _variable_length(segments: Sequence[Segment], device: torch.device) -> VariableLengthIndex:
    rows = [
        torch.cat([torch.arange(s.prefix_start, s.prefix_stop), torch.arange(s.start, s.stop)])
        for s in segments
    ]
    queries = [segment.stop - segment.start for segment in segments]
    keys = [len(row) for row in rows]
    return VariableLengthIndex(
        keys=sent(torch.cat(rows), device),
        query_offsets=_offsets(queries, device),
        key_offsets=_offsets(keys, device),
        longest_query=max(queries),
        longest_key=max(keys),
    )


def _offsets(lengths: Sequence[int], device: torch.device) -> Int[Tensor, " segments_plus_one"]:
    return sent(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), device)


@dataclass(frozen=True, slots=True)
class Visibility:
    """What a layer lets a query see of its sequence so far: all, the last `window` tokens, or `function`."""

    window: int | None = None
    """The query's own token counts."""
    function: MaskFunction | None = None
    _masks: dict[tuple[int, int, int], Bool[Tensor, "rows keys"]] = field(default_factory=dict)
    """Hidden keys by (query position, rows, first key position); blocks of equal place share one."""

    def first_key(self, block: Block) -> int:
        """Position of the first key that any query of `block` sees; the model's function may see any."""
        return 0 if self.window is None else max(0, block.position - self.window + 1)

    def is_causal(self, block: Block) -> bool:
        """Whether `block` sees every key before it."""
        short = self.window is None or block.position + block.rows <= self.window
        return self.function is None and short

    def hidden(self, block: Block, device: torch.device) -> Bool[Tensor, "rows keys"]:
        """True where a key is not seen, from `first_key` on."""
        key = (block.position, block.rows, self.first_key(block))
        if key not in self._masks:
            stop = block.position + block.rows
            query = torch.arange(block.position, stop, device=device)[:, None]
            keys = torch.arange(key[2], stop, device=device)[None]
            self._masks[key] = ~_evaluate(self.function or _windowed(self.window), query, keys)
        return self._masks[key]


class MaskNote:
    """What our mask builder hands to a layer instead of a mask: the model's own mask function.

    Lives for one forward pass, recomputation included, so what is derived from it is derived once a pass.
    """

    def __init__(self, function: MaskFunction | None, local_size: int | None) -> None:
        self.function = function
        self.local_size = local_size
        self._visibility: Visibility | None = None

    def __getitem__(self, kept: tuple[slice, ...]) -> "MaskNote":
        """The note for some of a mask's queries: for all of them, the only ones that are ever asked for.

        Gemma 4 cuts its masks to the queries whose logits are kept before layers that share keys.
        """
        assert all(part in (slice(None), slice(0, None)) for part in kept), "queries are left out"
        return self

    def visibility(self, longest: int, device: torch.device) -> Visibility:
        """The function's meaning for sequences of up to `longest` tokens."""
        if self._visibility is None:
            self._visibility = _interpret(self.function, self.local_size, longest, device)
        return self._visibility


def _interpret(
    function: MaskFunction | None, local_size: int | None, longest: int, device: torch.device
) -> Visibility:
    """Name the function's shape if it is a known one: they are compared on rows spread over the sequence."""
    if function is None or function is causal_mask_function:
        return Visibility()
    spread = torch.linspace(0, longest - 1, min(longest, 64)).long().tolist()
    edges = [edge for edge in (local_size or 0, (local_size or 0) - 1) if 0 <= edge < longest]
    query = torch.tensor(sorted({*spread, *edges}), device=device)[:, None]
    keys = torch.arange(longest, device=device)[None]
    seen = _evaluate(function, query, keys)
    for window in (None, local_size):
        if torch.equal(seen, _evaluate(_windowed(window), query, keys)):
            return Visibility(window=window)
    return Visibility(function=function)


def _windowed(window: int | None) -> MaskFunction:
    if window is None:
        return causal_mask_function
    return lambda batch, head, query, key: (key <= query) & (key > query - window)


def _evaluate(function: MaskFunction, query: Tensor, keys: Tensor) -> Bool[Tensor, "rows keys"]:
    zero = torch.zeros((), dtype=torch.long, device=query.device)
    return torch.as_tensor(function(zero, zero, query, keys)).broadcast_to(len(query), keys.shape[1])
