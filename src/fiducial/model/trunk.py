"""The trunk: a model's lowest layers, computed once for two models that are equal there.

What the last of these layers says in one model's pass is kept and answers for the same layers in the other's,
which goes on from there as it would have. Everything else about the two passes stays as it is: masks,
positions, the upper layers, the head.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fiducial.compat import without_hooks
from fiducial.errors import ModelError
from fiducial.model.logit_rule import backbone
from fiducial.model.redirection import causal_lm, swapped_forward


@dataclass(slots=True)
class Trunk:
    """What the lowest `depth` layers said in the latest pass they were recorded in."""

    depth: int
    said: Any = None
    """As the model's own layers give it: hidden states, in older families inside a tuple."""

    @property
    def has_gradient(self) -> bool:
        """Whether something that trains has a part in it."""
        said = self.said if isinstance(self.said, tuple) else (self.said,)
        return any(isinstance(part, torch.Tensor) and part.requires_grad for part in said)


@contextmanager
def recorded(model: nn.Module, trunk: Trunk) -> Iterator[None]:
    """Inside, a pass of `model` leaves in `trunk` what its lowest layers say."""

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        trunk.said = output

    hook = decoder_layers(model)[trunk.depth - 1].register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def replayed(model: nn.Module, trunk: Trunk) -> Iterator[None]:
    """Inside, the lowest layers of `model` compute nothing and answer what `trunk` has recorded.

    Their hooks are left out: FSDP2 would gather weights that nothing is multiplied with.
    """
    with ExitStack() as stack:
        for layer in decoder_layers(model)[: trunk.depth]:
            stack.enter_context(swapped_forward(layer, lambda *_, **__: trunk.said))
            stack.enter_context(without_hooks(layer))
        yield


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers that hidden states pass one after another.

    Raises:
        ModelError: the model has no such list, or several.
    """
    lists = [part for part in backbone(causal_lm(model)).children() if isinstance(part, nn.ModuleList)]
    if len(lists) != 1:
        raise ModelError(f"{type(causal_lm(model)).__name__} has {len(lists)} lists of layers, not one.")
    return lists[0]
