"""The same training run with TRL's trainers and with ours: same weights, token ids and order, one log a step.

TRL takes a step in one micro-batch; ours is cut into several, which changes nothing here.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fiducial.config.methods import MethodConfig
from fiducial.data.batch import Layout
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.kinds import Sync
from fiducial.reference.moving import ModelFollower
from fiducial.reference.sources import AdapterOff, NoReference, Reference, SeparateModel
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData
from tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")
tpo = pytest.importorskip("trl.experimental.tpo")

STEPS, BATCH_SIZE = 5, 4
TOLERANCE = 1e-4
Logs = list[dict[str, float]]

KINDS = pytest.mark.parametrize(
    ("adapter", "learning_rate"), [(False, 1e-3), (True, 1e-2)], ids=["full", "lora"]
)


class PretokenizedDPOTrainer(trl.DPOTrainer):
    """TRL's trainer, handed token ids."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class PretokenizedTPOTrainer(tpo.TPOTrainer):
    """TRL's trainer, handed token ids."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class Pretokenized:
    """Makes of a row what CPOTrainer and ORPOTrainer need: it holds that already."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        return {name: value for name, value in feature.items() if "_" in name}


class PretokenizedCPOTrainer(Pretokenized, cpo.CPOTrainer):
    """TRL's trainer, handed token ids."""


class PretokenizedORPOTrainer(Pretokenized, orpo.ORPOTrainer):
    """TRL's trainer, handed token ids."""


def arguments(folder: Path, learning_rate: float, **more: Any) -> dict[str, Any]:
    """What both sides are told of the run."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "bf16": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": BATCH_SIZE,
        **more,
    }


def start(adapter: bool) -> Any:
    """A tiny policy, whole or a fresh adapter on it."""
    torch.manual_seed(0)
    model: Any = tiny_model()
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if adapter else model


def train_dpo(model: Any, groups: Sequence[TokenizedGroup], args: dict[str, Any], **settings: Any) -> Logs:
    """TRL's DPOTrainer with `settings` of its DPOConfig."""
    return _logs(
        PretokenizedDPOTrainer(
            model=model,
            ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model),
            args=trl.DPOConfig(gradient_checkpointing=False, **settings, **args),
            train_dataset=_completions(groups, ("chosen", "rejected")),
            processing_class=tiny_tokenizer(),
        )
    )


def train_tpo(model: Any, groups: Sequence[TokenizedGroup], args: dict[str, Any], **settings: Any) -> Logs:
    """TRL's TPOTrainer; the gold completion, first in a group, is its `reference`."""
    return _logs(
        PretokenizedTPOTrainer(
            model=model,
            args=tpo.TPOConfig(gradient_checkpointing=False, **settings, **args),
            train_dataset=_completions(groups, ("reference", "chosen", "rejected")),
            processing_class=tiny_tokenizer(),
        )
    )


def train_cpo(model: Any, groups: Sequence[TokenizedGroup], args: dict[str, Any], **settings: Any) -> Logs:
    """TRL's CPOTrainer with `settings` of its CPOConfig."""
    config = cpo.CPOConfig(gradient_checkpointing=False, remove_unused_columns=False, **settings, **args)
    return _contrast(PretokenizedCPOTrainer, config, model, groups)


def train_orpo(model: Any, groups: Sequence[TokenizedGroup], args: dict[str, Any], **settings: Any) -> Logs:
    """TRL's ORPOTrainer with `settings` of its ORPOConfig."""
    config = orpo.ORPOConfig(gradient_checkpointing=False, remove_unused_columns=False, **settings, **args)
    return _contrast(PretokenizedORPOTrainer, config, model, groups)


class Moving(TrainerCallback):
    """Moves the reference every few steps."""

    def __init__(self, follower: ModelFollower) -> None:
        self.follower = follower

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.follower.sync.steps == 0:
            self.follower.move()


def train_fiducial(
    model: Any,
    groups: Sequence[TokenizedGroup],
    args: dict[str, Any],
    method: MethodConfig,
    *,
    layout: Layout = "packed",
    micro_batch_tokens: int = 128,
    sync: Sync | None = None,
) -> Logs:
    """Ours, in two or three micro-batches a step."""
    scorer = Scorer(model, layout=layout)
    reference: Reference = AdapterOff(scorer)
    callbacks = []
    if not isinstance(model, PeftModel):
        second = copy.deepcopy(model)
        reference = SeparateModel(Scorer(second, layout=layout))
        callbacks = [Moving(ModelFollower(model, second, sync))] if sync else []
    trainer = PreferenceTrainer(
        model,
        TrainingArguments(**args),
        Objective(scorer, reference if method.needs_reference else NoReference(), build_loss(method)),
        TrainingData(groups, shuffle=False),  # type: ignore[arg-type] # a list is a map-style dataset
        micro_batch_tokens=micro_batch_tokens,
        callbacks=callbacks,
    )
    return _logs(trainer)


def assert_equal(ours: Logs, theirs: Logs, names: Sequence[str], *, start: int = 0) -> None:
    """Every step's metrics, to 1e-4; sums over completions and large losses are float32's 1e-5."""
    assert len(ours) == len(theirs) == STEPS
    for our, their in zip(ours[start:], theirs[start:], strict=True):
        found, expected = ({name: float(log[name]) for name in names} for log in (our, their))
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=1e-5)


def _contrast(trainer: Any, config: Any, model: Any, groups: Sequence[TokenizedGroup]) -> Logs:
    rows = [_padded_row(group) for group in groups]
    return _logs(
        trainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
        )
    )


def _padded_row(group: TokenizedGroup) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for name, completion in zip(("chosen", "rejected"), group.completions, strict=True):
        ids = [*group.prompt.tolist(), *completion.tolist()]
        row |= {
            f"{name}_input_ids": ids,
            f"{name}_attention_mask": [1] * len(ids),
            f"{name}_labels": [-100] * len(group.prompt) + completion.tolist(),
        }
    return row


def _completions(groups: Sequence[TokenizedGroup], names: Sequence[str]) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt_ids": group.prompt.tolist()}
            | {
                f"{name}_ids": completion.tolist()
                for name, completion in zip(names, group.completions, strict=True)
            }
            for group in groups
        ]
    )


def _logs(trainer: Any) -> Logs:
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
