"""Metrics as (sum, count) pairs: exact means over pairs, whatever the micro-batches and processes were.

Everything stays on the device until it is logged, and is added up over processes once per optimizer step.
Names are those the dashboards of other preference trainers already know.

    loss                        the method's loss
    rewards/chosen, /rejected   beta times the log-ratio to the reference
    rewards/margins             chosen minus rejected reward; of completions that stand alone, of their means
    rewards/accuracies          share of pairs whose chosen reward is the larger; of completions that stand
                                alone, share on the right side of the loss's reference point
    logps/chosen, /rejected     log-prob of the whole completion under the policy, every token in full
    kl                          log-ratio of a completion to the reference, over chosen and rejected alike: an
                                estimate of the KL divergence as far as the policy would write them itself,
                                and below zero where it would not; absent without a reference. With kto the
                                estimate that its loss is told: on mismatched completions, not below zero
    entropy                     of the policy, in nats, a mean over completion tokens; only with log_entropy
    lengths/chosen, /rejected   tokens of the completion

Of a list chosen is the best completion and rejected are all others; with tpo they are the second and the
third, which it compares, and the first is logps/gold and lengths/gold.
"""

import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch import distributed as dist

from fiducial.logps import ENTROPY, Comparison, has_float64
from fiducial.losses.output import LossOutput
from fiducial.processes import num_processes

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
"""What is logged of every loss, in this order; a loss's own metrics follow."""
ASKED_FOR = ("entropy",)
"""What is logged where the run asks for it."""
_TOKENS = "_tokens"


class MetricSums:
    """Running sums of every metric, and how many values went into each."""

    def __init__(self, device: torch.device) -> None:
        self.dtype = torch.float64 if has_float64(device) else torch.float32
        self.device = device
        self.totals: dict[str, Tensor] = {}
        """By name: (sum, count)."""

    def add(self, comparison: Comparison, output: LossOutput, *, tokens: int) -> None:
        """Count one micro-batch, of `tokens` prompt and completion tokens."""
        # A method may weigh the tokens it compares (LD-DPO); what is told is of whole completions.
        policy, reference = comparison.policy.detach().unweighted, comparison.reference
        chosen = comparison.completions.chosen
        values: dict[str, Tensor] = {"loss": output.loss.detach()}
        if reference is not None:
            values["kl"] = policy.sum - reference.unweighted.sum
        values |= output.metrics
        for name, numbers in values.items():
            self._count(name, numbers, output.counted.get(name))
        for side, which in {"chosen": chosen, "rejected": ~chosen}.items():
            for name, numbers in {"logps": policy.sum, "lengths": policy.num_tokens}.items():
                if f"{name}/{side}" not in output.metrics:  # the loss knows better which it compares
                    self._count(f"{name}/{side}", numbers, which)
        if ENTROPY in policy.statistics:
            self._add("entropy", policy.statistics[ENTROPY].sum(), policy.num_tokens.sum())
        self._add(_TOKENS, tokens, 1)

    def _count(self, name: str, numbers: Tensor, which: Tensor | None) -> None:
        """Add `numbers`, or those of them that are `which`."""
        if which is None:
            self._add(name, numbers.sum(dtype=self.dtype), numbers.numel())
        else:
            self._add(name, numbers.where(which, 0).sum(dtype=self.dtype), which.sum())

    def _add(self, name: str, total: Tensor | float, count: Tensor | int) -> None:
        if name not in self.totals:
            self.totals[name] = torch.zeros(2, dtype=self.dtype, device=self.device)
        self.totals[name][0] += total
        self.totals[name][1] += count

    def merge(self, step: "MetricSums") -> None:
        """Add what was counted in one optimizer step."""
        for name, total in step.totals.items():
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def reduce(self) -> None:
        """Add up over processes, which all count the same metrics."""
        if num_processes() > 1 and self.totals:
            names = sorted(self.totals)
            table = torch.stack([self.totals[name] for name in names])
            dist.all_reduce(table)
            self.totals = dict(zip(names, table, strict=True))

    def is_finite(self, name: str) -> bool:
        """Whether every value counted as `name` was a finite number."""
        return bool(self.totals[name][0].isfinite())

    def means(self) -> dict[str, float]:
        """Every metric that was counted; the only transfer from the device."""
        means = {name: total / count for name, (total, count) in self.state().items() if count}
        means.pop(_TOKENS, None)
        if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        ordered = [name for name in METRICS if name in means]
        return {name: means[name] for name in [*ordered, *sorted(means.keys() - set(METRICS))]}

    def state(self) -> dict[str, list[float]]:
        """The sums and counts as plain numbers: float64 survives JSON unchanged."""
        if not self.totals:
            return {}
        rows: list[list[float]] = torch.stack(list(self.totals.values())).tolist()
        return dict(zip(self.totals, rows, strict=True))

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """What `state` gave."""
        self.totals = {
            name: torch.tensor(row, dtype=self.dtype, device=self.device) for name, row in state.items()
        }

    @property
    def num_pairs(self) -> int:
        """How many groups were counted."""
        return int(self.state().get("loss", [0, 0])[1])

    @property
    def num_tokens(self) -> int:
        """How many prompt and completion tokens were counted."""
        return int(self.state().get(_TOKENS, [0, 0])[0])


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
    if (linux := _high_water_mark()) is not None:
        return linux
    import resource  # not there on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_memory(device: torch.device) -> int:
    """Bytes this process holds now: allocated on a CUDA device, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int | None:
    """Linux's own figure for this program; `getrusage` also counts what ran in the process before it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return None if found is None else int(found[1]) * 1024
