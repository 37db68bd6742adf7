"""Two models that hold their common weights once."""

import torch
from torch import nn


@torch.no_grad()
def share_frozen_weights(model: nn.Module, other: nn.Module) -> int:
    """Let `other` use `model`'s own tensor for every frozen weight in which they are equal to the bit.

    Returns how many bytes that frees. What `model` trains stays `other`'s own.
    """
    held, freed = dict(model.named_parameters()), 0
    for name, theirs in other.named_parameters():
        ours = held.get(name)
        if ours is not None and not ours.requires_grad and _same(ours, theirs):
            freed += theirs.numel() * theirs.element_size()
            theirs.data = ours.data
    return freed


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    alike = (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
    return alike and torch.equal(ours, theirs)
