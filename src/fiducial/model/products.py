"""Float32 matrix products on CPUs whose vector units torch's own products leave half idle.

torch multiplies float32 matrices with MKL, which keeps to 256-bit instructions on processors Intel did not
make. oneDNN, which torch ships beside it, uses the 512-bit ones wherever there are any: the same IEEE
arithmetic, summed in another order. On two Zen 5 cores it takes 0.45 of the time, and 0.55 for the gradient
of a weight (1 700 tokens, widths 512 and 1 408).

Which of them multiplies follows from the processor alone, never from a timing, so that a resumed run repeats
its numbers. `torch.backends.mkldnn.enabled = False` gives every product back to torch.
"""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fiducial import compat

_LEAST_WORK = 2**21
"""Multiplications below which a call costs more than it saves."""
_PLAIN = (Tensor, nn.Parameter)
"""Subclasses (sharded, quantised, faked) know best how they are multiplied."""


def product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """The product of two matrices, without gradient."""
    if _suits(left, right):
        return compat.onednn_product(left, right.t())
    return left @ right


def unrounded_product(left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> Float[Tensor, "m n"]:
    """The same as it is summed, in float32, where half precision can be had so: on a GPU."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return product(left, right)


def add_product(total: Float[Tensor, "m n"], left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> None:
    """Add left @ right to `total`, summed in its precision."""
    if left.dtype == total.dtype and not _suits(left, right):
        total.addmm_(left, right)
    elif left.is_cuda:  # the one place where half-precision products can be summed in float32
        total.copy_(torch.addmm(total, left, right, out_dtype=total.dtype))
    else:
        total += product(left, right)


def write_product(out: Float[Tensor, "m n"], left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> None:
    """Put left @ right into `out`, without a copy where torch can."""
    if left.dtype == out.dtype and not _suits(left, right):
        torch.mm(left, right, out=out)
    else:
        out.copy_(product(left, right))


def fast_products(device: str) -> AbstractContextManager[object]:
    """Inside, linear layers of a model on a `device` of this type multiply as `product` does, both ways.

    Not for layers that backward will run again, outside: both times they must keep the same tensors. Not for
    a GPU either, which would wait for a look at every call.
    """
    return _FastLinear() if device == "cpu" and torch_is_slow() else nullcontext()


@cache
def torch_is_slow() -> bool:
    """Whether this processor is one on which oneDNN beats torch's own float32 products."""
    backends: Any = torch.backends  # without types
    return (
        backends.mkl.is_available()
        and backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and compat.has_onednn_product()
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    """Who made the CPU, among what the system says of it."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def _suits(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies [..., k] with [k, n] faster."""
    return (
        left.numel() * right.shape[1] >= _LEAST_WORK
        and all(
            type(each) in _PLAIN and each.dtype == torch.float32 and each.is_cpu for each in (left, right)
        )
        and torch_is_slow()
        and bool(torch.backends.mkldnn.enabled)
    )


class _FastLinear(TorchFunctionMode):
    """Takes the calls of `nn.functional.linear` that oneDNN does faster; all others pass."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and not torch.is_autocast_enabled("cpu"):
            inputs, weight, bias = (*args, None)[:3]
            if type(weight) in _PLAIN and _suits(inputs, weight.t()):
                return _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]  # torch types no Function.apply
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """inputs · weightᵀ + bias; keeps for backward what torch's own keeps, and no more."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_inputs, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(inputs if needs_weight else None, weight if needs_inputs else None)
        out = compat.onednn_product(inputs.reshape(-1, inputs.shape[-1]), weight, bias)
        return out.view(*inputs.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        of_inputs = None if weight is None else product(grad, weight).view(*grads[0].shape[:-1], -1)
        of_weight = None if inputs is None else product(grad.t(), inputs.reshape(-1, inputs.shape[-1]))
        return of_inputs, of_weight, grad.sum(0) if ctx.needs_input_grad[2] else None
