"""TRL's DPOTrainer as a contestant, in its own process."""

import sys
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from bench.contestant import BETA, Job, Result, load_policy, main
from bench.measure import PeakMemory, StepClock, Stopwatch


class MeasuredDPOTrainer(DPOTrainer):
    """TRL's trainer, handed token ids instead of text, with a watch on its scoring pass."""

    scoring = Stopwatch()

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        with self.scoring.running():
            return super()._precompute_ref_logps(*args, **kwargs)


def run(job: Job) -> Result:
    """Train on the job's pairs."""
    workload = job.pairs()
    model = load_policy(job)
    peak, clock = PeakMemory(model), StepClock()
    trainer = MeasuredDPOTrainer(
        model=model,
        args=DPOConfig(
            beta=BETA,
            max_length=workload.max_length,
            precompute_ref_log_probs=job.precomputed,
            per_device_train_batch_size=job.micro_batch_size,
            gradient_accumulation_steps=workload.batch_size // job.micro_batch_size,
            precompute_ref_batch_size=job.micro_batch_size,
            **job.training_arguments(),
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
                for pair in workload.pairs
            ]
        ),
        processing_class=AutoTokenizer.from_pretrained(job.checkpoint),
        callbacks=[clock],
    )
    trainer.train()
    return Result.of(clock, trainer.scoring.seconds, peak)


if __name__ == "__main__":
    main(run, sys.argv[1:])
