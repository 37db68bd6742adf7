"""Judges a trained policy against its reference, on held-out data or on any other."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError, DataError
from fiducial.finished import FinishedRun, from_config, require_fits
from fiducial.model.trained_adapter import require_same_settings
from fiducial.offline import kept_to_cache
from fiducial.prepare import (
    ProvedReference,
    Run,
    build_objective,
    load_policy,
    main_console,
    prove,
    read_run,
    score_ahead,
)
from fiducial.record_keeping import held_out
from fiducial.reference.fill import warn
from fiducial.reference.kept import written_at_the_end
from fiducial.reference.kinds import Source
from fiducial.reference.moving import load_moved
from fiducial.run_record import moved_weights, no_record_note
from fiducial.training.arguments import training_arguments
from fiducial.training.budget import choose_token_budget
from fiducial.training.meeting import before_they_meet
from fiducial.training.metrics import ASKED_FOR, METRICS
from fiducial.training.trainer import PreferenceTrainer, TrainingData

_COMPARED_WITH_START = (
    "the reference had moved while this run trained (reference.schedule: synced then), and stands still in "
    "these settings: the policy is compared with what training began from."
)


def evaluate(
    cfg: RunConfig | Mapping[str, Any],
    checkpoint: str | Path | None = None,
    *,
    console: Console | None = None,
) -> dict[str, float]:
    """Loss, rewards, accuracy, margins and KL of the policy in `checkpoint` on the run's evaluation data.

    Without `checkpoint` it is the run's output folder.

    Raises:
        ConfigError: the run has no evaluation data.
        DataError: what is held out now was not kept from training.
        ModelError: there is no trained model in `checkpoint`, or its reference is not what it was.
    """
    folder = None if checkpoint is None else Path(checkpoint)
    return evaluate_finished(from_config(validate_config(cfg), folder), console=console)


def evaluate_finished(finished: FinishedRun, *, console: Console | None = None) -> dict[str, float]:
    """As `evaluate`, of a run found from its folder.

    Policy and reference are rebuilt as training built them: the starting policy is loaded to be scored and
    proved, and the trained weights then take its place. So full fine-tuning has its reference again, and no
    more than one model is held. Only what is evaluated is scored.
    """
    cfg = _with_evaluation_alone(finished.cfg, new_data=finished.new_data)
    console = console or main_console()
    with kept_to_cache(cfg, console):
        with before_they_meet(cfg):
            run = replace(read_run(cfg, console, trains=False), record=finished.record)
        if finished.record is None and run.plan.source is not Source.NONE:
            warn(console, no_record_note(finished.folder))
        if finished.record is not None and finished.record.moved is not None and run.plan.sync is None:
            warn(console, _COMPARED_WITH_START)
        return _evaluate(run, finished.folder)


def _evaluate(run: Run, folder: Path) -> dict[str, float]:
    evaluation = run.data.evaluation
    if evaluation is None or run.cfg.method is None:
        raise ConfigError(
            "val_set_size, test_datasets: set one of them, or there is nothing to evaluate on. Other pairs "
            "are named as datasets.0.path=pairs.jsonl behind the run's folder."
        )
    _require_held_out(run)
    require_fits(folder, run.cfg, run.facts)
    args = training_arguments(_offline(run.cfg), num_rows=len(run.data.train), has_evaluation=True)
    budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
    policy = load_policy(run, args.device, budget)
    if isinstance(policy.model, PeftModel):
        require_same_settings(policy.model, folder)
    ahead = score_ahead(run, policy, args.device, datasets={"evaluation": evaluation})
    judged = prove(run, policy, ahead, args.device, on=evaluation)
    objective = build_objective(run, policy, judged)
    if run.record is not None:  # another loss than was trained carries nothing
        objective.running |= {
            name: run.record.running[name] for name in objective.running.keys() & run.record.running.keys()
        }
    trainer = PreferenceTrainer(
        policy.model,
        args,
        objective,
        TrainingData(run.data.train, evaluation),
        micro_batch_tokens=budget,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.load_weights(folder)
    _move_reference(run, judged, folder)
    with written_at_the_end(judged.reference):
        found = trainer.evaluate()
    metrics = {name: found[f"eval_{name}"] for name in (*METRICS, *ASKED_FOR) if f"eval_{name}" in found}
    title = f"{folder} on {len(evaluation)} {run.cfg.method.unit}s"
    run.console.print(_table(metrics, title))
    return metrics


def _require_held_out(run: Run) -> None:
    """Raise `DataError` where `val_set_size` does not hold out what it kept from training."""
    if run.record is not None and run.record.held_out_others(held_out(run)):
        raise DataError(
            "val_set_size: what it holds out now is not what was kept from this training, so some of it was "
            "trained on: the rows, their number, or how they are read has changed since. Put that back, or "
            "name the pairs to evaluate on (datasets.0.path=pairs.jsonl behind the run's folder)."
        )


def _with_evaluation_alone(cfg: RunConfig, *, new_data: bool) -> RunConfig:
    """The run with nothing to train on but what it is evaluated on, where that is named by itself.

    A part held out of the training data is found again only by reading that.
    """
    if cfg.data is None:
        return cfg
    pairs = cfg.data.datasets if new_data else cfg.data.test_datasets
    if not pairs:
        return cfg
    data = cfg.data.model_copy(update={"datasets": pairs, "test_datasets": pairs, "val_set_size": 0.0})
    return cfg.model_copy(update={"data": data})


def _move_reference(run: Run, judged: ProvedReference, folder: Path) -> None:
    """Put a synced reference where it was when `folder` was written."""
    if judged.follower is not None:
        load_moved(judged.follower, folder, moved_weights(run.record, folder))
        run.console.print("The reference is the one that training had moved to.")


def _offline(cfg: RunConfig) -> RunConfig:
    """The run without loggers and hub: an evaluation is not another run of theirs."""
    return cfg.model_copy(
        update={"output": cfg.output.model_copy(update={"loggers": (), "hub_model_id": None})}
    )


def _table(metrics: Mapping[str, float], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4g}")
    return table
