"""KL of a reference's whole distribution to the policy's, token by token, never holding [tokens, vocabulary].

Both vocabularies are walked together, chunk by chunk, as in `model.head`. Only running totals are kept;
backward makes the chunks again, because keeping two models' logits would cost what the walk saves. Where a
head is no plain linear layer its logits are there in one piece, and are read as one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fiducial.errors import ModelError
from fiducial.model.head import chunk_rows
from fiducial.model.logit_rule import PLAIN, LogitRule
from fiducial.model.products import add_product, unrounded_product, write_product

Logits = Float[Tensor, "scored chunk"]
PerToken = Float[Tensor, " scored"]


@dataclass(frozen=True, slots=True)
class Distribution:
    """What one model says of the next token at each scored position.

    With a `weight`, softmax(rule(hidden · weightᵀ + bias)); without, `hidden` are the logits themselves.
    """

    hidden: Float[Tensor, "scored width"]
    weight: Float[Tensor, "vocab width"] | None
    bias: Float[Tensor, " vocab"] | None = None
    rule: LogitRule = PLAIN

    @property
    def size(self) -> int:
        """How many tokens the vocabulary has."""
        return self.hidden.shape[1] if self.weight is None else len(self.weight)

    def logits(self, start: int, stop: int) -> Logits:
        """Those of some tokens of the vocabulary, float32 or wider."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        if self.weight is None:
            return self.hidden[:, start:stop].to(wide)
        products = unrounded_product(self.hidden, self.weight[start:stop].to(self.hidden.dtype).T).to(wide)
        if self.bias is not None:
            products = products + self.bias[start:stop].to(wide)
        return self.rule(products)

    def frozen(self, *, copy: bool = False) -> "Distribution":
        """The same outside the graph; a copy of the head outlives weights that are gathered for a moment."""

        def kept(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.detach().clone() if copy else values.detach()

        return replace(self, hidden=self.hidden.detach(), weight=kept(self.weight), bias=kept(self.bias))

    def to(self, device: torch.device) -> "Distribution":
        """The same on `device`."""
        weight = None if self.weight is None else self.weight.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, hidden=self.hidden.to(device), weight=weight, bias=bias)

    def in_autocast(self) -> "Distribution":
        """The same with products in autocast's precision, where there is autocast."""
        device = self.hidden.device.type
        if self.weight is None or not torch.is_autocast_enabled(device):
            return self
        return replace(self, hidden=self.hidden.to(torch.get_autocast_dtype(device)))


def token_kl(reference: Distribution, policy: Distribution, *, chunk: int | None = None) -> PerToken:
    """Σ_v ρ(v) (log ρ(v) - log π(v)) of the reference ρ and the policy π, with gradient through π alone.

    `chunk` is how many tokens of the vocabulary are looked at together; None chooses.

    Raises:
        ModelError: The vocabularies have not equally many tokens.
    """
    if reference.size != policy.size:
        raise ModelError(
            f"the reference's head has {reference.size} outputs and the policy's {policy.size}, and the "
            "loss compares their whole distributions (dpo_loss_type: tdpo1, tdpo2). Take a reference with "
            "the policy's vocabulary, or another dpo_loss_type."
        )
    policy, reference = policy.in_autocast(), reference.frozen()
    known = _Walk(reference, policy.rule, chunk or chunk_rows(policy.hidden))
    kl: Tensor = _TokenKL.apply(policy.hidden, policy.weight, policy.bias, known)  # type: ignore[no-untyped-call]  # torch types no Function.apply
    return kl


@dataclass(frozen=True, slots=True)
class _Walk:
    """What is given beside the tensors that may have gradient."""

    reference: Distribution
    rule: LogitRule
    chunk: int

    def __call__(self, policy: Distribution) -> Iterator[tuple[slice, Logits, Logits]]:
        for start in range(0, policy.size, self.chunk):
            stop = min(start + self.chunk, policy.size)
            ours = policy.logits(start, stop)
            yield slice(start, stop), self.reference.logits(start, stop).to(ours.dtype), ours


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, walk: _Walk) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            total = _Totals.of(hidden)
            for _, theirs, ours in walk(Distribution(hidden, weight, bias, walk.rule)):
                total = total.add(theirs, ours)
        ctx.walk = walk
        ctx.save_for_backward(hidden, weight, bias, total.reference, total.policy)
        return total.difference - total.reference + total.policy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, of_reference, of_policy = ctx.saved_tensors
        policy = Distribution(hidden, weight, bias, ctx.walk.rule)
        needed = ctx.needs_input_grad
        with torch.autocast(hidden.device.type, enabled=False):
            found = _Gradients(policy, needed[0], needed[1], needed[2])
            for where, theirs, ours in ctx.walk(policy):
                change = (ours - of_policy[:, None]).exp() - (theirs - of_reference[:, None]).exp()
                change *= grads[0][:, None]
                if policy.rule != PLAIN:
                    change *= policy.rule.slope(ours)
                found.add(where, change)
        return found.of_hidden.to(hidden.dtype), found.of_weight, found.of_bias, None


@dataclass(frozen=True, slots=True)
class _Totals:
    """Running totals over the chunks."""

    reference: PerToken
    """Logarithm of the sum of the reference's exponentials; so is `policy`."""
    policy: PerToken
    difference: PerToken
    """Mean under the reference of its logit less the policy's."""

    @staticmethod
    def of(hidden: Tensor) -> "_Totals":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nothing = hidden.new_full((len(hidden),), -torch.inf, dtype=wide)
        return _Totals(nothing, nothing, torch.zeros_like(nothing))

    def add(self, theirs: Logits, ours: Logits) -> "_Totals":
        here = theirs.logsumexp(1)
        both = torch.logaddexp(self.reference, here)
        mean = torch.linalg.vecdot((theirs - both[:, None]).exp(), theirs - ours)
        before = self.difference * (self.reference - both).exp()
        return _Totals(both, torch.logaddexp(self.policy, ours.logsumexp(1)), before + mean)


class _Gradients:
    """Of hidden states (or logits), weight and bias, written chunk by chunk."""

    def __init__(self, policy: Distribution, hidden: bool, weight: bool, bias: bool) -> None:
        self.policy, self.needs_hidden = policy, hidden
        wide = torch.promote_types(policy.hidden.dtype, torch.float32)
        self.of_hidden = torch.zeros_like(policy.hidden, dtype=wide)
        self.of_weight = torch.empty_like(policy.weight) if weight and policy.weight is not None else None
        self.of_bias = torch.empty_like(policy.bias) if bias and policy.bias is not None else None

    def add(self, where: slice, change: Logits) -> None:
        """`change` is the gradient of the head's products at the tokens `where`."""
        weight, hidden = self.policy.weight, self.policy.hidden
        if weight is None:
            self.of_hidden[:, where] = change
            return
        if self.of_bias is not None:
            self.of_bias[where] = change.sum(0)
        change = change.to(hidden.dtype)
        if self.needs_hidden:
            add_product(self.of_hidden, change, weight[where].to(hidden.dtype))
        if self.of_weight is not None:
            write_product(self.of_weight[where], change.T, hidden)
