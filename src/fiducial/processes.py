"""The processes of a run: how many there are, and every place at which they wait for an answer of all."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fiducial.errors import FiducialError

_T = TypeVar("_T")


def is_first_process() -> bool:
    """Whether this process writes and speaks for the others: known before they have met."""
    return os.environ.get("RANK", "0") == "0"


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if _distributed() else 0


def num_processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _distributed() else 1


def barrier() -> None:
    """Wait until every process is here."""
    if _distributed():
        dist.barrier()


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process; `device` is where this process's model is."""
    if not _distributed():
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def in_all(number: int) -> int:
    """The sum of every process's `number`."""
    if not _distributed():
        return number
    numbers = [0] * num_processes()
    dist.all_gather_object(numbers, number)
    return sum(numbers)


def from_first(make: Callable[[], _T]) -> _T:
    """What the first process makes, in every process: they must not decide differently.

    Raises:
        FiducialError: the first process raised it; the others raise it too, and do not wait.
    """
    if not _distributed():
        return make()
    held: list[Any] = [None, None]
    if rank() == 0:
        try:
            held[0] = make()
        except FiducialError as error:
            held[1] = error
    dist.broadcast_object_list(held)
    if held[1] is not None:
        raise held[1]
    made: _T = held[0]
    return made


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
