"""What a contestant is told and what it answers, as JSON between processes."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.measure import PeakMemory, StepClock
from bench.workload import Workload


@dataclass(frozen=True)
class Job:
    """One measurement."""

    checkpoint: str
    workload: str
    output_dir: str
    bf16: bool
    cuda: bool
    precomputed: bool
    micro_batch_size: int
    """Examples a forward pass of a trainer that cannot cut a step by itself."""
    attention: str = "sdpa"
    liger: bool = False
    """Whether Liger's kernels replace what layers do between their products."""
    method: str = "dpo"
    """A row of `bench.methods`."""
    learning_rate: float = 1e-4
    """High enough that the loss moves visibly within a few steps: comparing losses must mean something."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cuda" if self.cuda else "cpu")

    def examples(self) -> Workload:
        """What to train on."""
        return Workload.load(Path(self.workload))

    def training_arguments(self) -> dict[str, Any]:
        """Arguments of transformers' Trainer that every contestant gets."""
        return {
            "output_dir": self.output_dir,
            "num_train_epochs": 1,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch_fused",
            "max_grad_norm": 1.0,
            "weight_decay": 0.0,
            "bf16": self.bf16,
            "gradient_checkpointing": False,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not self.cuda,
            "dataloader_pin_memory": self.cuda,
        }


def load_policy(job: Job) -> PreTrainedModel:
    """The policy every contestant starts from: float32 weights, autocast where `bf16` says so."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job.checkpoint, dtype=torch.float32, attn_implementation=job.attention
    )
    nn.Module.to(model, job.device)
    return model


@dataclass(frozen=True)
class Result:
    """What was measured."""

    step_seconds: list[float]
    scoring_seconds: float
    """The reference's pass over the measured examples; 0 where it is scored beside the policy."""
    peak_bytes_above_weights: int
    logs: list[dict[str, float]]

    @classmethod
    def of(cls, clock: StepClock, scoring_seconds: float, peak: PeakMemory) -> "Result":
        """Collect the measurements of one process."""
        return cls(clock.step_seconds, scoring_seconds, peak.above_weights(), clock.logs)


def main(run: Callable[[Job], Result], arguments: list[str]) -> None:
    """Body of a contestant's program: `python -m bench.program JOB.json RESULT.json`."""
    job, result = (Path(argument) for argument in arguments)
    result.write_text(json.dumps(asdict(run(Job(**json.loads(job.read_text()))))))
