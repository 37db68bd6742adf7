"""Which rows a process sees: the same as one process alone, at the same step, none twice."""

import os

import pytest
from torch.utils.data import IterableDataset

from fiducial.training.dataloader import Process, StepSampler, step_dataloader
from tiny import random_groups
from training_harness import Rows


def steps(
    num_rows: int, groups: int, process: Process, *, seed: int | None = 0, epoch: int = 0
) -> list[list[int]]:
    sampler = StepSampler(num_rows, groups, process, shuffle_seed=seed)
    sampler.set_epoch(epoch)
    assert len(list(sampler)) == len(sampler)
    return list(sampler)


@pytest.mark.parametrize("num_rows", [1, 7, 12, 13, 24])
@pytest.mark.parametrize("processes", [2, 3])
def test_many_processes_share_what_one_would_see(num_rows: int, processes: int) -> None:
    alone = steps(num_rows, 2 * processes, Process())
    together = [steps(num_rows, 2, Process(rank, processes)) for rank in range(processes)]
    for step, rows in enumerate(alone):
        assert sorted(rows) == sorted(row for share in together for row in share[step])
    assert sorted(row for rows in alone for row in rows) == list(range(num_rows))


def test_a_process_may_be_left_with_nothing() -> None:
    assert steps(5, 2, Process(1, 2), seed=None) == [[1, 3], []]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_of_steps_to_come_are_those_the_epochs_give(seed: int | None, processes: int) -> None:
    per_epoch = [
        [steps(13, 2, Process(rank, processes), seed=seed, epoch=epoch) for rank in range(processes)]
        for epoch in range(3)
    ]
    whole = [
        sorted(row for share in shares for row in share[step])
        for shares in per_epoch
        for step in range(len(shares[0]))
    ]
    sampler = StepSampler(13, 2, Process(0, processes), shuffle_seed=seed)
    for first in range(len(whole)):
        for stop in range(first + 1, len(whole) + 1):
            expected = sorted(row for step in whole[first:stop] for row in step)
            assert sorted(sampler.of_steps(first, stop)) == expected
    assert (
        sampler.of_steps(0, len(sampler)) != sampler.of_steps(len(sampler), 2 * len(sampler)) or seed is None
    )


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert steps(20, 4, Process(), seed=3, epoch=1) == steps(20, 4, Process(), seed=3, epoch=1)
    orders = [steps(20, 4, Process(), seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(first != second for index, first in enumerate(orders) for second in orders[:index])


def test_without_a_seed_the_data_keeps_its_order() -> None:
    assert steps(5, 2, Process(), seed=None, epoch=3) == [[0, 1], [2, 3], [4]]


class Stream(IterableDataset):
    def __init__(self, groups):
        self.groups = groups

    def __iter__(self):
        return iter(self.groups)


def test_streamed_rows_are_shared_like_stored_ones() -> None:
    groups = random_groups(7)
    for rank in range(2):
        process = Process(rank, 2)
        stored = list(step_dataloader(Rows(groups), 2, process, shuffle_seed=None))
        streamed = list(step_dataloader(Stream(groups), 2, process, shuffle_seed=None))
        assert streamed == stored


class ProcessGroups:
    """Rows that say which process group they were read in."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> int:
        return os.getpgrp()


def test_what_stops_a_run_does_not_reach_its_workers() -> None:
    for workers in (0, 1):
        loader = step_dataloader(ProcessGroups(), 2, Process(), shuffle_seed=None, num_workers=workers)
        [[first, second]] = list(loader)
        assert first == second
        assert (first == os.getpgrp()) == (workers == 0)
