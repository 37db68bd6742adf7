"""A run from its configuration to the aligned model: `train(cfg)`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from fiducial.agreement import lost_process_explained
from fiducial.assembly import METRICS_FILE, Assembled, assemble
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.model.adapters import REFERENCE_ADAPTER
from fiducial.model_card import write_model_card
from fiducial.offline import kept_to_cache
from fiducial.prepare import (
    Policy,
    ProvedReference,
    Run,
    load_policy,
    main_console,
    prove,
    read_run,
    score_ahead,
)
from fiducial.processes import is_first_process
from fiducial.reference.kept import measured, written_at_the_end
from fiducial.reference.kinds import ReferencePlan
from fiducial.reference.moving import MOVED_FOLDER, save_follower
from fiducial.reference.setup import setup_reference_model
from fiducial.reference.verify import check_unmoved
from fiducial.run_record import RECORD_FILE, find_record, require_resumable
from fiducial.run_report import PLAN_FILE, RunReport
from fiducial.training.arguments import check_settings, training_arguments, world_size
from fiducial.training.budget import choose_token_budget
from fiducial.training.callbacks import saved_micro_batch_tokens
from fiducial.training.checkpoints import Launch, full_disk_explained, to_resume
from fiducial.training.closing import closing_table, first_and_last
from fiducial.training.interruption import Interrupted, Interruption
from fiducial.training.loggers import close_loggers, reporting, require_loggers
from fiducial.training.meeting import before_they_meet
from fiducial.training.output_folder import keep_sources, make_output_folder, require_room
from fiducial.training.progress import ProgressBar
from fiducial.training.pushing import pushing_explained
from fiducial.training.reference_sync import ReferenceSync
from fiducial.training.trainer import PreferenceTrainer

__all__ = ["TrainResult", "preprocess", "setup_reference_model", "train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run leaves behind."""

    output_dir: Path
    metrics: dict[str, float]
    """The last value of every metric; those on held-out data begin with `eval_`."""
    plan: ReferencePlan
    record: dict[str, Any]
    """What plan.json holds: the plan, what was predicted and measured, the data's account, the proof."""


def train(cfg: RunConfig | Mapping[str, Any], *, console: Console | None = None) -> TrainResult:
    """Align a model as `cfg` says, in the keys of the YAML dialect or as a `RunConfig`.

    What a run says goes to `console`, the terminal by default; `rich.console.Console(quiet=True)` is silent.

    Raises:
        FiducialError: the user can mend it; the message says how.
        Interrupted: Ctrl-C; a checkpoint was saved, and the message says how to go on.
    """
    checked = validate_config(cfg)
    settings = None if isinstance(cfg, RunConfig) else dict(cfg)
    console = console or main_console()
    with kept_to_cache(checked, console):
        with before_they_meet(checked):
            require_loggers(checked.output.loggers)
            keep_sources(checked)
            check_settings(checked)
            make_output_folder(checked)
            resume = _checkpoint_to_resume(checked)
            run = replace(read_run(checked, console), settings=settings)
            require_room(checked, run.facts, resuming=resume is not None)
        return _run_to_its_end(run, resume)


def _run_to_its_end(run: Run, resume: Path | None) -> TrainResult:
    output_dir = Path(run.cfg.output.output_dir)
    args = _arguments(run, resuming=resume is not None)
    told, disk = reporting(run.cfg.output), full_disk_explained(output_dir, _launch(run.cfg))
    pushed = pushing_explained(run.cfg.output.hub_model_id)
    with told, disk, pushed, lost_process_explained(), _own_progress():
        resumed = None
        if resume is not None:
            run = replace(run, record=find_record(resume))
            resumed = saved_micro_batch_tokens(resume)
        budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device, resumed=resumed)
        report = RunReport(run, budget, args.device)
        if resume is not None:
            report.tell_resumed(resume)
        policy, judged = _load_and_prove(run, args, budget, report)
        assembled = assemble(run, policy, judged, args, resume)
        trainer, sync = assembled.trainer, assembled.sync
        with written_at_the_end(assembled.reference):
            _train(trainer, resume, run)
            _close_proof(policy, judged, sync, report)
            if run.data.evaluation is not None and not _evaluated_as_it_is(trainer):
                close_loggers(trainer)
                trainer.evaluate()
        assembled.close()
        report.add_measured(assembled.clock)
        report.tell_rows()
        metrics = _finish(assembled, policy, judged, report)
    return TrainResult(output_dir, metrics, run.plan, report.record)


def preprocess(cfg: RunConfig | Mapping[str, Any], *, console: Console | None = None) -> Run:
    """Tokenize and audit the data, and score the reference where the plan precomputes it."""
    checked, console = validate_config(cfg), console or main_console()
    with kept_to_cache(checked, console):
        with before_they_meet(checked):
            run = read_run(checked, console)
        run.data.audit.render(run.console)
        if run.precomputes:
            args = _arguments(run, resuming=False)
            with full_disk_explained(Path(run.cfg.output.output_dir), _launch(run.cfg)), _own_progress():
                budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
                score_ahead(run, load_policy(run, args.device, budget), args.device)
    return run


def _checkpoint_to_resume(cfg: RunConfig) -> Path | None:
    output = cfg.output
    found = to_resume(
        output.resume_from_checkpoint,
        auto=output.auto_resume,
        output_dir=Path(output.output_dir),
        launch=_launch(cfg),
    )
    if found is not None and (record := find_record(found)) is not None:
        require_resumable(found, record.run, cfg)
    return found


def _launch(cfg: RunConfig) -> Launch:
    return Launch(world_size(), sharded=cfg.distributed.fsdp_version is not None)


def _arguments(run: Run, *, resuming: bool) -> TrainingArguments:
    return training_arguments(
        run.cfg,
        num_rows=len(run.data.train),
        has_evaluation=run.data.evaluation is not None,
        resuming=resuming,
    )


def _load_and_prove(
    run: Run, args: TrainingArguments, budget: int, report: RunReport
) -> tuple[Policy, ProvedReference]:
    """Everything between the plan and step 1, told and timed."""
    with report.timed("loading"):
        policy = load_policy(run, args.device, budget)
    with report.timed("scoring"):
        ahead = score_ahead(run, policy, args.device)
    with report.timed("proof"):
        judged = prove(run, policy, ahead, args.device)
    report.tell_proof(policy, judged)
    report.write()
    return policy, judged


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


def _close_proof(
    policy: Policy, judged: ProvedReference, sync: ReferenceSync | None, report: RunReport
) -> None:
    """Check once more that the reference did not move by itself, and keep one that was moved.

    Raises:
        TrainingError: it has moved.
    """
    proof = judged.proof if sync is None else sync.proof
    moved = None
    if proof is not None:
        moved = check_unmoved(proof, policy.scorer, measured(judged.reference), judged.groups)
    report.add_end(sync, moved)
    if sync is not None and is_first_process():
        save_follower(sync.follower, report.folder / MOVED_FOLDER)


def _finish(
    assembled: Assembled, policy: Policy, judged: ProvedReference, report: RunReport
) -> dict[str, float]:
    """Save what the run leaves behind, and tell how it ended."""
    trainer, run, output_dir = assembled.trainer, report.run, report.folder
    assert run.cfg.method is not None
    policy.scorer.restore_attention()
    _save(trainer, output_dir)
    metrics = {name: last for name, (_, last) in first_and_last(trainer.state.log_history).items()}
    if trainer.is_world_process_zero():
        assembled.keeper.save_files(output_dir)
        report.write()
        sentence = None if judged.proof is None else judged.proof.sentence()
        write_model_card(output_dir, run.cfg, run.plan, metrics, proof=sentence)
    run.console.print(closing_table(trainer.state.log_history, report.record, unit=run.cfg.method.unit))
    run.console.print(
        f"Model, tokenizer, {METRICS_FILE}, {PLAN_FILE}, {RECORD_FILE} and model card: {output_dir}",
        soft_wrap=True,
    )
    return metrics


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
