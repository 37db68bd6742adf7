"""What a run would do and why, as data and as a page of text. Loads no weights and imports no torch."""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fiducial.config.schema import DatasetConfig, RunConfig
from fiducial.config.template_names import text_of
from fiducial.data.formats import require_known_types
from fiducial.hub import is_hub_name
from fiducial.reference.alternatives import alternatives, relative_time
from fiducial.reference.cache.known import known_records
from fiducial.reference.facts import Facts, ModelFacts, gather_facts
from fiducial.reference.kinds import ReferencePlan
from fiducial.reference.list_lengths import assumed_lists
from fiducial.reference.memory import (
    LARGEST_BUDGET,
    MemoryEstimate,
    auto_token_budget,
    estimate_memory,
    longest_group,
)
from fiducial.reference.plan import plan_reference
from fiducial.reference.precision import sees_gpu
from fiducial.reference.row_counts import DataCounts, count_data

Report = dict[str, Any]


def plan_run(cfg: RunConfig) -> Report:
    """Everything `fiducial plan` says of a run.

    Raises:
        ConfigError: the type of a dataset is no format's name, or a chat template's file is not there.
        ModelError: a checkpoint cannot be used.
        PlanError: the reference that was asked for would not be the one the loss needs.
    """
    if cfg.data is not None:
        require_known_types(cfg.data)
    if cfg.tokenizer.chat_template_jinja is not None:
        text_of(cfg.tokenizer.chat_template_jinja)
    facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    lists, budget = assumed_lists(cfg), _token_budget(cfg, facts, plan)
    memory = estimate_memory(cfg, facts, plan, budget, longest=longest_group(cfg, lists.completions))
    report = plan_report(cfg, facts, plan, memory, count_data(cfg))
    report["memory"]["assumes"] = lists.sentence
    return report


def plan_report(
    cfg: RunConfig, facts: Facts, plan: ReferencePlan, memory: MemoryEstimate, data_counts: DataCounts
) -> Report:
    """The plan as plain values, ready for JSON."""
    time = relative_time(cfg, facts, plan)
    return {
        "reference": _reference(plan) | {"cached_records": known_records(cfg, plan)},
        "model": _model(facts.model, cfg),
        "method": _method(cfg),
        "memory": _memory(cfg, memory),
        "predicted": {
            "peak_bytes": memory.peak,
            "relative_time": time,
            "scoring_share": 1 - 1 / time,
        },
        "alternatives": [
            asdict(each)
            for each in alternatives(cfg, facts, plan, memory.token_budget, longest=memory.longest)
        ],
        "data": _data(cfg, data_counts),
        "batch": _batch(cfg, data_counts),
    }


def render_plan(report: Report, console: Console) -> None:
    """Print the report, readable from 80 columns on."""
    console.print(_reference_panel(report["reference"], report["memory"]["held"]))
    console.print(_facts_table(report))
    console.print(_memory_table(report["memory"]))
    if len(report["alternatives"]) > 1:
        console.print(_alternatives_table(report["alternatives"]))


def _token_budget(cfg: RunConfig, facts: Facts, plan: ReferencePlan) -> int:
    """The run's token budget; for `auto` what this machine's free memory allows, or the most on a GPU."""
    if cfg.optimization.micro_batch_tokens != "auto":
        return cfg.optimization.micro_batch_tokens
    if sees_gpu():
        return LARGEST_BUDGET["gpu"]
    fixed = estimate_memory(cfg, facts, plan, 0).at("training")
    return auto_token_budget(max(psutil.virtual_memory().available - fixed, 0), facts, cfg)


def _reference(plan: ReferencePlan) -> Report:
    checkpoint = plan.checkpoint
    return {
        "source": str(plan.source),
        "schedule": str(plan.schedule) if plan.schedule else None,
        "checkpoint": checkpoint
        and {
            "path": checkpoint.path,
            "revision": checkpoint.revision,
            "adapter": checkpoint.adapter,
            "endpoint": checkpoint.endpoint,
        },
        "equals_starting_policy": plan.equals_starting_policy,
        "approximate": plan.approximate,
        "shared_layers": plan.shared_layers,
        "gathered_once": plan.gathered_once,
        "frozen_held_once": plan.frozen_held_once,
        "why": plan.why,
        "notes": list(plan.notes),
    }


def _model(model: ModelFacts, cfg: RunConfig) -> Report:
    return {
        "path": model.location,
        "revision": cfg.model.revision,
        "architecture": model.architecture,
        "parameters": model.num_parameters,
        "parameters_are_exact": model.shapes_are_exact,
        "stored_dtype": model.dtype,
        "adapter": cfg.adapter and (cfg.adapter.path or f"new, rank {cfg.adapter.r}"),
    }


def _method(cfg: RunConfig) -> Report | None:
    if cfg.method is None:
        return None
    method = cfg.method
    return {"name": method.title, "paper": method.paper, "hyperparameters": method.hyperparameters}


def _memory(cfg: RunConfig, memory: MemoryEstimate) -> Report:
    return {
        "token_budget": memory.token_budget,
        "token_budget_is_auto": cfg.optimization.micro_batch_tokens == "auto",
        "parts": [
            {"name": part.name, "bytes": part.bytes, "when": part.when, "on_cpu": part.on_cpu}
            for part in memory.parts
        ],
        "scoring_bytes": memory.at("scoring"),
        "training_bytes": memory.at("training"),
        "peak_bytes": memory.peak,
        "held": list(memory.held),
        "assumes": None,
        "caveat": memory.caveat,
    }


def _data(cfg: RunConfig, counts: DataCounts) -> Report | None:
    if cfg.data is None:
        return None

    def entries(configs: tuple[DatasetConfig, ...], rows: tuple[int | None, ...]) -> list[Report]:
        return [
            {"path": config.path, "type": config.type, "split": config.split, "rows": number}
            for config, number in zip(configs, rows, strict=True)
        ]

    return {
        "datasets": entries(cfg.data.datasets, counts.datasets),
        "test_datasets": entries(cfg.data.test_datasets, counts.test_datasets),
        "rows": counts.training,
        "groups": counts.groups,
        "held_out": _held_out(cfg, counts),
        "sequence_len": cfg.data.sequence_len,
        "streaming": cfg.data.streaming,
    }


def _held_out(cfg: RunConfig, counts: DataCounts) -> int | None:
    """Rows set aside by `val_set_size`, before odd rows are dropped."""
    if cfg.data is None or counts.training is None:
        return None
    size = cfg.data.val_set_size
    return round(size * counts.training) if size < 1 else int(size)


def _batch(cfg: RunConfig, counts: DataCounts) -> Report:
    settings = cfg.optimization
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    groups = settings.groups_per_step * processes
    per_epoch = _steps_per_epoch(counts, _held_out(cfg, counts), groups)
    epochs = None if per_epoch is None else math.ceil(per_epoch * settings.num_epochs)
    return {
        "unit": cfg.method.unit if cfg.method else "group",
        "groups_per_step": groups,
        "processes": processes,
        "steps_per_epoch": per_epoch,
        "epochs": settings.num_epochs,
        "steps": settings.max_steps or epochs,
    }


def _steps_per_epoch(counts: DataCounts, held_out: int | None, groups_per_step: int) -> int | None:
    if not counts.training or counts.groups is None or held_out is None:
        return None
    # Rows are set aside before pairs are taken apart.
    share = 1 - held_out / counts.training
    return math.ceil(round(counts.groups * share, 6) / groups_per_step)


def _reference_panel(reference: Report, held: list[str]) -> Panel:
    lines: list[RenderableType] = [Text(reference["why"]), Text("")]
    lines += [Text(f"{line[0].upper()}{line[1:]}.") for line in held]
    if reference["cached_records"]:
        lines.append(Text(f"{reference['cached_records']:,} completions of it are in the cache already."))
    lines += [Text(f"Note: {note}", style="yellow") for note in reference["notes"]]
    title = Text.assemble("Reference: ", (reference["source"], "bold green"))
    if reference["schedule"]:
        title.append(f", {reference['schedule']}")
    return Panel(Group(*lines), title=title, title_align="left", box=box.ROUNDED, padding=(0, 1))


def _facts_table(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    model, method, batch = report["model"], report["method"], report["batch"]
    about = "" if model["parameters_are_exact"] else "about "
    kind = f"{model['architecture'] or 'unknown architecture'}, {about}{model['parameters']:,} parameters"
    table.add_row("Model", Text(f"{model['path']} ({kind})"))
    if model["adapter"]:
        table.add_row("Adapter", Text(str(model["adapter"])))
    if method:
        settings = ", ".join(f"{key} {value}" for key, value in method["hyperparameters"].items())
        table.add_row("Method", Text(f"{method['name']} ({settings})"))
    for dataset in (report["data"] or {}).get("datasets", []):
        streamed = ", streamed" if report["data"]["streaming"] else ""
        table.add_row("Data", Text(f"{_dataset_line(dataset)}{streamed}"))
    for dataset in (report["data"] or {}).get("test_datasets", []):
        table.add_row("Evaluation", Text(_dataset_line(dataset)))
    if report["data"] and report["data"]["held_out"]:
        table.add_row("Held out", Text(f"{report['data']['held_out']:,} rows"))
    if report["data"] and report["data"]["groups"] != report["data"]["rows"]:
        apart = f"each pair is taken apart: {report['data']['groups']:,} completions of all rows"
        table.add_row("", Text(apart))
    table.add_row("Batch", Text(_batch_line(batch)))
    return table


def _dataset_line(dataset: Report) -> str:
    rows = "counted when loaded" if dataset["rows"] is None else f"{dataset['rows']:,} rows"
    if _is_missing(dataset["path"]):
        rows = "not there"
    split = f", {dataset['split']}" if dataset["split"] else ""
    return f"{dataset['path']}{split}: {rows}"


def _is_missing(path: str) -> bool:
    return "://" not in path and not is_hub_name(path) and not Path(path).expanduser().exists()


def _batch_line(batch: Report) -> str:
    spread = f" on {batch['processes']} processes" if batch["processes"] > 1 else ""
    groups = batch["groups_per_step"]
    line = f"{groups} {batch['unit']}{'' if groups == 1 else 's'} per optimizer step{spread}"
    if batch["steps_per_epoch"] is not None:
        line += f", about {batch['steps_per_epoch']:,} steps per epoch"
    if batch["steps"] is not None:
        line += f", {batch['steps']:,} steps in all"
    return line


def _memory_table(memory: Report) -> Table:
    auto = " (auto)" if memory["token_budget_is_auto"] else ""
    table = Table(
        title=Text(f"Estimated memory with {memory['token_budget']:,} tokens a pass{auto}", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=True,
        caption="\n".join(filter(None, (memory["assumes"], memory["caveat"]))) or None,
        caption_justify="left",
    )
    table.add_column("", footer="peak")
    table.add_column("held", footer="")
    table.add_column("bytes", footer=readable_size(memory["peak_bytes"]), justify="right")
    for part in memory["parts"]:
        when = f"{part['when']}, on the CPU" if part["on_cpu"] else part["when"]
        table.add_row(Text(part["name"]), when, readable_size(part["bytes"]))
    return table


def _alternatives_table(rows: list[Report]) -> Table:
    table = Table(
        title=Text("Plans with this same reference (time: training without one is 1)", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("", "source", "schedule"):
        table.add_column(heading)
    for heading in ("peak memory", "time"):
        table.add_column(heading, justify="right")
    for row in rows:
        mark, style = ("→", "bold green") if row["chosen"] else ("", "")
        time = f"{row['relative_time']:.2f}"
        table.add_row(
            mark, row["source"], row["schedule"], readable_size(row["peak_bytes"]), time, style=style
        )
    return table


def readable_size(number: int) -> str:
    """Bytes for people, in the largest unit that they reach."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
