"""Contestants in turn on the same pairs: run, check that they agree, and put their figures side by side."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from bench.agreement import COMPARED, LOGPS, agree
from bench.contestant import Job, Result
from bench.measure import machine, matrix_rates, versions
from bench.methods import METHODS
from bench.shapes import Cost, config, cost, save_checkpoint
from bench.workload import Workload, padded_tokens, statistics, waste
from fiducial.loading import free_memory

HERE = Path(__file__).resolve().parent
CONSOLE = Console(width=110)


@dataclass(frozen=True)
class Contestant:
    """A program, and how its reference is scored."""

    name: str
    program: str
    precomputed: bool
    attention: str = "sdpa"
    liger: bool = False
    """Whether Liger's kernels are in its layers."""


TRL_DEFAULT = Contestant("TRL default", "bench.run_trl", precomputed=False)
TRL_PRECOMPUTED = Contestant("TRL precomputed", "bench.run_trl", precomputed=True)
TRL_FLASH = Contestant(
    "TRL precomputed, flash", "bench.run_trl", precomputed=True, attention="flash_attention_2"
)
FIDUCIAL = Contestant("Fiducial", "bench.run_fiducial", precomputed=True)
FIDUCIAL_LIGER = Contestant("Fiducial, Liger", "bench.run_fiducial", precomputed=True, liger=True)


class FailedError(Exception):
    """A contestant's program failed."""


@dataclass(frozen=True)
class Setting:
    """What is the same for every contestant."""

    shape: str
    workload: Workload
    precision: str
    cuda: bool = False
    micro_batch_size: int | None = None
    """Examples a forward pass of TRL, which cannot cut a step by tokens; None is the whole step at once."""
    method: str = "dpo"
    """A row of `bench.methods`."""
    learning_rate: float = 1e-4
    isolated: bool = True
    """Whether each contestant runs in a process of its own, without which its peak memory on a CPU means
    nothing. One with Liger's kernels does so in any case: they would stay for those after it."""


def compare(setting: Setting, contestants: Sequence[Contestant]) -> dict[str, Any]:
    """Run `contestants` and collect their figures.

    Raises:
        DisagreementError: in float32, a step's loss, rewards or log-probs differ from those of TRL's default.
        FailedError: a contestant's program did not come to its end.
    """
    *_, comparison = grow(setting, contestants)
    results = {name: Result(**raw) for name, raw in comparison["raw"].items()}
    expected = results.get(TRL_DEFAULT.name)
    if setting.precision == "float32" and expected is not None:
        compared = (*COMPARED, *(LOGPS if METHODS[setting.method].reference else ()))
        for name, result in results.items():
            agree(name, result, expected, compared)
    return comparison


def grow(
    setting: Setting,
    contestants: Sequence[Contestant],
    *,
    earlier: Mapping[str, Any] | None = None,
    failed: Callable[[FailedError], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """The comparison as it stands whenever another of `contestants` has come to its end.

    Args:
        setting: What is the same for all of them.
        contestants: In the order of the table.
        earlier: A comparison that broke off. Who ran on these very examples does not run again.
        failed: Is told who did not come to its end, and the others go on.

    Raises:
        FailedError: a contestant's program did not come to its end, and nobody is told.
    """
    workload = setting.workload
    results, sizes = _known(earlier, workload)
    products = cost(config(setting.shape, longest=workload.max_length))
    rates = _machine_rates(products, setting)
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(setting, Path(folder))
        for contestant in contestants:
            if contestant.name in results:
                continue
            measure = _measure if setting.isolated or contestant.liger else _run_here
            try:
                found, sizes[contestant.name] = _fitting(partial(_timed, measure, contestant), job)
            except FailedError as error:
                if failed is None:
                    raise
                failed(error)
                continue
            results[contestant.name] = found
            finished = [each for each in contestants if each.name in results]
            yield {
                "method": setting.method,
                "data": workload.name,
                "unit": workload.unit,
                "precision": setting.precision,
                "batch_size": workload.batch_size,
                "micro_batch_sizes": {
                    each.name: sizes[each.name] for each in finished if each.program != FIDUCIAL.program
                },
                "max_length": workload.max_length,
                "examples": _examples(workload),
                "waste": waste(workload.measured, workload.batch_size),
                "population": workload.population,
                "matrix_rate": rates["fastest"],
                "torch_matrix_rate": rates["torch"],
                "contestants": {
                    each.name: figures(results[each.name], workload, products, rates["fastest"])
                    for each in finished
                },
                "raw": {each.name: asdict(results[each.name]) for each in finished},
            }


def finished_in(earlier: Mapping[str, Any] | None, workload: Workload) -> set[str]:
    """Names of the contestants that ran on `workload`."""
    return set(_known(earlier, workload)[0])


def _known(earlier: Mapping[str, Any] | None, workload: Workload) -> tuple[dict[str, Result], dict[str, int]]:
    """What `earlier` holds of `workload`: results, and the examples in a forward pass of TRL."""
    if earlier is None or earlier["examples"] != _examples(workload):
        return {}, {}
    return {name: Result(**raw) for name, raw in earlier["raw"].items()}, dict(earlier["micro_batch_sizes"])


def _examples(workload: Workload) -> dict[str, float]:
    facts = statistics(workload.measured)
    return facts | {"padded_tokens": padded_tokens(workload.measured, workload.batch_size)}


def prepare(setting: Setting, folder: Path) -> Job:
    """The checkpoint and the examples on disk, and a job that points there."""
    disable_progress_bar()
    device = torch.device("cuda" if setting.cuda else "cpu")
    save_checkpoint(setting.shape, folder / "checkpoint", longest=setting.workload.max_length, device=device)
    free_memory()  # contestants, in processes of their own, are to have the whole GPU
    setting.workload.save(folder / "workload.json")
    return Job(
        checkpoint=str(folder / "checkpoint"),
        workload=str(folder / "workload.json"),
        output_dir=str(folder / "output"),
        bf16=setting.precision == "bfloat16",
        cuda=setting.cuda,
        precomputed=False,
        method=setting.method,
        learning_rate=setting.learning_rate,
        micro_batch_size=setting.micro_batch_size or setting.workload.batch_size,
    )


def _fitting(measure: Callable[[Job], Result], job: Job) -> tuple[Result, int]:
    """What `measure` finds with the largest micro-batches that fit in memory, halved until they do."""
    while True:
        try:
            return measure(job), job.micro_batch_size
        except FailedError as error:
            if "OutOfMemoryError" not in str(error) or job.micro_batch_size == 1:
                raise
        job = replace(job, micro_batch_size=job.micro_batch_size // 2)
        CONSOLE.print(f"[dim]  out of memory; again with micro-batches of {job.micro_batch_size} …[/dim]")


def _timed(measure: Callable[[Contestant, Job], Result], contestant: Contestant, job: Job) -> Result:
    """What `measure` finds, and told how long that took."""
    CONSOLE.print(f"[dim]{contestant.name} …[/dim]")
    began = time.perf_counter()
    result = measure(contestant, job)
    median = sorted(result.step_seconds)[len(result.step_seconds) // 2]
    CONSOLE.print(f"[dim]  {median:.3g} s a step, {time.perf_counter() - began:.0f} s in all[/dim]")
    return result


def _measure(contestant: Contestant, job: Job) -> Result:
    """Run one contestant in a fresh process, so that its peak memory is its own."""
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder, "job.json"), Path(folder, "result.json")
        job_path.write_text(json.dumps(asdict(_told(contestant, job))))
        program = [sys.executable, "-m", contestant.program, str(job_path), str(result_path)]
        done = subprocess.run(program, cwd=HERE.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FailedError(f"{contestant.name} failed:\n{done.stderr[-4000:]}")
        return Result(**json.loads(result_path.read_text()))


def _run_here(contestant: Contestant, job: Job) -> Result:
    """Run one contestant in this process."""
    try:
        result: Result = import_module(contestant.program).run(_told(contestant, job))
    except torch.OutOfMemoryError as error:
        raise FailedError(f"{contestant.name} failed:\nOutOfMemoryError: {error}") from error
    finally:
        free_memory()  # the next one is to have the whole GPU
    return result


def _told(contestant: Contestant, job: Job) -> Job:
    return replace(
        job,
        precomputed=contestant.precomputed,
        attention=contestant.attention,
        liger=contestant.liger,
    )


def _machine_rates(products: Cost, setting: Setting) -> dict[str, float]:
    """The machine's FLOP/s on the products of the workload's average step."""
    facts, batch_size = statistics(setting.workload.measured), setting.workload.batch_size
    rates = matrix_rates(
        products,
        body_tokens=round(facts["shared_tokens"] * batch_size),
        scored_tokens=round(facts["scored_tokens"] * batch_size),
        dtype=getattr(torch, setting.precision),
        device=torch.device("cuda" if setting.cuda else "cpu"),
    )
    free_memory()
    return rates


def figures(result: Result, workload: Workload, products: Cost, rate: float) -> dict[str, float]:
    """Rates of one contestant over the measured steps."""
    examples, scoring = workload.measured, result.scoring_seconds
    training = sum(result.step_seconds[workload.warmup :])
    mismatched = sum(len(each.mismatched) for each in examples)
    needed = products.training(
        sum(each.shared_tokens for each in examples), sum(each.scored_tokens for each in examples)
    ) + products.forward(mismatched, mismatched)
    attention = products.attention(
        sum(3 * each.visible_keys + each.mismatched_keys for each in examples)  # a backward is two forwards
    )
    return {
        "per_second": len(examples) / (training + scoring),
        "training_per_second": len(examples) / training,
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
    """As JSON, whole or not at all, and say where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(measured, indent=1) + "\n")
    temporary.replace(path)
    CONSOLE.print(f"written to {path}")


def table(comparison: Mapping[str, Any]) -> Table:
    """One comparison as a table."""
    facts, unit = comparison["examples"], comparison["unit"]
    title = (
        f"{comparison['method']} on {comparison['data']}, {comparison['precision']}, "
        f"{comparison['batch_size']} {unit} a step of {facts['shared_tokens']:.0f} tokens "
        f"({facts['padded_tokens']:.0f} padded)\n"
        f"{unit}/s: reference included; training: without it; scoring: its time over training's\n"
        "GiB: peak memory above the policy's weights; + att.: attention's own products counted too\n"
        f"limit: this machine on products of these sizes, {comparison['matrix_rate'] / 1e9:,.0f} GFLOP/s; "
        f"torch's own products reach {comparison['torch_matrix_rate'] / 1e9:,.0f}"
    )
    grid = Table(title=title)
    grid.add_column("")
    for heading in (f"{unit}/s", "×", "training", "×", "scoring", "GiB", "of limit", "+ att."):
        grid.add_column(heading, justify="right")
    rows = comparison["contestants"]
    base = next(iter(rows.values()))
    for name, row in rows.items():
        grid.add_row(
            name,
            f"{row['per_second']:.3f}",
            f"{row['per_second'] / base['per_second']:.1f}",
            f"{row['training_per_second']:.3f}",
            f"{row['training_per_second'] / base['training_per_second']:.1f}",
            f"{row['scoring_over_training']:.2f}",
            f"{row['peak_bytes_above_weights'] / 2**30:.2f}",
            f"{row['share_of_matrix_rate']:.0%}",
            f"{row['share_with_attention']:.0%}",
        )
    return grid
