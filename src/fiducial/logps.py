"""Log-probs as they flow between scoring, references and losses.

Legend: `scored` scored token positions of a batch, `sequences` completions, `pairs` chosen/rejected pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Statistics = Mapping[str, Tensor]
"""Numbers that some losses need beside the log-probs, by name; one a token or, summed, one a sequence."""

ON_POLICY = "on_policy"
"""Log-prob of the token, less the log-prob that a token drawn from the policy is expected to have."""
ENTROPY = "entropy"
"""Of the distribution the token was scored by, in nats."""
KL = "kl"
"""Divergence of the reference's distribution to the policy's at the token; it alone carries gradient."""

UNWEIGHTED = "unweighted"
"""Log-prob of the completion without the weights that its tokens were given."""


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probability of each completion under one policy: the neutral quantity every loss uses."""

    sum: Float[Tensor, " sequences"]
    """Sum of the completion's token log-probs, in nats, float32 or wider."""
    num_tokens: Int[Tensor, " sequences"]
    statistics: Statistics = field(default_factory=dict)
    """Sums over the completion's tokens of what else was asked of the head."""

    @property
    def mean(self) -> Float[Tensor, " sequences"]:
        """Log-prob per token."""
        return self.sum / self.num_tokens.clamp(min=1)

    @property
    def unweighted(self) -> "SequenceLogps":
        """The same with every token counted in full."""
        return replace(self, sum=self.statistics.get(UNWEIGHTED, self.sum))

    def pairs(self) -> "PairLogps":
        """Split sequences stored as chosen, rejected, chosen, and so on."""
        return PairLogps(self.at(slice(0, None, 2)), self.at(slice(1, None, 2)))

    def at(self, which: slice | Tensor) -> "SequenceLogps":
        """Some of the sequences."""
        statistics = {name: values[which] for name, values in self.statistics.items()}
        return SequenceLogps(self.sum[which], self.num_tokens[which], statistics)

    def detach(self) -> "SequenceLogps":
        """The same numbers outside the graph."""
        statistics = {name: values.detach() for name, values in self.statistics.items()}
        return SequenceLogps(self.sum.detach(), self.num_tokens, statistics)


@dataclass(frozen=True, slots=True)
class PairLogps:
    """The two completions of each prompt, index for index."""

    chosen: SequenceLogps
    rejected: SequenceLogps


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Log-prob of every scored token; tokens of one completion stand together and in order."""

    values: Float[Tensor, " scored"]
    sequence: Int[Tensor, " scored"]
    """Which completion each token belongs to, ascending."""
    num_sequences: int
    statistics: Statistics = field(default_factory=dict)
    """What else was asked of the head, one number a token."""

    def reduce(self, weights: Float[Tensor, " scored"] | None = None) -> SequenceLogps:
        """Sum over each completion's tokens, log-probs times `weights` where there are any.

        With weights the bare sum is among the statistics, as UNWEIGHTED.
        """
        values = _wide(self.values)
        total = self._sums(values if weights is None else values * weights)
        # As torch.bincount counts, which on a GPU is waited for.
        count = self.sequence.new_zeros(self.num_sequences)
        count = count.index_add(0, self.sequence, torch.ones_like(self.sequence))
        statistics = {name: self._sums(_wide(each)) for name, each in self.statistics.items()}
        if weights is not None:
            statistics[UNWEIGHTED] = self._sums(values)
        return SequenceLogps(total, count, statistics)

    def _sums(self, values: Float[Tensor, " scored"]) -> Float[Tensor, " sequences"]:
        # Added one by one: in float32 a thousand tokens lose 0.002 nats, which do not cancel in a log-ratio.
        there = values.device if has_float64(values.device) else torch.device("cpu")
        total = torch.zeros(self.num_sequences, dtype=torch.float64, device=there)
        return total.index_add(0, self.sequence.to(there), values.to(there).double()).to(values)


@dataclass(frozen=True, slots=True)
class Completions:
    """What the data says of each sequence of a batch."""

    group: Int[Tensor, " sequences"]
    """Which group it belongs to, ascending from 0."""
    score: Float[Tensor, " sequences"]
    """Its rating, or 1 and -1 for desirable and undesirable; NaN where the data has none."""
    sizes: tuple[int, ...]
    """How many each group has: known here, so that no device is asked for it."""

    @classmethod
    def of(cls, group: Int[Tensor, " sequences"], score: Float[Tensor, " sequences"]) -> "Completions":
        """Of tensors alone, whose device is asked for the sizes."""
        return cls(group, score, tuple(torch.bincount(group).tolist()))

    @property
    def chosen(self) -> Bool[Tensor, " sequences"]:
        """The first of its group; of completions that stand alone, the desirable ones."""
        first = torch.ones_like(self.group, dtype=torch.bool)
        last = first.clone()
        first[1:] = last[:-1] = self.group[1:] != self.group[:-1]
        return torch.where(first & last, ~(self.score < 0), first)

    @property
    def num_groups(self) -> int:
        """How many groups."""
        return len(self.sizes)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything a loss may read: of one forward pass, or of a whole optimizer step."""

    policy: SequenceLogps
    reference: SequenceLogps | None
    completions: Completions

    @staticmethod
    def concatenate(parts: Sequence["Comparison"]) -> "Comparison":
        """All parts as one, groups numbered through."""
        references = [part.reference for part in parts if part.reference is not None]
        shifts = [0]
        for part in parts:
            shifts.append(shifts[-1] + part.completions.num_groups)
        groups = [part.completions.group + shift for part, shift in zip(parts, shifts, strict=False)]
        sizes = tuple(size for part in parts for size in part.completions.sizes)
        return Comparison(
            _joined([part.policy for part in parts]),
            _joined(references) if references else None,
            Completions(torch.cat(groups), torch.cat([part.completions.score for part in parts]), sizes),
        )

    def detach(self) -> "Comparison":
        """The same numbers outside the graph."""
        return replace(self, policy=self.policy.detach())


def _joined(parts: Sequence[SequenceLogps]) -> SequenceLogps:
    return SequenceLogps(
        torch.cat([part.sum for part in parts]),
        torch.cat([part.num_tokens for part in parts]),
        {name: torch.cat([part.statistics[name] for part in parts]) for name in parts[0].statistics},
    )


def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64, which Apple's GPUs do not."""
    return device.type != "mps"


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
