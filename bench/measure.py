"""What is measured inside a contestant's process, in the same way for every contestant."""

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import TrainerCallback

from bench.shapes import Cost, Product
from fiducial import __version__
from fiducial.model.products import product

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def synchronize() -> None:
    """Wait for the GPU, where there is one: kernels run behind the clock's back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Stopwatch:
    """Adds up wall-clock seconds of the blocks it times."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time this block."""
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        self.seconds += time.perf_counter() - start


@dataclass
class StepClock(TrainerCallback):
    """Seconds from one optimizer step's end to the next's, logging included, and what each step logged."""

    step_seconds: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    _last: float = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        synchronize()
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step is done."""
        synchronize()
        now = time.perf_counter()
        self.step_seconds.append(now - self._last)
        self._last = now

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Keep the numbers of one step; the summary at the end has no loss of its own."""
        logs = kwargs["logs"]
        if "loss" in logs:
            self.logs.append({key: float(value) for key, value in logs.items()})


class PeakMemory:
    """Most memory above what the policy's weights take, from construction to `above_weights`.

    CPU: the kernel's own high-water mark of the process's resident memory, less what is resident once the
    policy is loaded. CUDA: the allocator's high-water mark, less the same. A second copy of the weights,
    gradients, optimizer state and activations all count.
    """

    def __init__(self, model: nn.Module) -> None:
        for parameter in model.parameters():  # out of the checkpoint's memory map and into memory
            parameter.data = parameter.data.clone()
        synchronize()
        self.cuda = next(model.parameters()).is_cuda
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss

    def above_weights(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return resident_peak() - self.before


def resident_peak() -> int:
    """Most bytes of this process that were resident at once, as the kernel counts them."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matrix_rates(
    cost: Cost, *, body_tokens: int, scored_tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """FLOP/s of this machine over exactly the products of one training step, and nothing else.

    Each linear layer's forward and two backward products are timed at the step's own sizes, best of a few
    runs; a rate is all operations over all seconds. `torch` is that of torch's own products, `fastest` that
    of the faster library for each of them.
    """
    products = [(shape, body_tokens) for shape in cost.body] + [(cost.head, scored_tokens)]
    seconds = {key: _product_seconds(*key, dtype, device) for key in set(products)}
    operations = cost.training(body_tokens, scored_tokens)
    return {name: operations / sum(seconds[key][name] for key in products) for name in ("torch", "fastest")}


def _product_seconds(
    shape: Product, tokens: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    inputs = torch.randn(tokens, shape[0], dtype=dtype, device=device)
    weight = torch.randn(shape[1], shape[0], dtype=dtype, device=device)
    outputs = torch.randn(tokens, shape[1], dtype=dtype, device=device)
    pairs = ((inputs, weight.T), (outputs, weight), (outputs.T, inputs))
    torchs, ours = (
        [_best_seconds(partial(multiply, *pair)) for pair in pairs] for multiply in (torch.mm, product)
    )
    return {"torch": sum(torchs), "fastest": sum(map(min, torchs, ours))}


def _best_seconds(run: Callable[[], object], *, least_runs: int = 3, least_seconds: float = 0.2) -> float:
    run()
    times: list[float] = []
    while len(times) < least_runs or sum(times) < least_seconds:
        watch = Stopwatch()
        with watch.running():
            run()
        times.append(watch.seconds)
    return min(times)


def machine() -> dict[str, Any]:
    """What the numbers depend on. No host name."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Installed versions of what is measured, and this code's own."""
    return {name: _version(name) for name in PACKAGES} | {"fiducial": __version__}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
