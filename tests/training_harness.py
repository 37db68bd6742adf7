"""What the trainer is handed, without the rest of the house: a tiny policy, a stored reference, a loss."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from fiducial.config.methods import DPOConfig, MethodConfig
from fiducial.data.batch import Layout, PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import TokenLogps
from fiducial.losses import build_loss
from fiducial.model.divergence import Distribution
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import Reference
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData
from tiny import random_groups, tiny_model


class Rows(Dataset[TokenizedGroup]):
    """A map-style dataset of groups."""

    def __init__(self, groups: Sequence[TokenizedGroup]) -> None:
        self.groups = list(groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> TokenizedGroup:
        return self.groups[index]


class StoredReference:
    """Token log-probs scored once, kept by content key."""

    def __init__(self, scorer: Scorer, groups: Iterable[TokenizedGroup]) -> None:
        self.scorer = scorer
        self.records: dict[str, torch.Tensor] = {}
        self.add(groups)

    def add(self, groups: Iterable[TokenizedGroup]) -> None:
        for group in groups:
            if all(key in self.records for key in group.keys):
                continue
            with torch.no_grad():
                logps = self.scorer(self.scorer.pack([group]))
            for number, key in enumerate(group.keys):
                self.records[key] = logps.values[logps.sequence == number]

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        values = [self.records[key] for key in batch.keys]
        joined = torch.cat(values) if values else torch.zeros(0)
        return TokenLogps(joined, batch.sequence, batch.num_sequences)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        return self.token_logps(batch), self.scorer.distribution(batch)[1]


def training_arguments(output_dir: Path, **overrides: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 1,
    }
    return TrainingArguments(output_dir=str(output_dir), **(settings | overrides))


def build_trainer(
    output_dir: Path,
    *,
    model: PreTrainedModel | None = None,
    groups: Sequence[TokenizedGroup] | None = None,
    evaluation: Sequence[TokenizedGroup] | None = None,
    budget: int = 10_000,
    layout: Layout = "padded",
    callbacks: Sequence[TrainerCallback] = (),
    method: MethodConfig | None = None,
    live: Callable[[Scorer], Reference] | None = None,
    **arguments: Any,
) -> PreferenceTrainer:
    """A trainer of `method` (DPO), whose reference is its own starting policy unless it is `live`."""
    model = tiny_model() if model is None else model
    groups = random_groups(12) if groups is None else groups
    scorer = Scorer(model, layout=layout)
    reference = live(scorer) if live else StoredReference(scorer, [*groups, *(evaluation or [])])
    trainer = PreferenceTrainer(
        model,
        training_arguments(output_dir, **arguments),
        Objective(scorer, reference, build_loss(method or DPOConfig())),
        TrainingData(Rows(groups), Rows(evaluation) if evaluation else None),
        micro_batch_tokens=budget,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
