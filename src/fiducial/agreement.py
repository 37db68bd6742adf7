"""Every process of a run learns that one of them failed, instead of waiting for it until a timeout."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist

from fiducial.errors import FiducialError, TrainingError
from fiducial.processes import num_processes

_GLOO_LOST = ("Connection closed by peer", "Connection reset by peer")
"""Gloo raises a bare RuntimeError; the second where the process ended with something of ours unread."""


@contextmanager
def all_or_none() -> Iterator[None]:
    """Every process leaves this block, or none does: what fails in one is raised in all.

    A process that failed raises its own error. The others raise one of the same kind that names the process;
    memory that ran out is a `TrainingError` there, and an error that is not the user's to mend a
    `RuntimeError`. All processes must reach the block, and nothing inside it may wait for another process.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # any: it is raised again below, after the other processes know of it
        failure = error
    others = _failures(failure)
    if failure is not None:
        raise failure
    if others:
        raise others[0]


@contextmanager
def lost_process_explained() -> Iterator[None]:
    """Say plainly that another process ended in the middle of a step, where nothing can be agreed on."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in _GLOO_LOST)):
            raise
        raise TrainingError(
            "Another process of this run ended in the middle of a step; what it printed says why. "
            "Checkpoints are kept: go on with auto_resume_from_checkpoints: true."
        ) from error


def _failures(own: Exception | None) -> list[Exception]:
    """What failed in the other processes, in their order. A collective call."""
    if num_processes() == 1:
        return []
    # The error itself may hold what cannot be sent; its kind and its words always can.
    told = None if own is None else (_kind(own), _words(own))
    everyone: list[tuple[type[FiducialError] | None, str] | None] = [None] * num_processes()
    dist.all_gather_object(everyone, told)
    return [
        (failed[0] or RuntimeError)(f"process {rank} failed: {failed[1]}")
        for rank, failed in enumerate(everyone)
        if failed is not None
    ]


def _kind(error: Exception) -> type[FiducialError] | None:
    """What the user can mend is told as that; None for all else."""
    if isinstance(error, torch.OutOfMemoryError):
        return TrainingError
    return type(error) if isinstance(error, FiducialError) else None


def _words(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory; what it printed says what to do."
    return str(error) if isinstance(error, FiducialError) else f"{type(error).__name__}: {error}"
