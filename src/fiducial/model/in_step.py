"""Two policies through one model in step: each layer computes for both while its weights are at hand.

FSDP2 gathers a layer's weights for a call of the layer and gives them up after it. A pass of its own for each
policy gathers them twice, and backward once more. Here the second policy's hidden states travel beside the
first's, and each call computes for the first, with gradient as it is, and then for the second, without. What
backward recomputes is the first's part alone.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache

from fiducial.errors import ModelError
from fiducial.model.mode import evaluating
from fiducial.model.redirection import swapped_forward
from fiducial.model.trunk import Trunk, decoder_layers


class InStepError(ModelError):
    """A model in which one policy would see what is another's."""


Switch = Callable[[nn.Module], AbstractContextManager[None]]
"""Inside, a part of the model computes for the second policy."""


@dataclass(slots=True)
class Beside:
    """The second policy on its way through the layers of the first one's pass."""

    trunk: Trunk
    """Of all layers: what the latest one said for the second policy."""
    switch: Switch
    traced: bool = False
    """Whether its computation can be traced back to what trains, to find out if there is any."""

    def through(self, layer: nn.Module, *, first: bool) -> Callable[..., Any]:
        """`layer` for both; the `first` takes what the first policy brings."""
        forward = layer.forward

        def both(hidden: Any = None, *others: Any, **named: Any) -> Any:
            _refuse_more_than_hidden_states(hidden, others, named)
            own = hidden if first else _hidden(self.trunk.said)
            answer = forward(hidden, *others, **named)
            with nullcontext() if self.traced else torch.no_grad(), evaluating(layer), self.switch(layer):
                # In the precision that FSDP2's mixed precision has given the first policy's.
                self.trunk.said = forward(own.to(hidden.dtype), *others, **named)
            return answer

        return both


@contextmanager
def in_step(model: nn.Module, start: int, beside: Beside) -> Iterator[None]:
    """Inside, a pass of `model` takes `beside` through its layers from `start` on, and leaves its end there.

    Raises:
        InStepError: layers hand each other more than hidden states.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(decoder_layers(model)[start:]):
            stack.enter_context(swapped_forward(layer, beside.through(layer, first=number == 0)))
        yield


def _hidden(said: Any) -> torch.Tensor:
    hidden: torch.Tensor = said[0] if isinstance(said, tuple) else said
    return hidden


def _refuse_more_than_hidden_states(hidden: Any, others: tuple[Any, ...], named: dict[str, Any]) -> None:
    """What a layer leaves in a cache or dictionary for later ones would be the other policy's."""
    shared = [*others, *named.values()]
    if not isinstance(hidden, torch.Tensor) or any(isinstance(each, Cache | dict | list) for each in shared):
        raise InStepError("layers hand each other more than hidden states")
