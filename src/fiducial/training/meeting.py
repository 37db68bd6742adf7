"""Where the processes of a run find each other: at the end of what each of them does alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from accelerate import PartialState
from torch import distributed as dist
from transformers import TrainingArguments

from fiducial.agreement import all_or_none
from fiducial.config.schema import RunConfig
from fiducial.errors import TrainingError
from fiducial.training.arguments import distribution, world_size


@contextmanager
def before_they_meet(cfg: RunConfig) -> Iterator[None]:
    """Around what each process does by itself: at its end they meet, and what failed in one is raised in all.

    One that failed without a word would leave the others waiting where no launcher ends them, as on another
    machine. Nothing inside the block may wait for another process.

    Raises:
        TrainingError: not all processes came within `ddp_timeout`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # any: it is raised again below, where the others hear of it
        failure = error
    try:
        _meet(cfg)
    except dist.DistError as error:
        raise failure or TrainingError(
            f"The {world_size()} processes of this run did not find each other: {error} Another one "
            "failed to start, and what it printed says why; or it cannot be reached at MASTER_ADDR and "
            "MASTER_PORT; or it needs longer than ddp_timeout (seconds) to read the data."
        ) from error
    with all_or_none():
        if failure is not None:
            raise failure


def _meet(cfg: RunConfig) -> None:
    """Start the process group, which transformers takes as it finds it.

    Its own would have no timeout on CPUs.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    settings = distribution(cfg)
    timeout = timedelta(seconds=settings["ddp_timeout"] or TrainingArguments.ddp_timeout)
    PartialState(cpu=settings["use_cpu"], backend=settings["ddp_backend"], timeout=timeout)
