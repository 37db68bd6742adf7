"""Judges a trained policy against its reference on held-out data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError, ModelError
from fiducial.prepare import build_objective, load_policy, main_console, prove, read_run, score_ahead
from fiducial.reference.kept import written_at_the_end
from fiducial.training.arguments import training_arguments
from fiducial.training.budget import choose_token_budget
from fiducial.training.checkpoints import SHARDED_WEIGHTS, WHOLE_WEIGHTS
from fiducial.training.metrics import ASKED_FOR, METRICS
from fiducial.training.trainer import PreferenceTrainer, TrainingData


def evaluate(
    cfg: RunConfig | Mapping[str, Any],
    checkpoint: str | Path | None = None,
    *,
    console: Console | None = None,
) -> dict[str, float]:
    """Loss, rewards, accuracy, margins and KL of the policy in `checkpoint` on the run's evaluation data.

    Policy and reference are rebuilt as training builds them, and the reference is proved against the starting
    policy before the trained weights are loaded. Without `checkpoint` it is the run's output folder.

    Raises:
        ConfigError: the run has no evaluation data.
        ModelError: there is no trained model in `checkpoint`.
    """
    run = read_run(cfg, console or main_console())
    if run.data.evaluation is None or run.cfg.method is None:
        raise ConfigError("val_set_size, test_datasets: set one of them, or there is nothing to evaluate on.")
    folder = _trained(Path(checkpoint or run.cfg.output.output_dir))
    args = training_arguments(_offline(run.cfg), num_rows=len(run.data.train), has_evaluation=True)
    budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
    policy = load_policy(run, args.device, budget)
    store = score_ahead(run, policy, args.device)
    judged = prove(run, policy, store, args.device)
    trainer = PreferenceTrainer(
        policy.model,
        args,
        build_objective(run, policy, judged),
        TrainingData(run.data.train, run.data.evaluation),
        micro_batch_tokens=budget,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.load_weights(folder)
    with written_at_the_end(judged.reference):
        found = trainer.evaluate()
    metrics = {name: found[f"eval_{name}"] for name in (*METRICS, *ASKED_FOR) if f"eval_{name}" in found}
    run.console.print(
        _table(metrics, f"{folder} on {len(run.data.evaluation)} held-out {run.cfg.method.unit}s")
    )
    return metrics


def _trained(folder: Path) -> Path:
    if not any((folder / name).exists() for name in (*WHOLE_WEIGHTS, *SHARDED_WEIGHTS)):
        raise ModelError(f"{folder} holds no trained model: train the run first, or name its checkpoint.")
    return folder


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
