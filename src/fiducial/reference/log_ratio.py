"""How the log-ratio of policy to reference is spread, over tokens and over completions.

A single largest difference cannot tell one stray token from a reference that is another model. Before step 1
every figure is zero but for rounding where the reference is the starting policy.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

QUANTILES = {"min": 0.0, "p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True, slots=True)
class LogRatios:
    """log π(y|x) − log π_ref(y|x) in nats, as quantiles by the names of `QUANTILES`."""

    per_token: dict[str, float]
    per_sequence: dict[str, float]
    """Of sums over whole completions: what the loss multiplies by beta."""


def spread(
    policy: Float[Tensor, " scored"], reference: Float[Tensor, " scored"], sequence: Int[Tensor, " scored"]
) -> LogRatios:
    """Quantiles of the log-ratio; `sequence` says which completion each token belongs to, ascending."""
    ratios = policy.double() - reference.double()
    sums = torch.zeros(int(sequence.max()) + 1, dtype=torch.float64).index_add(0, sequence, ratios)
    return LogRatios(_quantiles(ratios), _quantiles(sums))


def _quantiles(values: Float[Tensor, " values"]) -> dict[str, float]:
    at = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return dict(zip(QUANTILES, torch.quantile(values, at).tolist(), strict=True))
