"""Fiducial as a contestant, in its own process."""

import math
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from transformers import TrainerCallback, TrainingArguments

from bench.contestant import Job, Result, load_policy, main
from bench.measure import PeakMemory, StepClock, Stopwatch
from bench.methods import METHODS
from bench.workload import Example, Workload
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.fused_layers import ARGUMENTS, fuse_layers, fused_layers
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.facts import gather_facts
from fiducial.reference.fingerprint import identify
from fiducial.reference.kinds import ReferencePlan, Schedule
from fiducial.reference.plan import plan_reference
from fiducial.reference.sources import Reference, build_reference, build_scoring_reference
from fiducial.training.budget import choose_token_budget
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData


class Groups(Dataset[TokenizedGroup]):
    """The workload's examples as the trainer reads them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.groups = [_group(example) for example in examples]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenizedGroup:
        return self.groups[index]


def _group(example: Example) -> TokenizedGroup:
    prompt, completions = _ids(example.prompt), tuple(map(_ids, example.completions))
    if example.desirable is None:
        return TokenizedGroup(prompt, completions)
    score = 1.0 if example.desirable else -1.0
    return TokenizedGroup(prompt, (*completions, _ids(example.mismatched)), (score, math.nan))


def run(job: Job, callbacks: Sequence[TrainerCallback] = ()) -> Result:
    """Decide as `fiducial train` would, score the reference if there is one, then train on the examples."""
    workload = job.examples()
    cfg = _run_config(job, workload)
    assert cfg.method is not None
    facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    budget = choose_token_budget(cfg, facts, plan, job.device)
    model = load_policy(job)
    fuse_layers(model, fused_layers(cfg, model.config))
    groups, peak, clock, scoring = Groups(workload.examples), PeakMemory(model), StepClock(), Stopwatch()
    scorer = Scorer(model, layout="packed", autocast=torch.bfloat16 if job.bf16 else None)
    arguments = job.training_arguments() | {"bf16": False}  # autocast is the scorer's
    with tempfile.TemporaryDirectory() as folder:
        warmup = workload.warmup * workload.batch_size
        reference = _reference(plan, scorer, groups, warmup, scoring, Path(folder), budget)
        trainer = PreferenceTrainer(
            model,
            TrainingArguments(per_device_train_batch_size=workload.batch_size, **arguments),
            Objective(scorer, reference, build_loss(cfg.method)),
            TrainingData(groups, shuffle=False),
            micro_batch_tokens=budget,
            callbacks=[clock, *callbacks],
        )
        trainer.train()
    return Result.of(clock, scoring.seconds, peak)


def _reference(
    plan: ReferencePlan,
    scorer: Scorer,
    groups: Groups,
    warmup: int,
    scoring: Stopwatch,
    folder: Path,
    budget: int,
) -> Reference:
    """What the trainer asks. If the plan says so, log-probs are scored first.

    `scoring` watches all but the first `warmup` groups. Those are scored before, into a store of their own:
    one of them may come again, and would not be scored twice.
    """
    if plan.schedule is not Schedule.PRECOMPUTED:
        return build_reference(plan, scorer)
    identity, reference = identify(plan, scorer), build_scoring_reference(plan, scorer)
    store, aside = LogpStore(folder / "store", identity), LogpStore(folder / "aside", identity)
    score = partial(score_reference, reference=reference, scorer=scorer, token_budget=budget)
    score(Subset(groups, range(warmup)), store=aside)
    with scoring.running():
        score(Subset(groups, range(warmup, len(groups))), store=store)
    score(groups, store=store)
    return build_reference(plan, scorer, None, store)


def _run_config(job: Job, workload: Workload) -> RunConfig:
    """The run as its YAML would say it."""
    return validate_config(
        {
            **METHODS[job.method].keys,
            "base_model": job.checkpoint,
            "bf16": job.bf16,
            "datasets": [{"path": job.workload}],
            "sequence_len": workload.max_length,
            "micro_batch_size": workload.batch_size,
            "learning_rate": job.learning_rate,
            **{key: job.liger for key in ARGUMENTS},
        }
    )


def _ids(tokens: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(tokens, dtype=np.int32)


if __name__ == "__main__":
    main(run, sys.argv[1:])
