"""Running our own computation inside a model's own call.

DDP, FSDP2 and PEFT act on a call of the module they wrap: they gather weights, cast inputs, prepare the
reduction of gradients. Calling the parts of a model from outside skips all that; under DDP the gradients are
then silently wrong. So `forward` of the inner model is replaced for one call, and the wrapper is called.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

T = TypeVar("T")


@contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, calling `module` runs `forward` under the module's hooks.

    An instance's own `forward`, such as accelerate's autocast wrapper, is hidden and put back.
    """
    had, before = "forward" in module.__dict__, module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had:
            module.__dict__["forward"] = before
        else:
            del module.__dict__["forward"]


def call_inside(
    wrapped: nn.Module, inner: nn.Module, run: Callable[[Callable[..., Any]], T], **inputs: Any
) -> T:
    """Call `wrapped` so that `run(forward)` takes the place of `inner`'s forward pass, which it is handed.

    `inputs` are what wrappers see pass by; `run` brings its own.
    """
    forward = inner.forward
    with swapped_forward(inner, lambda *_, **__: run(forward)):
        result: T = wrapped(**inputs)
    return result


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, without PEFT around it."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel), f"{type(inner).__name__} is no transformers model"
    return inner
