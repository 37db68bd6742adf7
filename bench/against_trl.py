"""Fiducial against TRL's DPOTrainer on a CPU: same weights, pairs, order, batch and precision, in turn.

    python bench/against_trl.py                          # both data sets, both precisions: about 20 minutes
    python bench/against_trl.py --data hh --precision float32
    python bench/against_trl.py --quick                  # shows that it runs, no more

Contestants: TRL with its live reference (its default), TRL with precomputed reference log-probs (its fastest
setting), Fiducial (precomputed, its default). Each runs in its own process, none recomputes activations. In
float32 the losses and rewards of every step must agree with TRL's to 1e-4, or the program fails.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: look for modules in the repository, not beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])


from bench.arena import (
    CONSOLE,
    FIDUCIAL,
    HERE,
    TRL_LIVE,
    TRL_PRECOMPUTED,
    Setting,
    compare,
    report,
    table,
    write,
)
from bench.shapes import SHAPES
from bench.workload import BATCH_SIZE, available, make

CONTESTANTS = {each.name: each for each in (TRL_LIVE, TRL_PRECOMPUTED, FIDUCIAL)}
SHAPE = "42M"


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = _options(arguments)
    generated = options.generated or not available()
    comparisons: list[dict[str, Any]] = []
    for name in options.data:
        workload = make(
            name,
            generated=generated,
            vocab_size=SHAPES[SHAPE]["vocab_size"],
            max_length=options.max_length,
            warmup=1,
            steps=options.steps,
        )
        for precision in options.precision:
            chosen = [CONTESTANTS[each] for each in options.contestants]
            comparisons.append(compare(Setting(SHAPE, workload, precision), chosen))
            CONSOLE.print(table(comparisons[-1]))
    command = ["python", "bench/against_trl.py", *arguments]
    write(options.output, report(command, SHAPE, comparisons=comparisons))
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=sorted(BATCH_SIZE), default=["long", "hh"])
    parser.add_argument("--generated", action="store_true", help="random tokens of the same lengths")
    parser.add_argument(
        "--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument(
        "--steps", type=int, default=3, help="measured optimizer steps, after one that is not"
    )
    parser.add_argument("--max-length", type=int, default=2048, help="longer pairs are left out")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "against_trl.json")
    parser.add_argument(
        "--quick", action="store_true", help="two steps of pairs up to 256 tokens, into bench/.cache"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.max_length, options.steps, options.output = 256, 2, HERE / ".cache" / "quick.json"
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
