"""A run from its configuration to the aligned model: `train(cfg)`."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from fiducial.agreement import lost_process_explained
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.model.adapters import REFERENCE_ADAPTER
from fiducial.model_card import write_model_card
from fiducial.moving_run import let_it_move
from fiducial.prepare import (
    Policy,
    ProvedReference,
    Run,
    build_objective,
    load_policy,
    main_console,
    prove,
    read_run,
    score_ahead,
)
from fiducial.reference.describe import plan_report, render_plan
from fiducial.reference.kept import measured, written_at_the_end
from fiducial.reference.kinds import ReferencePlan
from fiducial.reference.memory import estimate_memory
from fiducial.reference.row_counts import count_data
from fiducial.reference.setup import setup_reference_model
from fiducial.reference.verify import check_unmoved
from fiducial.training.arguments import setting_callbacks, training_arguments, world_size
from fiducial.training.budget import choose_token_budget
from fiducial.training.callbacks import (
    Interrupted,
    Interruption,
    LastEvaluation,
    MetricsFile,
    saved_micro_batch_tokens,
)
from fiducial.training.checkpoints import Launch, full_disk_explained, to_resume
from fiducial.training.closing import closing_table, first_and_last
from fiducial.training.loggers import close_loggers, reporting, require_loggers
from fiducial.training.metrics import peak_memory
from fiducial.training.progress import ProgressBar
from fiducial.training.trainer import PreferenceTrainer, TrainingData

__all__ = ["TrainResult", "preprocess", "setup_reference_model", "train"]

METRICS_FILE = "metrics.jsonl"
PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind."""

    output_dir: Path
    metrics: dict[str, float]
    """The last value of every metric; those on held-out data begin with `eval_`."""
    plan: ReferencePlan
    record: dict[str, Any]
    """What plan.json holds: the plan, the predicted and measured memory, the data's account, the proof."""


def train(cfg: RunConfig | Mapping[str, Any], *, console: Console | None = None) -> TrainResult:
    """Align a model as `cfg` says, in the keys of the YAML dialect or as a `RunConfig`.

    Raises:
        FiducialError: the user can mend it; the message says how.
        Interrupted: Ctrl-C; a checkpoint was saved, and the message says how to go on.
    """
    checked = validate_config(cfg)
    require_loggers(checked.output.loggers)
    run = read_run(checked, console or main_console())
    output_dir = Path(run.cfg.output.output_dir)
    resume = _checkpoint_to_resume(run.cfg)
    args = _arguments(run, resuming=resume is not None)
    told, disk = reporting(run.cfg.output), full_disk_explained(output_dir, _launch(run.cfg))
    with told, disk, lost_process_explained(), _own_progress():
        resumed = saved_micro_batch_tokens(resume) if resume is not None else None
        budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device, resumed=resumed)
        record = _announce(run, budget)
        record["memory"] |= {"held_before_loading_bytes": peak_memory(args.device)}
        policy = load_policy(run, args.device, budget)
        store = score_ahead(run, policy, args.device)
        judged = prove(run, policy, store, args.device)
        _tell(run, policy, judged, record)
        _write_record(output_dir, record)
        moving = let_it_move(run, policy, judged)
        judged = judged if moving is None else moving.asked_by_trainer(judged)
        trainer = _build_trainer(run, policy, judged, args)
        if moving is not None:
            moving.join(trainer, resume)
        with written_at_the_end(judged.reference):
            _train(trainer, resume, run)
            if moving is not None:
                judged = replace(judged, proof=moving.sync.proof)
                record["proof"] |= {"moves": moving.sync.report()}
            metrics = _finish(trainer, run, policy, judged, record)
        if moving is not None:
            moving.close()
    return TrainResult(output_dir, metrics, run.plan, record)


def preprocess(cfg: RunConfig | Mapping[str, Any], *, console: Console | None = None) -> Run:
    """Tokenize and audit the data, and score the reference where the plan precomputes it."""
    run = read_run(cfg, console or main_console())
    run.data.audit.render(run.console)
    if run.precomputes:
        args = _arguments(run, resuming=False)
        with full_disk_explained(Path(run.cfg.output.output_dir), _launch(run.cfg)), _own_progress():
            budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
            score_ahead(run, load_policy(run, args.device, budget), args.device)
    return run


def _checkpoint_to_resume(cfg: RunConfig) -> Path | None:
    output = cfg.output
    return to_resume(
        output.resume_from_checkpoint,
        auto=output.auto_resume,
        output_dir=Path(output.output_dir),
        launch=_launch(cfg),
    )


def _launch(cfg: RunConfig) -> Launch:
    return Launch(world_size(), sharded=cfg.distributed.fsdp_version is not None)


def _arguments(run: Run, *, resuming: bool) -> TrainingArguments:
    return training_arguments(
        run.cfg,
        num_rows=len(run.data.train),
        has_evaluation=run.data.evaluation is not None,
        resuming=resuming,
    )


def _announce(run: Run, budget: int) -> dict[str, Any]:
    """Print the plan and the data's account; returns them as what plan.json will hold."""
    memory = estimate_memory(run.cfg, run.facts, run.plan, budget)
    report = plan_report(run.cfg, run.facts, run.plan, memory, count_data(run.cfg))
    render_plan(report, run.console)
    run.data.audit.render(run.console)
    return report | {"audit": run.data.audit.as_dict()}


def _tell(run: Run, policy: Policy, judged: ProvedReference, record: dict[str, Any]) -> None:
    """Print and record the layout and the proof."""
    record["layout"] = {"layout": policy.layout.layout, "why": policy.layout.why}
    record["proof"] = _proof(judged)
    run.console.print(f"Layout: {policy.layout.layout}. {policy.layout.why}", soft_wrap=True)
    if (sentence := _proof_sentence(judged)) is not None:
        run.console.print(sentence, soft_wrap=True)


def _build_trainer(
    run: Run, policy: Policy, judged: ProvedReference, args: TrainingArguments
) -> PreferenceTrainer:
    assert run.cfg.method is not None
    assert run.cfg.data is not None
    trainer = PreferenceTrainer(
        policy.model,
        args,
        build_objective(run, policy, judged),
        TrainingData(run.data.train, run.data.evaluation, run.cfg.data.shuffle),
        micro_batch_tokens=policy.micro_batch_tokens,
        tokenizer=run.tokenizer,
        callbacks=[
            MetricsFile(Path(run.cfg.output.output_dir) / METRICS_FILE),
            *setting_callbacks(run.cfg),
            *([LastEvaluation()] if run.data.evaluation is not None else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: PreferenceTrainer, resume: Path | None, run: Run) -> None:
    """Train; stop where a signal asks for it, saying how to go on."""
    interruption, bar = Interruption(), ProgressBar(run.console)
    trainer.add_callback(interruption)
    trainer.add_callback(bar)
    try:
        trainer.train(str(resume) if resume is not None else None)
    finally:
        interruption.release()
        bar.close()
    if interruption.stopped_at is not None and interruption.stopped_at < trainer.state.max_steps:
        raise Interrupted(
            f"Stopped after step {interruption.stopped_at} of {trainer.state.max_steps}. The checkpoint is "
            f"in {run.cfg.output.output_dir}; go on with auto_resume_from_checkpoints: true."
        )


def _finish(
    trainer: PreferenceTrainer, run: Run, policy: Policy, judged: ProvedReference, record: dict[str, Any]
) -> dict[str, float]:
    """Check the reference once more, evaluate, and save what the run leaves behind."""
    assert run.cfg.method is not None
    output_dir = Path(run.cfg.output.output_dir)
    if judged.proof is not None:
        moved = check_unmoved(judged.proof, policy.scorer, measured(judged.reference), judged.groups)
        record["proof"] |= {"moved_while_training": moved}
    if run.data.evaluation is not None and not _evaluated_as_it_is(trainer):
        close_loggers(trainer)
        trainer.evaluate()
    used = peak_memory(trainer.args.device) - record["memory"]["held_before_loading_bytes"]
    record["memory"] |= {"measured_peak_bytes": used}
    _tell_what_was_read(run, record)
    policy.scorer.restore_attention()
    _save(trainer, output_dir)
    metrics = {name: last for name, (_, last) in first_and_last(trainer.state.log_history).items()}
    if trainer.is_world_process_zero():
        _write_record(output_dir, record)
        write_model_card(output_dir, run.cfg, run.plan, metrics, proof=_proof_sentence(judged))
    run.console.print(closing_table(trainer.state.log_history, record["memory"], unit=run.cfg.method.unit))
    run.console.print(
        f"Model, tokenizer, {METRICS_FILE}, {PLAN_FILE} and model card: {output_dir}", soft_wrap=True
    )
    return metrics


def _tell_what_was_read(run: Run, record: dict[str, Any]) -> None:
    """Record the account of streamed rows, which went on while training, and print what is new in it."""
    account = run.data.account()
    record["audit"] = account.as_dict()
    if account.summary() != run.data.audit.summary():
        account.render(run.console)


def _evaluated_as_it_is(trainer: PreferenceTrainer) -> bool:
    """Whether the last evaluation was of the weights the model holds now."""
    evaluated = [log["step"] for log in trainer.state.log_history if "eval_loss" in log]
    best = trainer.args.load_best_model_at_end
    return bool(evaluated) and evaluated[-1] == trainer.state.global_step and not best


def _save(trainer: PreferenceTrainer, output_dir: Path) -> None:
    """The model (or only its adapter) and the tokenizer, as `from_pretrained` reads them."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)
    if trainer.is_fsdp_enabled:
        # Checkpoints may be sharded; from shards alone transformers would save no model here.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(output_dir))
    # A pickle of the arguments, which nothing here reads: a model folder should hold none.
    (output_dir / "training_args.bin").unlink(missing_ok=True)


def _proof(judged: ProvedReference) -> dict[str, Any]:
    proof = judged.proof
    if proof is None:
        return {}
    return {
        "max_difference": proof.max_difference,
        "mean_difference": proof.mean_difference,
        "noise_floor": proof.noise_floor,
        "tolerance": proof.tolerance,
        "num_tokens": proof.num_tokens,
    }


def _proof_sentence(judged: ProvedReference) -> str | None:
    proof = judged.proof
    if proof is None:
        return None
    return (
        f"Before step 1 policy and reference differed by at most {proof.max_difference:.2g} nats a token on "
        f"{proof.num_tokens} tokens (up to {proof.tolerance:.1g} is rounding)."
    )


def _write_record(output_dir: Path, record: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    temporary = output_dir / f"{PLAN_FILE}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(output_dir / PLAN_FILE)


@contextmanager
def _own_progress() -> Iterator[None]:
    """Transformers' bars would tear ours apart."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
