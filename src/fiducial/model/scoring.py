"""From a batch to the log-prob of each scored token, under one model."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from fiducial.data.batch import Layout, PackedBatch, pack
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import TokenLogps


class Scorer:
    """Scores batches with one model, in one layout."""

    def __init__(
        self, model: PreTrainedModel, *, layout: Layout, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.layout = layout
        self.autocast = autocast
        self.module: nn.Module = model
        """What is called: the model, or what DDP or FSDP wrapped it in."""

    def pack(self, groups: Sequence[TokenizedGroup]) -> PackedBatch:
        """Lay `groups` out for this model."""
        return pack(groups, layout=self.layout)

    def __call__(self, batch: PackedBatch) -> TokenLogps:
        """Log-prob of every scored token, with gradient where the model has it."""
        batch = batch.to(self.model.device)
        logits = self.module(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        ).logits
        scored = logits.flatten(0, 1)[batch.source].float().log_softmax(-1)
        values = scored.gather(-1, batch.target[:, None])[:, 0]
        return TokenLogps(values, batch.sequence, batch.num_sequences)
