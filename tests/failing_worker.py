"""`fiducial train RUN.YAML` in one of two processes; the second fails as the first argument says."""

import os
import signal
import sys
import time
from typing import Any

import torch

from fiducial import cli, loading
from fiducial.errors import DataError, ModelError
from fiducial.model.loader import ModelLoader
from fiducial.training.objective import Objective


def unread_data() -> None:
    """The file is not on this machine, which the processes learn before they have met."""

    def load_groups(*arguments: object, **options: object) -> Any:
        raise DataError("the file is not there")

    loading.load_groups = load_groups


def never_there() -> None:
    """It is killed before the processes have met, as where memory runs out."""

    def load_groups(*arguments: object, **options: object) -> Any:
        time.sleep(5)
        os._exit(137)

    loading.load_groups = load_groups


def damaged_checkpoint() -> None:
    def load(self: object) -> Any:
        raise ModelError("a weights file is damaged")

    ModelLoader.load = load


def another_copy() -> None:
    """The checkpoint on this machine has other weights."""
    load = ModelLoader.load

    def loading(self: ModelLoader) -> Any:
        model, config = load(self)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        return model, config

    ModelLoader.load = loading


def in_second_step(fail: Any) -> None:
    """Pass the policy's log-probs through `fail` once a step has been taken."""
    score, passes = Objective._score, []

    def failing(self: Objective, batch: Any, statistics: Any) -> Any:
        reference, policy = score(self, batch, statistics)
        passes.append(torch.is_grad_enabled())
        if sum(passes) > 1:
            fail(policy)
        return reference, policy

    Objective._score = failing


def not_a_number(policy: Any) -> None:
    policy.values.data.fill_(torch.nan)


def out_of_memory(policy: Any) -> None:
    raise torch.OutOfMemoryError("no memory left")


FAILURES = {
    "read": unread_data,
    "absent": never_there,
    "load": damaged_checkpoint,
    "copy": another_copy,
    "nan": lambda: in_second_step(not_a_number),
    "memory": lambda: in_second_step(out_of_memory),
    "stopped": lambda: in_second_step(lambda _: os.kill(os.getpid(), signal.SIGTERM)),
    "none": lambda: None,
}

if __name__ == "__main__":
    failure, run = sys.argv[1:]
    if os.environ["RANK"] == "1":
        FAILURES[failure]()
    sys.argv = ["fiducial", "train", run]
    cli.main()
