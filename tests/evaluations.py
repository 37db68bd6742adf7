"""Evaluations of a few groups with every loss, in batches of any size and on any number of processes.

Run as a file it is one of two processes, started by torchrun from test_any_evaluation.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import Loss
from fiducial.training.trainer import PreferenceTrainer, TrainingData
from step_gradients import groups_of_the_step, losses, objective_of
from training_harness import Rows, training_arguments

BUDGET = 40
"""Tokens a pass: one or two groups."""


def evaluate(
    folder: Path, loss: Loss, groups: Sequence[TokenizedGroup], batch_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Every metric, and what the loss carries from step to step afterwards."""
    objective = objective_of(loss, groups)
    trainer = PreferenceTrainer(
        objective.scorer.model,
        training_arguments(folder, per_device_eval_batch_size=batch_size),
        objective,
        TrainingData(Rows(groups), Rows(groups)),
        micro_batch_tokens=BUDGET,
    )
    found = trainer.evaluate()
    timings = ("_runtime", "_per_second")
    return {key: value for key, value in found.items() if not key.endswith(timings)}, objective.running


def main(folder: Path) -> None:
    """Batches of one: of seven groups the second process is left with nothing in the last batch."""
    found = {
        name: evaluate(folder, loss, groups_of_the_step(name)[:7], 1)[0] for name, loss in losses().items()
    }
    if dist.get_rank() == 0:
        torch.save(found, folder / "metrics.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
