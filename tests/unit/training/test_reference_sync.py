"""A reference that follows the policy is looked at before each move, and after it."""

from types import SimpleNamespace

import pytest
import torch

from fiducial.errors import TrainingError
from fiducial.model.scoring import Scorer
from fiducial.reference.kinds import Sync
from fiducial.reference.sources import SeparateModel
from fiducial.reference.verify import prove_reference
from fiducial.training.reference_sync import ReferenceSync
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)


def nudge(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)


class Follower:
    """Copies the policy's weights, if it works."""

    def __init__(self, policy: torch.nn.Module, model: torch.nn.Module, *, works: bool) -> None:
        self.policy, self.model, self.works = policy, model, works
        self.asked = 0

    def move(self) -> None:
        self.asked += 1
        if self.works:
            self.model.load_state_dict(self.policy.state_dict())


def synced(*, works: bool = True) -> ReferenceSync:
    policy, reference = (
        Scorer(tiny_model(), layout="packed"),
        SeparateModel(Scorer(tiny_model(), layout="packed")),
    )
    proof = prove_reference(policy, reference, GROUPS, expected_equal=True)
    follower = Follower(policy.model, reference.scorer.model, works=works)
    return ReferenceSync(Sync(2, 1.0), follower, policy, reference, proof, GROUPS)


def step(sync: ReferenceSync, number: int) -> None:
    sync.on_step_end(None, SimpleNamespace(global_step=number), None)


def test_it_moves_every_so_many_steps_and_tells_of_it() -> None:
    sync, told = synced(), []
    sync.call_after_move(told.append)
    for number in range(1, 6):
        nudge(sync.policy.model)
        step(sync, number)
    assert [move.step for move in sync.moves] == told == [2, 4]
    assert [move["moved_before"] for move in sync.report()] == [0, 0]
    assert all(move.distance_to_policy == 0 for move in sync.moves)


def test_one_that_moved_by_itself_is_not_moved_on() -> None:
    sync = synced()
    nudge(sync.reference.scorer.model)
    step(sync, 1)
    with pytest.raises(TrainingError, match="the reference has moved while training"):
        step(sync, 2)
    assert sync.follower.asked == 0


def test_a_copy_that_is_none_is_caught() -> None:
    sync = synced(works=False)
    nudge(sync.policy.model)
    with pytest.raises(TrainingError, match="after the move at step 2"):
        step(sync, 2)


def test_a_resumed_run_is_told_of_its_last_move() -> None:
    sync, told = synced(), []
    sync.call_after_move(told.append)
    for number in (0, 2, 5):
        sync.on_train_begin(None, SimpleNamespace(global_step=number), None)
    assert told == [0, 2, 4]
