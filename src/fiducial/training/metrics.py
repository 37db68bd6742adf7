"""Metrics as (sum, count) pairs: exact means over pairs, whatever the micro-batches and processes were.

Everything stays on the device until it is logged, and is added up over processes once per optimizer step.
Names are those the dashboards of other preference trainers already know.

    loss                        the method's loss
    rewards/chosen, /rejected   beta times the log-ratio to the reference
    rewards/margins             chosen minus rejected reward
    rewards/accuracies          share of pairs whose chosen reward is the larger; a tie counts half, so that a
                                policy that still equals its reference stands at 0.5
    logps/chosen, /rejected     log-prob of the whole completion under the policy
    kl                          log-ratio of a completion to the reference, over chosen and rejected alike: an
                                estimate of the KL divergence as far as the policy would write them itself,
                                and below zero where it would not; absent without a reference
    lengths/chosen, /rejected   tokens of the completion
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor
from torch import distributed as dist

from fiducial.logps import SequenceLogps
from fiducial.losses.output import LossOutput

METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "kl",
    "lengths/chosen",
    "lengths/rejected",
)


class MetricSums:
    """Running sums of every metric, and how many values went into each."""

    def __init__(self, device: torch.device) -> None:
        # Apple's GPUs have no float64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.totals: Tensor = torch.zeros(len(METRICS) + 1, 2, dtype=dtype, device=device)

    def add(
        self, policy: SequenceLogps, reference: SequenceLogps | None, output: LossOutput, *, tokens: int
    ) -> None:
        """Count one micro-batch, of `tokens` prompt and completion tokens."""
        logps = policy.detach().pairs()
        margins = output.chosen_rewards - output.rejected_rewards
        values: dict[str, Tensor] = {
            "loss": output.loss.detach(),
            "rewards/chosen": output.chosen_rewards,
            "rewards/rejected": output.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": 0.5 * (margins.sign() + 1),
            "logps/chosen": logps.chosen.sum,
            "logps/rejected": logps.rejected.sum,
            "lengths/chosen": logps.chosen.num_tokens,
            "lengths/rejected": logps.rejected.num_tokens,
        }
        if reference is not None:
            values["kl"] = policy.sum.detach() - reference.sum
        for row, name in enumerate(METRICS):
            if name in values:
                self.totals[row, 0] += values[name].sum()
                self.totals[row, 1] += values[name].numel()
        self.totals[-1, 0] += tokens

    def merge(self, step: "MetricSums") -> None:
        """Add what was counted in one optimizer step."""
        self.totals += step.totals

    def reduce(self) -> None:
        """Add up over processes."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.totals)

    def means(self) -> dict[str, float]:
        """Every metric that was counted; the only transfer from the device."""
        rows: list[list[float]] = self.totals.tolist()
        return {name: total / count for name, (total, count) in zip(METRICS, rows, strict=False) if count}

    @property
    def num_pairs(self) -> int:
        """How many pairs were counted."""
        return int(self.totals[0, 1].item())

    @property
    def num_tokens(self) -> int:
        """How many prompt and completion tokens were counted."""
        return int(self.totals[-1, 0].item())


@dataclass
class Stopwatch:
    """Seconds spent training: it is paused while the model is evaluated or saved."""

    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds since the last restart, pauses left out."""
        return time.perf_counter() - self.started

    def restart(self, *, already: float = 0.0) -> float:
        """The seconds elapsed; counts anew, as if `already` seconds had passed."""
        elapsed = self.elapsed
        self.started = time.perf_counter() - already
        return elapsed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.started += time.perf_counter() - began


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held so far: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    if (windows := getattr(memory, "peak_wset", None)) is not None:
        return int(windows)
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
