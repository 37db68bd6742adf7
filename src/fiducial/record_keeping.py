"""Keeps a run's record (`run.json`) in its output folder and in each of its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import torch
from transformers import TrainerCallback

from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.split import contents, in_order
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.precision import resolve_precision
from fiducial.policy_base import identify_base
from fiducial.prepare import Policy, ProvedReference, Run
from fiducial.processes import is_first_process
from fiducial.reference.verify import Proof
from fiducial.run_record import Answers, RunRecord, trained_by


class RecordKeeper(TrainerCallback):
    """Puts the record into every checkpoint, so that one that is moved away still knows its reference."""

    def __init__(
        self,
        record: RunRecord,
        moved: Callable[[], tuple[Answers | None, str]],
        running: Callable[[], Mapping[str, float]],
    ) -> None:
        self.record = record
        self.moved = moved
        """What a synced reference answers since its last move, and the hash of its weights."""
        self.running = running
        """What the loss carries to the next step."""

    def begin(self, folder: Path) -> None:
        """Write the record into the output folder, whose weights are an earlier run's if there are any."""
        self._now().beside_weights_of(trained_by(folder)).write(folder)

    def save_files(self, folder: Path) -> None:
        """Write the record as it stands at this moment, beside the policy's weights of this moment."""
        self._now().write(folder)

    def _now(self) -> RunRecord:
        moved, weights = self.moved()
        return replace(self.record, moved=moved, moved_weights=weights, running=dict(self.running()))


def record_of(run: Run, policy: Policy, judged: ProvedReference) -> RunRecord:
    """What is known of the run before step 1."""
    start = None if judged.proof is None else answers(judged.proof, judged.groups)
    reference = None if judged.identity is None else judged.identity.as_dict()
    base = policy.base
    if base is None and is_first_process():  # only that one writes the record
        base = identify_base(run.cfg, run.facts, run.plan, policy.scorer)
    own = (run.record.id if run.record is not None else "") or uuid4().hex
    return RunRecord(
        _decided(run.cfg, policy),
        run.settings,
        reference,
        start,
        base=None if base is None else base.as_dict(),
        trained_on=trained_on(run),
        held_out=held_out(run),
        id=own,
        trained_by=own,
    )


def trained_on(run: Run) -> str:
    """Hash of the training data in its order; empty where rows are streamed."""
    return in_order(run.data.train) if isinstance(run.data.train, TokenizedDataset) else ""


def held_out(run: Run) -> str | None:
    """Hash of what `val_set_size` keeps from training; None where it keeps nothing."""
    kept = run.data.evaluation if run.cfg.data is not None and run.cfg.data.val_set_size else None
    return None if kept is None else contents(kept)


def answers(proof: Proof, groups: Sequence[TokenizedGroup]) -> Answers:
    """What the reference of a proof answered on its groups, by content key."""
    keys = [key for group in groups for key in group.keys]
    lengths = [len(completion) for group in groups for completion in group.completions]
    logps = tuple(tuple(part.tolist()) for part in torch.split(proof.reference_logps, lengths))
    return Answers(tuple(keys), logps, proof.tolerance)


def _decided(cfg: RunConfig, policy: Policy) -> RunConfig:
    """The configuration with the precision that `auto` came to on this machine."""
    precision = resolve_precision(cfg, policy.scorer.device)
    names = {
        "dtype": str(precision.weights).removeprefix("torch."),
        "autocast": None if precision.autocast is None else str(precision.autocast).removeprefix("torch."),
    }
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=names)})
