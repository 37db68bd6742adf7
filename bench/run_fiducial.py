"""Fiducial as a contestant, in its own process."""

import sys
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from bench.contestant import BETA, LEARNING_RATE, Job, Result, load_policy, main
from bench.measure import PeakMemory, StepClock, Stopwatch
from bench.workload import Pair, Workload
from fiducial.config.load import validate_config
from fiducial.config.methods import DPOConfig
from fiducial.config.schema import RunConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.facts import gather_facts
from fiducial.reference.identity import identify
from fiducial.reference.plan import plan_reference
from fiducial.reference.sources import build_reference, build_scoring_reference
from fiducial.training.budget import choose_token_budget
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData


class Groups(Dataset[TokenizedGroup]):
    """The workload's pairs as the trainer reads them."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.groups = [
            TokenizedGroup(_ids(pair.prompt), (_ids(pair.chosen), _ids(pair.rejected))) for pair in pairs
        ]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenizedGroup:
        return self.groups[index]


def run(job: Job, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Decide as `fiducial train` would, score the reference, then train on the job's pairs."""
    workload = job.pairs()
    cfg = _run_config(job, workload)
    facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    budget = choose_token_budget(cfg, facts, plan, job.device)
    model = load_policy(job)
    groups, peak, clock, scoring = Groups(workload.pairs), PeakMemory(model), StepClock(), Stopwatch()
    scorer = Scorer(model, layout="packed", autocast=torch.bfloat16 if job.bf16 else None)
    arguments = job.training_arguments() | {"bf16": False}  # autocast is the scorer's
    with tempfile.TemporaryDirectory() as folder:
        with scoring.running():
            store = LogpStore(folder, identify(plan, scorer))
            score_reference(groups, build_scoring_reference(plan, scorer), scorer, store, token_budget=budget)
        trainer = PreferenceTrainer(
            model,
            TrainingArguments(per_device_train_batch_size=workload.batch_size, **arguments),
            Objective(scorer, build_reference(plan, scorer, None, store), build_loss(DPOConfig(beta=BETA))),
            TrainingData(groups, shuffle=False),
            micro_batch_tokens=budget,
            callbacks=[clock, *callbacks],
        )
        trainer.train()
    return Result.of(clock, scoring.seconds, peak)


def _run_config(job: Job, workload: Workload) -> RunConfig:
    """The run as its YAML would say it."""
    return validate_config(
        {
            "base_model": job.checkpoint,
            "rl": "dpo",
            "rl_beta": BETA,
            "bf16": job.bf16,
            "datasets": [{"path": job.workload}],
            "sequence_len": workload.max_length,
            "micro_batch_size": workload.batch_size,
            "learning_rate": LEARNING_RATE,
        }
    )


def _ids(tokens: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(tokens, dtype=np.int32)


if __name__ == "__main__":
    main(run, sys.argv[1:])
