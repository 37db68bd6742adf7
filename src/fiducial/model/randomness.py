"""Random numbers that belong to one place, drawn without touching those of the run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Inside, random numbers follow from `seed`; afterwards the global state is what it was."""
    gpu = [int(os.environ.get("LOCAL_RANK", "0"))] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=gpu):
        torch.manual_seed(seed)
        yield
