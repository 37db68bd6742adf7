"""Where reference log-probs come from while training. The trainer knows only `Reference`."""

from typing import Protocol

from fiducial.data.batch import PackedBatch
from fiducial.logps import TokenLogps


class Reference(Protocol):
    """Answers with the reference's log-probs of a batch, or None where there is no reference."""

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs aligned with `batch.target`, without gradient."""
        ...
