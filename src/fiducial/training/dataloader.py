"""Which rows each process sees at each optimizer step.

A step takes `groups_per_step` rows times the number of processes from one order, which depends on the seed
and the epoch alone, and deals them out. No row is repeated to make processes even: the last step of an epoch
may leave a process with fewer rows than another, or with none. So one process and many see the same rows at
the same step.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler

from fiducial.data.tokenize import TokenizedGroup


@dataclass(frozen=True, slots=True)
class Process:
    """One of the processes that share a step's rows."""

    rank: int = 0
    count: int = 1


class StepSampler(Sampler[list[int]]):
    """The row numbers of each optimizer step, for one process."""

    def __init__(
        self, num_rows: int, groups_per_step: int, process: Process, *, shuffle_seed: int | None
    ) -> None:
        self.num_rows = num_rows
        self.rows_per_step = groups_per_step * process.count
        self.process = process
        self.shuffle_seed = shuffle_seed
        """None keeps the order of the data."""
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The trainer calls this before each epoch, also the one whose first steps a resumed run skips."""
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "StepSampler":
        """Itself: transformers looks for `set_epoch` one level below the batch sampler of a dataloader."""
        return self

    def __len__(self) -> int:
        return (self.num_rows + self.rows_per_step - 1) // self.rows_per_step

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch)
        for start in range(0, self.num_rows, self.rows_per_step):
            yield order[start : start + self.rows_per_step][self.process.rank :: self.process.count]

    def of_steps(self, first: int, stop: int) -> list[int]:
        """All processes' rows of optimizer steps `first` up to `stop`, counted from the run's start."""
        rows: list[int] = []
        for epoch in range(first // len(self), (stop - 1) // len(self) + 1):
            start = max(first - epoch * len(self), 0) * self.rows_per_step
            end = (stop - epoch * len(self)) * self.rows_per_step
            rows += self._order(epoch)[start:end]
        return rows

    def _order(self, epoch: int) -> list[int]:
        if self.shuffle_seed is None:
            return list(range(self.num_rows))
        # Mixing by a large odd number keeps (seed 1, epoch 0) and (seed 0, epoch 1) apart.
        generator = torch.Generator().manual_seed(self.shuffle_seed + 1_000_003 * epoch)
        order: list[int] = torch.randperm(self.num_rows, generator=generator).tolist()
        return order


@dataclass(frozen=True, slots=True)
class StepCollator:
    """A dataloader item is a list of groups, laid out only after it is cut.

    Streamed rows are read in full by every process, which keeps every `count`-th one.
    """

    process: Process = Process()

    def __call__(self, groups: list[TokenizedGroup]) -> list[TokenizedGroup]:
        """The groups of this process."""
        return groups[self.process.rank :: self.process.count]


def step_dataloader(
    dataset: Any, groups_per_step: int, process: Process, *, shuffle_seed: int | None, num_workers: int = 0
) -> DataLoader[list[TokenizedGroup]]:
    """One item an optimizer step: the list of this process's groups, which may be empty.

    A streamed dataset comes in its own order and is read in this process: `shuffle_seed` and `num_workers`
    have no meaning for it.
    """
    if isinstance(dataset, IterableDataset):
        return DataLoader(
            dataset,
            batch_size=groups_per_step * process.count,
            collate_fn=StepCollator(process),
        )
    sampler = StepSampler(len(dataset), groups_per_step, process, shuffle_seed=shuffle_seed)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=StepCollator(),
        num_workers=num_workers,
        worker_init_fn=_leave_process_group if num_workers else None,
    )


def _leave_process_group(worker: int) -> None:
    """Keep from a worker what a terminal or a launcher sends to a whole process group.

    The step that is under way when a run is asked to stop needs its workers, as does the checkpoint after it.
    """
    os.setpgid(0, 0)
