"""Random numbers that belong to one place, drawn without touching those of the run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, random numbers follow from `seed`; afterwards the global state is what it was."""
    gpu = [int(os.environ.get("LOCAL_RANK", "0"))] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpu):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, slots=True)
class Replay:
    """The random numbers a forward pass drew, to be drawn again by the same pass."""

    cpu: Tensor
    gpu: Tensor | None
    device: torch.device

    @classmethod
    def from_here(cls, device: torch.device) -> "Replay":
        """What is drawn from now on."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu, device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the same numbers come again; afterwards the global state is what it was."""
        with torch.random.fork_rng(devices=[self.device] if self.gpu is not None else []):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def draws_numbers(run: Callable[[], object], device: torch.device) -> bool:
    """Whether `run`, which computes on `device`, draws random numbers; the global state stays what it was."""
    before = Replay.from_here(device)
    with before.again():
        run()
        after = Replay.from_here(device)
    same = torch.equal(before.cpu, after.cpu)
    return not same or (
        before.gpu is not None and after.gpu is not None and not torch.equal(before.gpu, after.gpu)
    )
