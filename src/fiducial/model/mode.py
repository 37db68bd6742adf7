"""Another mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def training_without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, every module but dropout is in training mode; afterwards each is in its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module.training = not isinstance(module, nn.Dropout)
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
