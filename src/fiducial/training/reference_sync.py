"""Moves a synced reference every few optimizer steps, and proves each move."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError
from fiducial.model.scoring import Scorer
from fiducial.reference.kinds import Sync
from fiducial.reference.log_ratio import LogRatios
from fiducial.reference.moving import STATE_FILE, Follower, load_follower, save_follower
from fiducial.reference.sources import Reference
from fiducial.reference.verify import Proof, check_unmoved, prove_reference
from fiducial.run_record import Answers


@dataclass(frozen=True, slots=True)
class Move:
    """What was measured of one move, in nats a token."""

    step: int
    moved_before: float
    """How far the reference had strayed since the move before: nothing but a move may change it."""
    distance_to_policy: float
    """Largest difference left; rounding alone after an exact copy."""
    noise_floor: float
    log_ratio: LogRatios
    """Of the policy to the reference, right after the move."""


class ReferenceSync(TrainerCallback):
    """Every `sync.steps` steps the reference follows the policy; its weights are kept in checkpoints."""

    def __init__(
        self,
        sync: Sync,
        follower: Follower,
        policy: Scorer,
        reference: Reference,
        proof: Proof,
        groups: Sequence[TokenizedGroup],
        *,
        approximate: bool = False,
    ) -> None:
        """`reference` is the one that moves, and not what keeps its answers.

        Where it is `approximate`, held less exactly than the policy, not even a copy answers the same.
        """
        self.sync, self.follower = sync, follower
        self.policy, self.reference = policy, reference
        self.proof, self.groups = proof, groups
        self.moves: list[Move] = []
        self._copies_exactly = sync.copies and not approximate
        self._after_move: Callable[[int], None] | None = None

    def call_after_move(self, call: Callable[[int], None]) -> None:
        """Have `call(step)` told of every move, of the start, and of a resume: `step` is the last move's."""
        self._after_move = call

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The reference stands where its last move left it."""
        self._tell(state.global_step - state.global_step % self.sync.steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move, if it is time.

        Raises:
            TrainingError: the reference had changed by itself, or is not the policy after an exact copy.
        """
        if state.global_step % self.sync.steps == 0:
            strayed = check_unmoved(self.proof, self.policy, self.reference, self.groups)
            self.follower.move()
            self._prove(f"after the move at step {state.global_step}", equal=self._copies_exactly)
            proof = self.proof
            self.moves.append(
                Move(state.global_step, strayed, proof.max_difference, proof.noise.nats, proof.log_ratios)
            )
            self._tell(state.global_step)

    def resume(self, checkpoint: Path, then: Answers | None = None, weights: str = "") -> None:
        """Put the reference back to where it was when `checkpoint` was saved, and answered as `then`.

        `weights` is the hash it had, if known.

        Raises:
            TrainingError: the checkpoint does not hold it, or it answers differently now.
        """
        load_follower(self.follower, checkpoint, weights)
        self._prove("when the run was resumed", equal=False)
        known = {} if then is None else dict(zip(then.keys, then.logps, strict=True))
        keys = [key for group in self.groups for key in group.keys]
        if then is None or not known.keys() >= set(keys):  # other rows stand first now
            return
        before = torch.tensor([value for key in keys for value in known[key]])
        difference = (self.proof.reference_logps - before).abs().max().item()
        if not difference <= max(then.tolerance, self.proof.noise.tolerance(same_arithmetic=False)):
            raise TrainingError(
                f"the reference in {checkpoint} is not the one this run had moved to when that was saved: it "
                f"answers differently by up to {difference:.3g} nats a token. Put its {STATE_FILE} back, or "
                "name another checkpoint."
            )

    def save_files(self, folder: Path) -> None:
        """Keep the reference in a checkpoint's folder."""
        save_follower(self.follower, folder)

    def report(self) -> list[dict[str, Any]]:
        """The moves of this process, as plan.json holds them."""
        return [asdict(move) for move in self.moves]

    def _tell(self, step: int) -> None:
        if self._after_move is not None:
            self._after_move(step)

    def _prove(self, when: str, *, equal: bool) -> None:
        self.proof = prove_reference(
            self.policy,
            self.reference,
            self.groups,
            expected_equal=equal,
            when=when,
            known_noise=self.proof.noise.nats,
        )
