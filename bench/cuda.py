"""Fiducial against TRL's DPOTrainer on one GPU: a 1B-shaped Llama in bfloat16, generated pairs, no network.

    python bench/cuda.py                    # both kinds of pairs; writes bench/results/cuda.json
    python bench/cuda.py --data hh --steps 5

Contestants: TRL with its live reference, TRL with precomputed log-probs, the same with flash attention where
flash-attn is installed, Fiducial's packed path, and the same with Liger's kernels where those are installed.
TRL takes a step in the largest
micro-batches that fit in memory. Peak memory is the CUDA allocator's; the matrix rate is the GPU's own on
the products of the same step.

Exit code 3: there is no CUDA device, and nothing was measured.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: beside it, torch's own `import cuda` would find this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.arena import (
    CONSOLE,
    FIDUCIAL,
    FIDUCIAL_LIGER,
    HERE,
    TRL_DEFAULT,
    TRL_FLASH,
    TRL_PRECOMPUTED,
    Setting,
    compare,
    report,
    table,
    write,
)
from bench.shapes import SHAPES
from bench.workload import make

NO_DEVICE = 3
BATCH_SIZE = {"long": 16, "hh": 64}
MICRO_BATCH_SIZE = {"long": 2, "hh": 8}
"""Of TRL at first; halved as long as its memory runs out."""


def main(arguments: list[str]) -> int:
    """Measure, print, write; `NO_DEVICE` without a GPU."""
    options = _options(arguments)
    if not torch.cuda.is_available():
        CONSOLE.print("bench/cuda.py needs a CUDA device and torch built for it; nothing was measured.")
        return NO_DEVICE
    contestants = [TRL_DEFAULT, TRL_PRECOMPUTED]
    if find_spec("flash_attn"):
        contestants.append(TRL_FLASH)
    contestants.append(FIDUCIAL)
    if find_spec("liger_kernel"):
        contestants.append(FIDUCIAL_LIGER)
    comparisons: list[dict[str, Any]] = []
    for name in options.data:
        workload = make(
            name,
            generated=True,
            vocab_size=SHAPES[options.shape]["vocab_size"],
            max_length=options.max_length,
            warmup=2,
            steps=options.steps,
            batch_size=BATCH_SIZE[name],
        )
        setting = Setting(
            options.shape, workload, "bfloat16", cuda=True, micro_batch_size=MICRO_BATCH_SIZE[name]
        )
        comparisons.append(compare(setting, contestants))
        CONSOLE.print(table(comparisons[-1]))
        command = ["python", "bench/cuda.py", *arguments]
        write(options.output, report(command, options.shape, comparisons=comparisons))
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=sorted(BATCH_SIZE), default=["long", "hh"])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1B")
    parser.add_argument(
        "--steps", type=int, default=8, help="measured optimizer steps, after two that are not"
    )
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cuda.json")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
