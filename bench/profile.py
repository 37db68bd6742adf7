"""Where one Fiducial training step spends its time.

    python bench/profile.py                                       # writes bench/results/profile.json
    python bench/profile.py --data long --precision float32 --operations 30
    python bench/profile.py --data kto                            # KTO, which scores more than it trains on

Trains on the examples of `bench/against_trl.py` with the first method that is measured on them, and profiles
the last step: every operation's own time, summed by what it belongs to. On a GPU it is the kernels' time.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: beside it, Python's own `import profile` would find this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.table import Table
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from bench.arena import CONSOLE, HERE, Setting, prepare, report, write
from bench.measure import Stopwatch, synchronize
from bench.methods import METHODS
from bench.run_fiducial import run
from bench.shapes import SHAPES
from bench.workload import DATA, available, make

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear", "mkldnn::")
COPIES = ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index", "aten::slice_backward")
OPTIMIZER = ("Optimizer.", "_fused_adam", "_foreach_norm", "clip_grad")
ATTENTION = ("_BlockAttention", "scaled_dot_product", "ScaledDotProduct", "flash_attn", "flash_attention")
HEAD = "TokenLogps"
"""The name of the head's autograd function, in whose forward and backward its operations happen."""


def category(chain: list[str]) -> str:
    """What an operation belongs to, from its name and its callers', outermost first."""
    own = chain[-1]
    if _any(OPTIMIZER, chain):
        return "optimizer and clipping"
    product = own.startswith(PRODUCTS)
    if _any((HEAD,), chain):
        return "head: products" if product else "head: softmax, chunks"
    if _any(ATTENTION, chain):
        return "attention"
    if product:
        return "body: products"
    if own.startswith(COPIES):
        return "copies, casts, fills"
    return "norms, activations, rotary, other element-wise"


class LastStep(TrainerCallback):
    """Profiles one optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.profiler = profile(activities=_activities())
        self.watch = Stopwatch()
        self._timing: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, if it is the one."""
        if state.global_step == self.step - 1:
            synchronize()
            self.profiler.start()
            self._timing = self.watch.running()
            self._timing.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, if it is the one."""
        if state.global_step == self.step:
            self._timing.__exit__(None, None, None)
            self.profiler.stop()


def seconds_by_category(profiler: profile) -> dict[str, float]:
    """Own time of every operation, summed."""
    seconds: defaultdict[str, float] = defaultdict(float)
    on_gpu = torch.cuda.is_available()
    for event in _events(profiler):
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds[category(list(_chain(event)))] += own / 1e6
    return seconds


def _events(profiler: profile) -> Iterator[FunctionEvent]:
    assert profiler.profiler is not None, "the step was not reached"
    for event in profiler.profiler.function_events:
        if event.device_type == DeviceType.CPU:  # a kernel's time is also its operation's
            yield event


def _chain(event: FunctionEvent) -> Iterator[str]:
    if event.cpu_parent is not None:
        yield from _chain(event.cpu_parent)
    yield event.name


def _any(fragments: tuple[str, ...], chain: list[str]) -> bool:
    return any(fragment in name for name in chain for fragment in fragments)


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def table(step: Mapping[str, Any]) -> Table:
    """One step's categories and their shares of its wall-clock time."""
    grid = Table(title=f"{step['method']} on {step['data']}, {step['precision']}")
    grid.add_column("")
    grid.add_column("ms", justify="right")
    grid.add_column("share", justify="right")
    wall = sum(step["seconds"].values())
    for name, spent in sorted(step["seconds"].items(), key=lambda item: -item[1]):
        grid.add_row(name, f"{1000 * spent:.0f}", f"{spent / wall:.1%}")
    return grid


def measure(name: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps and profile the last one."""
    workload = make(
        name,
        generated=not available(),
        vocab_size=SHAPES[options.shape]["vocab_size"],
        max_length=2048,
        warmup=1,
        steps=options.steps - 1,
        batch_size=options.batch_size,
    )
    last = LastStep(options.steps)
    method = next(each for each, row in METHODS.items() if name in row.data)
    setting = Setting(options.shape, workload, precision, cuda=torch.cuda.is_available(), method=method)
    with tempfile.TemporaryDirectory() as folder:
        run(replace(prepare(setting, Path(folder)), liger=options.liger), [last])
    seconds = seconds_by_category(last.profiler)
    seconds["GPU idle" if setting.cuda else "Python between operations"] = last.watch.seconds - sum(
        seconds.values()
    )
    if options.operations:
        order = "self_device_time_total" if setting.cuda else "self_cpu_time_total"
        print(last.profiler.key_averages().table(sort_by=order, row_limit=options.operations))
    return {"method": method, "data": workload.name, "precision": precision, "seconds": seconds}


def main(arguments: list[str]) -> int:
    """Profile every combination, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    precisions = ["float32", "bfloat16"]
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=["long", "hh"])
    parser.add_argument("--precision", nargs="+", choices=precisions, default=precisions)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="42M")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="examples a step, if not the data set's own")
    parser.add_argument("--liger", action="store_true", help="with Liger's kernels, on a GPU")
    parser.add_argument("--operations", type=int, default=0, help="print this many single operations too")
    output = HERE / "results" / f"profile{'_cuda' * torch.cuda.is_available()}.json"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args(arguments)
    steps = []
    for name in options.data:
        for precision in options.precision:
            steps.append(measure(name, precision, options))
            CONSOLE.print(table(steps[-1]))
    write(options.output, report(["python", "bench/profile.py", *arguments], options.shape, steps=steps))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
