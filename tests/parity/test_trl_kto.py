"""KTO's losses and rewards equal those of TRL's KTOTrainer, from the same weights, rows and order.

What differs on purpose, and is made equal here or not compared:

- TRL takes the mismatched completions from the same batch, each one the next row's; here they are drawn from
  the whole data. TRL is handed ours.
- TRL estimates z₀ on one micro-batch, so that gradient accumulation changes the loss; here it is the whole
  optimizer step's. One micro-batch a step makes them equal, and the second test shows the difference.
- TRL estimates z₀ of an evaluation batch by batch; here it is the whole evaluation set's.
- TRL demands a batch of at least two rows and data in its given order; neither matters here, and the last
  test takes steps of one row.
- TRL logs no accuracy. With z₀ = 0 it logs a `kl` of 0 for apo_zero_unpaired; here that is left to the
  policy's own log-ratio.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from fiducial.config.methods import APOZeroUnpairedConfig, KTOConfig, MethodConfig
from fiducial.data.dataset import from_groups
from fiducial.data.mismatch import add_mismatched
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import AdapterOff, Reference, SeparateModel
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData
from tiny import random_groups, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 still uses the old names, whatever the user passes.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, BATCH_SIZE = 5, 4
TOLERANCE = 1e-4
LABELS = [True, True, False, True, False, False, True, False, True, False]
WEIGHTS = {"desirable_weight": 0.8, "undesirable_weight": 1.5}
Logs = list[dict[str, float]]


class PretokenizedKTOTrainer(trl.KTOTrainer):
    """TRL's trainer, handed token ids, mismatched ones included."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def rows(labels: Sequence[bool] = LABELS) -> list[TokenizedGroup]:
    """(prompt, (completion, mismatched completion)), with a label."""
    groups = [
        TokenizedGroup(group.prompt, group.completions[:1], (1.0 if labels[number % len(labels)] else -1.0,))
        for number, group in enumerate(random_groups(STEPS * BATCH_SIZE))
    ]
    mismatched = add_mismatched(from_groups(groups), sequence_len=64, where="rows")
    return [mismatched[index] for index in range(len(mismatched))]


def arguments(folder: Path, learning_rate: float, **more: Any) -> dict[str, Any]:
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


def train_with_trl(
    model: Any, method: MethodConfig, args: dict[str, Any], labels: Sequence[bool] = LABELS
) -> Logs:
    handed_over = [
        {
            "prompt_ids": group.prompt.tolist(),
            "completion_ids": group.completions[0].tolist(),
            "KL_completion_ids": group.completions[1].tolist(),
            "label": group.scores[0] > 0,
        }
        for group in rows(labels)
    ]
    trainer = PretokenizedKTOTrainer(
        model=model,
        ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model),
        args=trl.KTOConfig(
            loss_type=method.title,
            gradient_checkpointing=False,
            **method.model_dump(exclude={"name"}),
            **args,
        ),
        train_dataset=Dataset.from_list(handed_over),
        eval_dataset=Dataset.from_list(handed_over),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def train_with_fiducial(
    model: Any, method: MethodConfig, args: dict[str, Any], labels: Sequence[bool] = LABELS
) -> Logs:
    scorer = Scorer(model, layout="packed")
    reference: Reference = AdapterOff(scorer)
    if not isinstance(model, PeftModel):
        reference = SeparateModel(Scorer(copy.deepcopy(model), layout="packed"))
    groups = rows(labels)
    if not method.mismatched:
        groups = [TokenizedGroup(each.prompt, each.completions[:1], each.scores[:1]) for each in groups]
    trainer = PreferenceTrainer(
        model,
        TrainingArguments(**args),
        Objective(scorer, reference, build_loss(method)),
        TrainingData(groups, groups, shuffle=False),  # type: ignore[arg-type] # a list is a map-style dataset
        micro_batch_tokens=100,  # two or three forward passes a step, where TRL has one
    )
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def start(adapter: bool) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_model()
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if adapter else model


def comparable(log: dict[str, float], method: MethodConfig, prefix: str) -> dict[str, float]:
    """What both log; with labels of one kind neither has the other kind's rewards, nor a margin."""
    names = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    names += ["logps/chosen", "logps/rejected", *(["kl"] if method.mismatched else [])]
    return {name: float(log[prefix + name]) for name in names if prefix + name in log}


def of_kind(logs: Logs, prefix: str = "") -> Logs:
    return [log for log in logs if f"{prefix}loss" in log]


def assert_equal(ours: Logs, theirs: Logs, method: MethodConfig, prefix: str = "") -> None:
    for our, their in zip(of_kind(ours, prefix), of_kind(theirs, prefix), strict=True):
        # Log-probs of whole completions are sums of up to 24 tokens, so they get a relative tolerance too.
        expected = comparable(their, method, prefix)
        assert comparable(our, method, prefix) == pytest.approx(expected, abs=TOLERANCE, rel=1e-5)


BOTH = pytest.mark.parametrize(
    "config", [KTOConfig, APOZeroUnpairedConfig], ids=lambda config: config().title
)
KINDS = pytest.mark.parametrize(
    ("adapter", "learning_rate"), [(False, 1e-3), (True, 1e-2)], ids=["full", "lora"]
)


@BOTH
@KINDS
def test_every_step_equals_trl(adapter: bool, learning_rate: float, config: type, tmp_path: Path) -> None:
    model, args, method = start(adapter), arguments(tmp_path, learning_rate), config(**WEIGHTS)
    expected = train_with_trl(copy.deepcopy(model), method, args)
    actual = train_with_fiducial(copy.deepcopy(model), method, args)

    assert_equal(actual, expected, method)
    steps = of_kind(expected)
    assert len(steps) == STEPS
    assert max(abs(log["rewards/margins"]) for log in steps) > 50 * TOLERANCE, "it must have moved"
    assert not method.mismatched or sum(log["kl"] > 100 * TOLERANCE for log in steps) >= 2


@BOTH
@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        ([True], {"undesirable_weight": 0.0}),
        ([False], {"desirable_weight": 0.0}),
        (LABELS, {"undesirable_weight": 0.0}),
        (LABELS, {"desirable_weight": 0.0}),
    ],
    ids=["all desirable", "all undesirable", "undesirable without weight", "desirable without weight"],
)
def test_one_kind_alone_equals_trl(
    labels: list[bool], weights: dict[str, float], config: type, tmp_path: Path
) -> None:
    model, args, method = start(False), arguments(tmp_path, 1e-3), config(**weights)
    expected = train_with_trl(copy.deepcopy(model), method, args, labels)
    actual = train_with_fiducial(copy.deepcopy(model), method, args, labels)

    assert_equal(actual, expected, method)
    assert len(of_kind(expected)) == STEPS
    kept = {name for name in ("rewards/chosen", "rewards/rejected") if name in of_kind(actual)[-1]}
    assert kept == {"rewards/chosen" if label else "rewards/rejected" for label in labels}
    assert max(abs(of_kind(expected)[-1][name]) for name in kept) > 50 * TOLERANCE, "it must have moved"


@BOTH
@KINDS
def test_an_evaluation_equals_one_of_trl_in_a_single_batch(
    adapter: bool, learning_rate: float, config: type, tmp_path: Path
) -> None:
    """TRL's z₀ is an evaluation batch's; ours the evaluation set's, whatever the batch."""
    model, method = start(adapter), config(**WEIGHTS)
    at_once, in_batches = (
        arguments(tmp_path, learning_rate, max_steps=3, per_device_eval_batch_size=size)
        for size in (STEPS * BATCH_SIZE, 3)
    )
    expected = train_with_trl(copy.deepcopy(model), method, at_once)
    actual = train_with_fiducial(copy.deepcopy(model), method, in_batches)

    assert len(of_kind(expected, "eval_")) == 1
    assert_equal(actual, expected, method, "eval_")
    if method.mismatched:
        assert of_kind(expected, "eval_")[0]["eval_kl"] > 100 * TOLERANCE
        theirs_in_batches = train_with_trl(copy.deepcopy(model), method, in_batches)
        with pytest.raises(AssertionError):
            assert_equal(actual, theirs_in_batches, method, "eval_")


def test_accumulated_steps_differ_by_the_reference_point(tmp_path: Path) -> None:
    """TRL's z₀ is that of each micro-batch; ours is the same however the step is cut."""
    model, method = start(False), KTOConfig()
    whole, accumulated = (
        arguments(tmp_path, 1e-3),
        arguments(tmp_path, 1e-3, per_device_train_batch_size=2, gradient_accumulation_steps=2),
    )
    theirs = train_with_trl(copy.deepcopy(model), method, accumulated)

    with pytest.raises(AssertionError):
        assert_equal(train_with_fiducial(copy.deepcopy(model), method, whole), theirs, method)


def test_steps_of_one_row(tmp_path: Path) -> None:
    model, method = start(False), KTOConfig()
    args = arguments(tmp_path, 1e-3, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match="batch size must be > 1"):
        train_with_trl(copy.deepcopy(model), method, args)

    logs = of_kind(train_with_fiducial(copy.deepcopy(model), method, args))

    assert len(logs) == STEPS * BATCH_SIZE
    assert logs[-1]["loss"] != logs[0]["loss"] == 0.5
