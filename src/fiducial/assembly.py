"""What trains a proved run: the trainer, what it asks for the reference's log-probs, and what watches it."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fiducial.moving_run import Moving, let_it_move
from fiducial.prepare import Policy, ProvedReference, Run, build_objective
from fiducial.processes import is_first_process
from fiducial.record_keeping import RecordKeeper, answers, record_of
from fiducial.reference.kept import Kept
from fiducial.reference.moving import state_digest
from fiducial.reference.sources import Reference
from fiducial.run_record import Answers
from fiducial.training.arguments import setting_callbacks
from fiducial.training.callbacks import LastEvaluation, MetricsFile, SavableGeneration
from fiducial.training.kept_records import KeptRecords
from fiducial.training.reference_sync import ReferenceSync
from fiducial.training.step_clock import StepClock, TimedReference
from fiducial.training.trainer import PreferenceTrainer, TrainingData

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Assembled:
    """A run whose next step is step 1, or the one after its checkpoint."""

    trainer: PreferenceTrainer
    reference: Reference
    """What the trainer asks, before it is timed."""
    clock: StepClock
    moving: Moving | None
    """None where the reference stands still."""
    keeper: RecordKeeper

    @property
    def sync(self) -> ReferenceSync | None:
        """What moves the reference, where something does."""
        return None if self.moving is None else self.moving.sync

    def close(self) -> None:
        """The run has ended well."""
        if self.moving is not None:
            self.moving.close()


def assemble(
    run: Run, policy: Policy, judged: ProvedReference, args: TrainingArguments, resume: Path | None
) -> Assembled:
    """Put the run's trainer and its callbacks together; before weights are sharded.

    Raises:
        TrainingError: the checkpoint `resume` does not hold the reference that had moved.
    """
    moving = let_it_move(run, policy, judged)
    asked = judged if moving is None else moving.asked_by_trainer(judged)
    timed = TimedReference(asked.reference, args.device)
    trainer = _build_trainer(run, policy, replace(asked, reference=timed), args)
    if moving is not None:
        moving.join(trainer, resume)
    if isinstance(asked.reference, Kept):
        trainer.add_callback(KeptRecords(asked.reference))
    keeper = _record_keeper(run, policy, judged, trainer, None if moving is None else moving.sync)
    assembled = Assembled(trainer, asked.reference, StepClock(timed), moving, keeper)
    trainer.add_callback(keeper)
    trainer.add_callback(assembled.clock)
    return assembled


def _build_trainer(
    run: Run, policy: Policy, asked: ProvedReference, args: TrainingArguments
) -> PreferenceTrainer:
    assert run.cfg.method is not None
    assert run.cfg.data is not None
    trainer = PreferenceTrainer(
        policy.model,
        args,
        build_objective(run, policy, asked),
        TrainingData(run.data.train, run.data.evaluation, run.cfg.data.shuffle),
        micro_batch_tokens=policy.micro_batch_tokens,
        tokenizer=run.tokenizer,
        callbacks=[
            MetricsFile(Path(run.cfg.output.output_dir) / METRICS_FILE),
            *setting_callbacks(run.cfg),
            *([LastEvaluation()] if run.data.evaluation is not None else []),
            *([SavableGeneration(policy.model, run.cfg.model.base_model)] if run.cfg.adapter is None else []),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _record_keeper(
    run: Run, policy: Policy, judged: ProvedReference, trainer: PreferenceTrainer, sync: ReferenceSync | None
) -> RecordKeeper:
    """What keeps the run's record in checkpoints; it is in the output folder from now on."""

    def moved() -> tuple[Answers | None, str]:
        if sync is None:
            return None, ""
        return answers(sync.proof, sync.groups), state_digest(sync.follower.state())

    keeper = RecordKeeper(record_of(run, policy, judged), moved, lambda: trainer.objective.running)
    if is_first_process():
        keeper.begin(Path(run.cfg.output.output_dir))
    return keeper
