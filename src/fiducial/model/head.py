"""Log-probs of chosen tokens straight from hidden states, never holding [tokens, vocabulary].

The vocabulary is walked in chunks with all scored tokens at once: a chunk's logits stay in cache and each row
of the head's gradient is written once. Backward needs the logits again. They are recomputed, but for the
first chunks, which are kept from the forward pass as far as `KEPT_BYTES` reaches: up to a quarter of the
head's products saved, and every second reading of those logits. A frozen head needs no second look at the
vocabulary: the gradient with respect to the hidden states, target row minus expected row, is gathered while
the forward pass streams by.

Products run in the inputs' precision (autocast's, inside autocast), on a GPU without rounding the logits to
it; sums, exponentials and logarithms in at least float32. 504 tokens of width 512 against 32 000 rows in
float32, forward and backward on one core: 0.88 of the time of logits and log-softmax in one piece.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fiducial.model.logit_rule import PLAIN, LogitRule
from fiducial.model.products import add_product, unrounded_product, write_product
from fiducial.model.statistics import Gathering

KEPT_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Logits held from forward to backward, rather than multiplied again: on a GPU those of 4,000 scored tokens
with a vocabulary of 128,000, beside activations of ten times the size unless those are recomputed."""
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Logits at a time: what a CPU's cache holds; on a GPU enough work for each kernel."""
_SMALLEST_CHUNK = 512
_MAX_TOKENS = 2**14
"""More scored tokens than this are scored piece by piece."""


def token_logps(
    hidden: Float[Tensor, "scored width"],
    head_weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " scored"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    rule: LogitRule = PLAIN,
    chunk: int | None = None,
    gathering: Gathering | None = None,
) -> Float[Tensor, " scored"]:
    """Logarithm of softmax(rule(hidden · head_weightᵀ + bias))[targets], float32 or wider.

    Equal to the three obvious lines, in value and in the gradients of `hidden`, `head_weight` and `bias`.
    `chunk` is how many vocabulary rows are looked at together; None chooses. `gathering` is shown every
    chunk of the forward pass.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    pieces = list(zip(torch.split(hidden, _MAX_TOKENS), torch.split(targets, _MAX_TOKENS), strict=True))
    kept = _of_device(KEPT_BYTES, hidden) // len(pieces)
    logps = [
        _piece(_Head(h, head_weight, bias, t, rule, chunk or chunk_rows(h)), kept, gathering)
        for h, t in pieces
    ]
    return logps[0] if len(logps) == 1 else torch.cat(logps)


def _piece(head: "_Head", kept_bytes: int, gathering: Gathering | None) -> Float[Tensor, " scored"]:
    head.gathering = gathering
    if torch.is_grad_enabled():
        logps: Tensor = _TokenLogps.apply(head.hidden, head.weight, head.bias, head, kept_bytes)  # type: ignore[no-untyped-call]  # torch types no Function.apply
        return logps
    with torch.autocast(head.hidden.device.type, enabled=False):
        return head.stream(kept_bytes=0)[0].logps


def chunk_rows(hidden: Tensor) -> int:
    """How many rows of the vocabulary are looked at together."""
    rows = _of_device(_CHUNK_ELEMENTS, hidden) // max(len(hidden), 1)
    return max(_SMALLEST_CHUNK, rows // 512 * 512)


def _of_device(table: dict[str, int], hidden: Tensor) -> int:
    return table.get(hidden.device.type, table["cuda"])


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: "_Head", kept_bytes: int
    ) -> Tensor:
        needs_hidden, *needs_head = ctx.needs_input_grad[:3]
        ctx.rule, ctx.chunk, ctx.dtype = head.rule, head.chunk, hidden.dtype
        ctx.streams = needs_hidden and not any(needs_head)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.streams:
                totals, gradient = head.stream_with_gradient()
                ctx.save_for_backward(gradient)
            else:
                totals, kept = head.stream(kept_bytes if any(needs_head) else 0)
                both = (totals.target, totals.log_total)
                ctx.save_for_backward(hidden, weight, bias, head.targets, *both, *kept)
        return totals.logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.streams:
            (gradient,) = ctx.saved_tensors
            return (grads[0].unsqueeze(1) * gradient).to(ctx.dtype), None, None, None, None
        hidden, weight, bias, targets, target, log_total, *kept = ctx.saved_tensors
        with torch.autocast(hidden.device.type, enabled=False):
            head = _Head(hidden, weight, bias, targets, ctx.rule, ctx.chunk)
            gradients = head.gradients(grads[0], _Totals(target, log_total), kept, ctx.needs_input_grad[:3])
        return *gradients, None, None


@dataclass(frozen=True, slots=True)
class _Totals:
    """What is known of each token once the whole vocabulary has been seen."""

    target: Float[Tensor, " scored"]
    """Its target's logit."""
    log_total: Float[Tensor, " scored"]
    """Logarithm of the sum of all exponentials."""

    @property
    def logps(self) -> Float[Tensor, " scored"]:
        """Log-prob of the targets."""
        return self.target - self.log_total

    def missing(self, rule: LogitRule) -> Float[Tensor, " scored"]:
        """(1 - probability of the target), times the rule's slope there."""
        return -torch.expm1(self.logps) * rule.slope(self.target)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of the vocabulary, its softmax taken by itself."""

    log_total: Float[Tensor, " scored"]
    target: Float[Tensor, " scored"]
    """The target's logit where the target is in this chunk."""
    shares: Float[Tensor, "scored chunk"] | None
    """Softmax within the chunk, times the rule's slope; 0 at the target, whose part is added exactly."""


class _Head:
    """One pass over the vocabulary, chunk by chunk."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: LogitRule,
        chunk: int,
    ) -> None:
        self.hidden, self.weight, self.bias, self.targets = hidden, weight, bias, targets
        self.rule, self.chunk = rule, chunk
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.gathering: Gathering | None = None

    def stream(self, kept_bytes: int) -> tuple[_Totals, list[Tensor]]:
        """Totals of all tokens; and shares and log-total of the first chunks, in turn, to be kept."""
        totals, kept = self._nothing_seen(), list[Tensor]()
        for start, rows in self._chunks():
            kept_bytes -= len(self.hidden) * len(rows) * rows.element_size()
            chunk = self._look(start, rows, shares=kept_bytes >= 0)
            if chunk.shares is not None:
                kept += [chunk.shares, chunk.log_total]
            totals = self._add(totals, chunk, start, len(rows))
        self._seen(totals)
        return totals, kept

    def stream_with_gradient(self) -> tuple[_Totals, Float[Tensor, "scored width"]]:
        """Totals of all tokens, and the gradient of their log-probs with respect to the hidden states."""
        totals = self._nothing_seen()
        others = torch.zeros_like(self.hidden, dtype=self.wide)
        for start, rows in self._chunks():
            chunk = self._look(start, rows, shares=True)
            assert chunk.shares is not None
            before, totals = totals, self._add(totals, chunk, start, len(rows))
            others *= (before.log_total - totals.log_total).exp()[:, None]
            part = (chunk.log_total - totals.log_total).exp()[:, None]
            add_product(others, chunk.shares * part.to(rows.dtype), rows)
        self._seen(totals)
        chosen = self.weight[self.targets].to(self.wide)
        return totals, chosen * totals.missing(self.rule)[:, None] - others

    def gradients(
        self, grad: Tensor, totals: _Totals, kept: Sequence[Tensor], needed: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of hidden states, weight and bias."""
        of_hidden = torch.zeros_like(self.hidden, dtype=self.wide) if needed[0] else None
        of_weight = torch.empty_like(self.weight) if needed[1] else None
        of_bias = torch.empty_like(self.bias) if needed[2] and self.bias is not None else None
        at_target = grad * totals.missing(self.rule)
        known = dict(enumerate(zip(kept[0::2], kept[1::2], strict=True)))
        for number, (start, rows) in enumerate(self._chunks()):
            shares, log_total = known.get(number) or self._shares(start, rows)
            part = -grad * (log_total - totals.log_total).exp()
            change = shares * part[:, None].to(rows.dtype)
            index, inside = self._targets_in(start, len(rows))
            change.scatter_add_(1, index, (at_target * inside)[:, None].to(rows.dtype))
            stop = start + len(rows)
            if of_bias is not None:
                of_bias[start:stop] = change.sum(0, dtype=self.wide)
            if of_hidden is not None:
                add_product(of_hidden, change, rows)
            if of_weight is not None:
                write_product(of_weight[start:stop], change.T, self.hidden)
        return None if of_hidden is None else of_hidden.to(self.hidden.dtype), of_weight, of_bias

    def _seen(self, totals: _Totals) -> None:
        if self.gathering is not None:
            self.gathering.end(totals.logps, totals.log_total)

    def _nothing_seen(self) -> _Totals:
        log_total = self.hidden.new_full((len(self.hidden),), -torch.inf, dtype=self.wide)
        return _Totals(torch.zeros_like(log_total), log_total)

    def _add(self, totals: _Totals, chunk: _Chunk, start: int, length: int) -> _Totals:
        _, inside = self._targets_in(start, length)
        target = torch.where(inside, chunk.target, totals.target)
        return _Totals(target, torch.logaddexp(totals.log_total, chunk.log_total))

    def _look(self, start: int, rows: Tensor, *, shares: bool) -> _Chunk:
        logits = self._logits(start, rows)
        index, inside = self._targets_in(start, len(rows))
        target = logits.gather(1, index)[:, 0].to(self.wide)
        softmax = torch.softmax(logits, 1, dtype=self.wide)
        log_total = logits.amax(1).to(self.wide) - softmax.amax(1).log()
        if self.gathering is not None:
            self.gathering.add(logits.to(self.wide), softmax, log_total)
        if not shares:
            return _Chunk(log_total, target, None)
        softmax.scatter_(1, index, torch.where(inside[:, None], 0, softmax.gather(1, index)))
        if self.rule != PLAIN:
            softmax *= self.rule.slope(logits)
        return _Chunk(log_total, target, softmax.to(rows.dtype))

    def _logits(self, start: int, rows: Tensor) -> Tensor:
        products = unrounded_product(self.hidden, rows.T)
        if self.bias is None and self.rule == PLAIN:
            return products
        products = products.to(self.wide)
        if self.bias is not None:
            products = products + self.bias[start : start + len(rows)].to(self.wide)
        return self.rule(products)

    def _shares(self, start: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        chunk = self._look(start, rows, shares=True)
        assert chunk.shares is not None
        return chunk.shares, chunk.log_total

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self.weight), self.chunk):
            yield start, self.weight[start : start + self.chunk].to(self.hidden.dtype)

    def _targets_in(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Column of each token's target in this chunk, and whether it is in it at all."""
        local = self.targets - start
        return local.clamp(0, length - 1)[:, None], (local >= 0) & (local < length)
