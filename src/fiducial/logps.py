"""Log-probs as they flow between scoring, references and losses.

Legend: `scored` scored token positions of a batch, `sequences` completions, `pairs` chosen/rejected pairs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceLogps:
    """Log-probability of each completion under one policy: the neutral quantity every loss uses."""

    sum: Float[Tensor, " sequences"]
    """Sum of the completion's token log-probs, in nats, float32 or wider."""
    num_tokens: Int[Tensor, " sequences"]

    @property
    def mean(self) -> Float[Tensor, " sequences"]:
        """Log-prob per token."""
        return self.sum / self.num_tokens.clamp(min=1)

    def pairs(self) -> "PairLogps":
        """Split sequences stored as chosen, rejected, chosen, and so on."""
        return PairLogps(
            SequenceLogps(self.sum[0::2], self.num_tokens[0::2]),
            SequenceLogps(self.sum[1::2], self.num_tokens[1::2]),
        )

    def detach(self) -> "SequenceLogps":
        """The same numbers outside the graph."""
        return SequenceLogps(self.sum.detach(), self.num_tokens)


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

    def reduce(self) -> SequenceLogps:
        """Sum over each completion's tokens."""
        values = self.values if self.values.dtype == torch.float64 else self.values.float()
        total = values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)
        count = torch.bincount(self.sequence, minlength=self.num_sequences)
        return SequenceLogps(total, count)
