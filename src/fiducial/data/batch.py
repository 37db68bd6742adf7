"""Groups laid out for one forward pass.

Two layouts hold the same scored tokens in the same order. `packed`: all groups in one row, each prompt once,
followed by its completions, whose position ids restart at the prompt's length:

                prompt  chosen  rejected
     prompt       ◣
     chosen       ■       ◣
     rejected     ■       ·        ◣

`padded`: one row a completion, prompt repeated, right-padded; for models that mix tokens outside attention.

Scored positions are explicit. The last prompt token predicts the first token of *every* completion: there is
no shift by one and no label of -100 anywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Completions
from fiducial.sending import sent

Layout = Literal["packed", "padded"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries `start:stop` attend to all keys `prefix_start:prefix_stop`, and to themselves causally."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """What one forward pass needs, and which of its positions are scored.

    Legend: `rows` 1 when packed; `length` tokens a row; `scored` scored tokens. Sequences are numbered group
    by group.
    """

    input_ids: Int[Tensor, "rows length"]
    position_ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"] | None
    """1 where a token is real; None when packed, where `segments` says who sees whom."""
    segments: tuple[Segment, ...] | None
    source: Int[Tensor, " scored"]
    """Flat position (row · length + column) whose hidden state predicts the token."""
    target: Int[Tensor, " scored"]
    """The token id it must predict."""
    sequence: Int[Tensor, " scored"]
    """The completion it belongs to."""
    groups: tuple[TokenizedGroup, ...]

    @property
    def num_sequences(self) -> int:
        """Completions in the batch."""
        return sum(len(group.completions) for group in self.groups)

    @property
    def keys(self) -> tuple[str, ...]:
        """Content key of each completion, in sequence order."""
        return tuple(key for group in self.groups for key in group.keys)

    @property
    def completions(self) -> Completions:
        """What the data says of each completion, on the batch's device."""
        group = [number for number, group in enumerate(self.groups) for _ in group.completions]
        score = [
            value for group in self.groups for value in group.scores or [math.nan] * len(group.completions)
        ]
        device = self.target.device
        return Completions(
            sent(torch.tensor(group, dtype=torch.long), device),
            sent(torch.tensor(score, dtype=torch.float32), device),
            tuple(len(group.completions) for group in self.groups),
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The batch with its tensors on `device`."""
        tensors: dict[str, Any] = {
            field.name: sent(value, device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)


def pack(groups: Sequence[TokenizedGroup], *, layout: Layout, pad_token_id: int = 0) -> PackedBatch:
    """Lay `groups` out for one forward pass. Without groups the batch is one unscored token (weight 0)."""
    if layout == "padded":
        return _pad(groups, pad_token_id)
    return _pack(groups, pad_token_id)


def _pack(groups: Sequence[TokenizedGroup], pad_token_id: int) -> PackedBatch:
    ids: list[object] = []
    positions: list[object] = []
    source: list[object] = []
    target: list[object] = []
    sequence: list[object] = []
    segments: list[Segment] = []
    row, number = 0, 0
    for group in groups:
        prompt_start, prompt_len = row, len(group.prompt)
        ids.append(group.prompt)
        positions.append(np.arange(prompt_len))
        row += prompt_len
        for index, completion in enumerate(group.completions):
            start, stop = row, row + len(completion)
            ids.append(completion)
            positions.append(np.arange(prompt_len, prompt_len + len(completion)))
            source += [[prompt_start + prompt_len - 1], np.arange(start, stop - 1)]
            target.append(completion)
            sequence.append(np.full(len(completion), number))
            if index == 0:  # the first completion simply continues the prompt
                segments.append(Segment(prompt_start, stop, prompt_start, prompt_start))
            else:
                segments.append(Segment(start, stop, prompt_start, prompt_start + prompt_len))
            row, number = stop, number + 1
    if not groups:
        ids, positions, segments = [[pad_token_id]], [[0]], [Segment(0, 1, 0, 0)]
    return PackedBatch(
        input_ids=_long(ids)[None],
        position_ids=_long(positions)[None],
        attention_mask=None,
        segments=tuple(segments),
        source=_long(source),
        target=_long(target),
        sequence=_long(sequence),
        groups=tuple(groups),
    )


def _pad(groups: Sequence[TokenizedGroup], pad_token_id: int) -> PackedBatch:
    sequences = [(group.prompt, completion) for group in groups for completion in group.completions]
    length = max((len(prompt) + len(completion) for prompt, completion in sequences), default=1)
    rows = max(len(sequences), 1)
    ids = np.full((rows, length), pad_token_id, dtype=np.int64)
    mask = np.zeros((rows, length), dtype=np.int64)
    mask[:, 0] = 1
    source, target, sequence = [], [], []
    for row, (prompt, completion) in enumerate(sequences):
        stop = len(prompt) + len(completion)
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : stop] = completion
        mask[row, :stop] = 1
        source.append(np.arange(len(prompt) - 1, stop - 1) + row * length)
        target.append(completion)
        sequence.append(np.full(len(completion), row))
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.arange(length).expand(rows, length).contiguous(),
        attention_mask=torch.from_numpy(mask),
        segments=None,
        source=_long(source),
        target=_long(target),
        sequence=_long(sequence),
        groups=tuple(groups),
    )


def _long(parts: Sequence[object]) -> Int[Tensor, " n"]:
    if not parts:
        return torch.zeros(0, dtype=torch.long)
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]))
