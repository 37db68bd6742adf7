"""Contestants in turn on the same pairs: run, check that they agree, and put their figures side by side."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from bench.contestant import Job, Result
from bench.measure import machine, matrix_rate, versions
from bench.shapes import Cost, config, cost, save_checkpoint
from bench.workload import Workload, padded_tokens, statistics

HERE = Path(__file__).resolve().parent
CONSOLE = Console(width=100)
TOLERANCE = 1e-4
COMPARED = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")


@dataclass(frozen=True)
class Contestant:
    """A program, and how its reference is scored."""

    name: str
    program: str
    precomputed: bool
    attention: str = "sdpa"


TRL_LIVE = Contestant("TRL, live reference", "bench.run_trl", precomputed=False)
TRL_PRECOMPUTED = Contestant("TRL, precomputed", "bench.run_trl", precomputed=True)
TRL_FLASH = Contestant(
    "TRL, precomputed, flash", "bench.run_trl", precomputed=True, attention="flash_attention_2"
)
FIDUCIAL = Contestant("Fiducial", "bench.run_fiducial", precomputed=True)


@dataclass(frozen=True)
class Setting:
    """What is the same for every contestant."""

    shape: str
    workload: Workload
    precision: str
    cuda: bool = False
    micro_batch_size: int | None = None
    """Pairs a forward pass of TRL, which cannot cut a step by tokens; None is the whole step at once."""


class DisagreementError(Exception):
    """Contestants that must compute the same numbers did not."""


def compare(setting: Setting, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Run `contestants` and collect their figures.

    Raises:
        DisagreementError: in float32, a step's loss or rewards differ from those of TRL's live reference.
    """
    workload = setting.workload
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(setting, Path(folder))
        results = {each.name: _measure(each, job) for each in contestants}
    expected = results.get(TRL_LIVE.name)
    if setting.precision == "float32" and expected is not None:
        for name, result in results.items():
            agree(name, result, expected)
    products = cost(config(setting.shape, longest=workload.max_length))
    rate = _machine_rate(products, setting)
    return {
        "data": workload.name,
        "precision": setting.precision,
        "batch_size": workload.batch_size,
        "micro_batch_size": setting.micro_batch_size or workload.batch_size,
        "max_length": workload.max_length,
        "pairs": statistics(workload.measured)
        | {"padded_tokens": padded_tokens(workload.measured, workload.batch_size)},
        "population": workload.population,
        "matrix_rate": rate,
        "contestants": {name: figures(result, workload, products, rate) for name, result in results.items()},
        "raw": {name: asdict(result) for name, result in results.items()},
    }


def prepare(setting: Setting, folder: Path) -> Job:
    """The checkpoint and the pairs on disk, and a job that points there."""
    disable_progress_bar()
    save_checkpoint(setting.shape, folder / "checkpoint", longest=setting.workload.max_length)
    setting.workload.save(folder / "workload.json")
    return Job(
        checkpoint=str(folder / "checkpoint"),
        workload=str(folder / "workload.json"),
        output_dir=str(folder / "output"),
        bf16=setting.precision == "bfloat16",
        cuda=setting.cuda,
        precomputed=False,
        micro_batch_size=setting.micro_batch_size or setting.workload.batch_size,
    )


def _measure(contestant: Contestant, job: Job) -> Result:
    """Run one contestant in a fresh process, so that its peak memory is its own."""
    CONSOLE.print(f"[dim]{contestant.name} …[/dim]")
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        own = {"precomputed": contestant.precomputed, "attention": contestant.attention}
        job_path.write_text(json.dumps(asdict(job) | own))
        program = [sys.executable, "-m", contestant.program, str(job_path), str(result_path)]
        done = subprocess.run(program, cwd=HERE.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{contestant.name} failed:\n{done.stderr[-4000:]}")
        return Result(**json.loads(result_path.read_text()))


def agree(name: str, result: Result, expected: Result) -> None:
    """Check that every step's loss and rewards equal those of `expected`, to `TOLERANCE`.

    A reward is the small difference of sums of thousands of nats: beyond 1 its tolerance grows with its size.
    """
    if len(result.logs) != len(expected.logs):
        raise DisagreementError(f"{name} logged {len(result.logs)} steps, TRL {len(expected.logs)}")
    for step, (ours, theirs) in enumerate(zip(result.logs, expected.logs, strict=True), start=1):
        for key in COMPARED:
            allowed = TOLERANCE * (1 if key == "loss" else max(1, abs(theirs[key])))
            if not abs(ours[key] - theirs[key]) <= allowed:  # written so that NaN fails
                raise DisagreementError(f"step {step}: {key} is {ours[key]} in {name}, {theirs[key]} in TRL")


def _machine_rate(products: Cost, setting: Setting) -> float:
    """The machine's FLOP/s on the products of the workload's average step."""
    facts, batch_size = statistics(setting.workload.measured), setting.workload.batch_size
    return matrix_rate(
        products,
        body_tokens=round(facts["shared_tokens"] * batch_size),
        scored_tokens=round(facts["scored_tokens"] * batch_size),
        dtype=getattr(torch, setting.precision),
        device=torch.device("cuda" if setting.cuda else "cpu"),
    )


def figures(result: Result, workload: Workload, products: Cost, rate: float) -> dict[str, float]:
    """Rates of one contestant over the measured steps.

    The scoring pass covers the warm-up pairs too; the measured pairs are charged their share of its time.
    """
    pairs = workload.measured
    training = sum(result.step_seconds[workload.warmup :])
    scoring = result.scoring_seconds * len(pairs) / len(workload.pairs)
    needed = products.training(
        sum(pair.shared_tokens for pair in pairs), sum(pair.scored_tokens for pair in pairs)
    )
    attention = products.attention_training(sum(pair.visible_keys for pair in pairs))
    return {
        "pairs_per_second": len(pairs) / (training + scoring),
        "training_pairs_per_second": len(pairs) / training,
        "scoring_over_training": scoring / training,
        "peak_bytes_above_weights": result.peak_bytes_above_weights,
        "useful_flops_per_second": needed / training,
        "share_of_matrix_rate": needed / training / rate,
        "share_with_attention": (needed + attention) / training / rate,
    }


def report(command: Sequence[str], shape: str, **measured: object) -> dict[str, Any]:
    """What was measured, with everything a reader needs to judge the numbers and to repeat them."""
    return {
        "command": " ".join(command),
        "machine": machine(),
        "versions": versions(),
        "shape": shape,
        **measured,
    }


def write(path: Path, measured: Mapping[str, Any]) -> None:
    """As JSON, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=1) + "\n")
    CONSOLE.print(f"written to {path}")


def table(comparison: Mapping[str, Any]) -> Table:
    """One comparison as a table."""
    facts = comparison["pairs"]
    title = (
        f"{comparison['data']}, {comparison['precision']}, {comparison['batch_size']} pairs a step of "
        f"{facts['shared_tokens']:.0f} tokens ({facts['padded_tokens']:.0f} padded)\n"
        "pairs/s: reference included; training: without it; scoring: its time over training's\n"
        "GiB: peak memory above the policy's weights; + att.: attention's own products counted too\n"
        f"limit: this machine on products of these sizes, {comparison['matrix_rate'] / 1e9:,.0f} GFLOP/s"
    )
    grid = Table(title=title)
    grid.add_column("")
    for heading in ("pairs/s", "×", "training", "×", "scoring", "GiB", "of limit", "+ att."):
        grid.add_column(heading, justify="right")
    rows = comparison["contestants"]
    base = rows.get(TRL_LIVE.name) or next(iter(rows.values()))
    for name, row in rows.items():
        grid.add_row(
            name,
            f"{row['pairs_per_second']:.3f}",
            f"{row['pairs_per_second'] / base['pairs_per_second']:.1f}",
            f"{row['training_pairs_per_second']:.3f}",
            f"{row['training_pairs_per_second'] / base['training_pairs_per_second']:.1f}",
            f"{row['scoring_over_training']:.2f}",
            f"{row['peak_bytes_above_weights'] / 2**30:.2f}",
            f"{row['share_of_matrix_rate']:.0%}",
            f"{row['share_with_attention']:.0%}",
        )
    return grid
