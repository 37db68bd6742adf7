"""TRL as a contestant, in its own process."""

import sys
from pkgutil import resolve_name

from datasets import Dataset
from transformers import AutoTokenizer

from bench.contestant import Job, Result, load_policy, main
from bench.measure import PeakMemory, StepClock
from bench.methods import METHODS


def run(job: Job) -> Result:
    """Train on the job's examples with TRL's trainer for its method."""
    workload, method = job.examples(), METHODS[job.method]
    model = load_policy(job)
    peak, clock = PeakMemory(model), StepClock()
    trainer_class = resolve_name(method.trainer)
    settings = {
        **method.settings,
        "max_length": workload.max_length,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": workload.batch_size // job.micro_batch_size,
        **job.training_arguments(),
    }
    if method.reference:
        settings |= {
            "precompute_ref_log_probs": job.precomputed,
            "precompute_ref_batch_size": job.micro_batch_size,
        }
    trainer = trainer_class(
        model=model,
        args=resolve_name(method.config)(**settings),
        train_dataset=Dataset.from_list([trainer_class.row(example) for example in workload.examples]),
        processing_class=AutoTokenizer.from_pretrained(job.checkpoint),
        callbacks=[clock],
    )
    trainer.train()
    warmup = workload.warmup * workload.batch_size // job.micro_batch_size
    return Result.of(clock, sum(trainer.scoring_seconds[warmup:]), peak)


if __name__ == "__main__":
    main(run, sys.argv[1:])
