"""Fiducial against TRL's DPOTrainer on one GPU: a 1B-shaped Llama in bfloat16, generated pairs, no network.

    python bench/cuda.py                    # both kinds of pairs; writes bench/results/cuda.json
    python bench/cuda.py --only-missing     # goes on where it was cut off
    python bench/cuda.py --data hh --steps 5
    python bench/cuda.py --one-process      # half the time: what all import is imported once
    python bench/cuda.py --quick            # shows that it runs, on a CPU too

Contestants: TRL with its live reference, TRL with precomputed log-probs, the same with flash attention where
flash-attn is installed, Fiducial's packed path, and the same with Liger's kernels where those are installed.
TRL takes a step in micro-batches of 2 long pairs or 8 short ones, some 4,000 to 7,000 tokens with their
padding, or of the most that fit in memory. Peak memory is the CUDA allocator's; the matrix rate is the GPU's
own on the products of the same step.

Every step is run twice, and the second time is measured: padded batches come in ever new shapes, and the
first pass in a shape takes longer. Over a long run that is little; in a short one it was most of TRL's time.

What is measured is written when a contestant has finished: cut off at any time, the file holds all that have.
One that fails is told, and the others go on. Exit code 1: one has failed. Exit code 3: there is no CUDA
device, and nothing was measured.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # run as a file: beside it, torch's own `import cuda` would find this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers.utils import is_flash_attn_2_available

from bench.arena import (
    CONSOLE,
    FIDUCIAL,
    FIDUCIAL_LIGER,
    HERE,
    TRL_DEFAULT,
    TRL_FLASH,
    TRL_PRECOMPUTED,
    Contestant,
    FailedError,
    Setting,
    finished_in,
    grow,
    table,
)
from bench.results import Results
from bench.shapes import SHAPES
from bench.workload import make

NO_DEVICE = 3
BATCH_SIZE = {"long": 16, "hh": 64}
MICRO_BATCH_SIZE = {"long": 2, "hh": 8}
"""Of TRL at first; halved as long as its memory runs out."""


def main(arguments: list[str]) -> int:
    """Measure, print, write; `NO_DEVICE` without a GPU, 1 if a contestant failed."""
    options = _options(arguments)
    if not (options.quick or torch.cuda.is_available()):
        CONSOLE.print("bench/cuda.py needs a CUDA device and torch built for it; nothing was measured.")
        return NO_DEVICE
    results = Results(options.output, ["python", "bench/cuda.py", *arguments], options.shape)
    failures: list[FailedError] = []
    for setting in _settings(options):
        _measure(setting, results, failures, only_missing=options.only_missing)
    return int(bool(failures))


def _measure(setting: Setting, results: Results, failures: list[FailedError], *, only_missing: bool) -> None:
    """Every contestant on one data set, each written as soon as it has finished."""
    workload, contestants = setting.workload, _contestants()
    key = {"method": setting.method, "data": workload.name, "precision": setting.precision}
    earlier = results.held(**key, batch_size=workload.batch_size) if only_missing else None
    CONSOLE.print(f"{setting.method} on {workload.name}, {setting.precision}")
    if finished_in(earlier, workload) >= {each.name for each in contestants}:
        CONSOLE.print("measured already")
        return

    def failed(error: FailedError) -> None:
        CONSOLE.print(f"[red]{error}[/red]", highlight=False)
        failures.append(error)

    for comparison in grow(setting, contestants, earlier=earlier, failed=failed):
        CONSOLE.print(table(comparison))
        results.add(comparison)


def _contestants() -> list[Contestant]:
    """Those that can run here."""
    contestants = [TRL_DEFAULT, TRL_PRECOMPUTED]
    if is_flash_attn_2_available():
        contestants.append(TRL_FLASH)
    contestants.append(FIDUCIAL)
    if torch.cuda.is_available() and find_spec("liger_kernel"):
        contestants.append(FIDUCIAL_LIGER)
    return contestants


def _settings(options: argparse.Namespace) -> Iterator[Setting]:
    """One for each data set."""
    for name in options.data:
        once = make(
            name,
            generated=True,
            vocab_size=SHAPES[options.shape]["vocab_size"],
            max_length=options.max_length,
            warmup=0,
            steps=options.steps,
            batch_size=BATCH_SIZE[name],
        )
        workload = replace(once, warmup=options.steps, examples=2 * once.examples)
        setting = Setting(
            options.shape,
            workload,
            "bfloat16",
            cuda=torch.cuda.is_available(),
            micro_batch_size=MICRO_BATCH_SIZE[name],
        )
        yield replace(setting, isolated=not options.one_process)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=sorted(BATCH_SIZE), default=["long", "hh"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1B")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps, each run twice and measured once"
    )
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--output", type=Path, help="bench/results/cuda.json unless --quick")
    parser.add_argument("--only-missing", action="store_true", help="skip what the output holds already")
    parser.add_argument(
        "--one-process", action="store_true", help="contestants one after the other in this process"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one process, a CPU will do; into bench/.cache"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.steps, options.max_length = "tiny", 1, 256
        options.one_process = True
    folder = HERE / (".cache" if options.quick else "results")
    options.output = options.output or folder / "cuda.json"
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
