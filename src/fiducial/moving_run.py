"""A run whose reference moves: what moves it, and what keeps the log-probs of each version."""

from dataclasses import dataclass, replace
from pathlib import Path

from fiducial.prepare import Policy, ProvedReference, Run
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.opening import OWN_FOLDER
from fiducial.reference.fill import warn
from fiducial.reference.kept import Kept
from fiducial.run_record import RunRecord, own_record
from fiducial.training.reference_sync import ReferenceSync
from fiducial.training.reference_window import ReferenceWindow
from fiducial.training.trainer import PreferenceTrainer


@dataclass(frozen=True, slots=True)
class Moving:
    """The parts that follow the policy while it trains."""

    sync: ReferenceSync
    window: ReferenceWindow | None
    """None where the loss reads more of the reference than can be kept."""
    record: RunRecord | None = None
    """What an earlier start of the run left in the checkpoint it goes on from."""

    def asked_by_trainer(self, judged: ProvedReference) -> ProvedReference:
        """What was proved, behind what keeps its answers."""
        return judged if self.window is None else replace(judged, reference=self.window.kept)

    def join(self, trainer: PreferenceTrainer, resume: Path | None) -> None:
        """Move with the trainer's steps; a resumed run goes on from where its reference was.

        Raises:
            TrainingError: the checkpoint does not hold the reference, or another one.
        """
        trainer.add_callback(self.sync)
        if (window := self.window) is not None:
            steps = self.sync.sync.steps
            self.sync.call_after_move(lambda step: window.open(trainer.asked(step, step + steps)))
        if resume is not None:
            own = own_record(self.record, resume)
            then = (None, "") if own is None else (own.moved, own.moved_weights)
            self.sync.resume(resume, *then)

    def close(self) -> None:
        """The run has ended well."""
        if self.window is not None:
            self.window.close()


def let_it_move(run: Run, policy: Policy, judged: ProvedReference) -> Moving | None:
    """What moves the reference, where the plan has it follow the policy; before weights are sharded."""
    if judged.follower is None:
        return None
    assert run.plan.sync is not None
    assert judged.proof is not None
    sync = ReferenceSync(
        run.plan.sync,
        judged.follower,
        policy.scorer,
        judged.reference,
        judged.proof,
        judged.groups,
        approximate=judged.approximation is not None,
    )
    return Moving(sync, _window(run, policy, judged) if run.plan.writes_through else None, run.record)


def _window(run: Run, policy: Policy, judged: ProvedReference) -> ReferenceWindow:
    def tell(sentence: str) -> None:
        warn(run.console, sentence)

    assert judged.follower is not None
    assert judged.identity is not None, "records are written through"
    folder = Path(run.cfg.output.output_dir) / OWN_FOLDER
    store = LogpStore(folder, judged.identity, tell=tell)
    return ReferenceWindow(
        Kept(judged.reference, policy.scorer, store, tell=tell),
        judged.follower,
        judged.identity,
        folder=folder,
        token_budget=policy.micro_batch_tokens,
        tell=tell,
    )
