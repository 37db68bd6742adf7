"""Token ids, losses and rewards equal those of TRL's DPOTrainer, from the same weights, pairs and order."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments

from fiducial.config.methods import DPOConfig
from fiducial.data.batch import Layout
from fiducial.data.example import PreferenceExample
from fiducial.data.templates import ChatTemplate
from fiducial.data.tokenize import GroupTokenizer, TokenizedGroup
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import AdapterOff, Reference, SeparateModel
from fiducial.training.objective import Objective
from fiducial.training.trainer import PreferenceTrainer, TrainingData
from tiny import CHATML, random_groups, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 still uses the old names, whatever the user passes.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, BATCH_SIZE = 5, 4
TOLERANCE = 1e-4
METRICS = (
    *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)
Logs = list[dict[str, float]]


class PretokenizedDPOTrainer(trl.DPOTrainer):
    """TRL's trainer, handed token ids."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def arguments(folder: Path, learning_rate: float, **trl_arguments: Any) -> dict[str, Any]:
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
        **trl_arguments,
    }


def train_with_trl(model: Any, groups: list[TokenizedGroup], args: dict[str, Any]) -> Logs:
    rows = [
        {
            "prompt_ids": group.prompt.tolist(),
            "chosen_ids": group.completions[0].tolist(),
            "rejected_ids": group.completions[1].tolist(),
        }
        for group in groups
    ]
    trainer = PretokenizedDPOTrainer(
        model=model,
        ref_model=None if isinstance(model, PeftModel) else copy.deepcopy(model),
        args=trl.DPOConfig(
            beta=0.1, per_device_train_batch_size=BATCH_SIZE, gradient_checkpointing=False, **args
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def train_with_fiducial(
    model: Any, groups: list[TokenizedGroup], args: dict[str, Any], layout: Layout, *, beta: float = 0.1
) -> Logs:
    scorer = Scorer(model, layout=layout)
    reference: Reference = AdapterOff(scorer)
    if not isinstance(model, PeftModel):
        reference = SeparateModel(Scorer(copy.deepcopy(model), layout=layout))
    trainer = PreferenceTrainer(
        model,
        TrainingArguments(per_device_train_batch_size=BATCH_SIZE, **args),
        Objective(scorer, reference, build_loss(DPOConfig(beta=beta))),
        TrainingData(groups, shuffle=False),  # type: ignore[arg-type] # a list is a map-style dataset
        micro_batch_tokens=128,  # two or three micro-batches a step, where TRL has one
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def start(adapter: bool) -> Any:
    torch.manual_seed(0)
    model: Any = tiny_model()
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")) if adapter else model


def comparable(log: dict[str, float]) -> dict[str, float]:
    """The metrics both log. A pair of equal rewards is half right here, wrong in TRL."""
    tied = log["rewards/margins"] == 0
    return {name: float(log[name]) for name in METRICS if not (tied and name == "rewards/accuracies")}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("adapter", "learning_rate"), [(False, 1e-3), (True, 1e-2)], ids=["full", "lora"])
def test_every_step_equals_trl(adapter: bool, learning_rate: float, layout: Layout, tmp_path: Path) -> None:
    groups, model, args = (
        random_groups(STEPS * BATCH_SIZE),
        start(adapter),
        arguments(tmp_path, learning_rate),
    )
    expected = train_with_trl(copy.deepcopy(model), groups, args)
    actual = train_with_fiducial(copy.deepcopy(model), groups, args, layout)
    assert len(expected) == len(actual) == STEPS
    for ours, theirs in zip(actual, expected, strict=True):
        # Log-probs of whole completions are sums of up to 24 tokens, so they get a relative tolerance too.
        assert comparable(ours) == pytest.approx(comparable(theirs), abs=TOLERANCE, rel=1e-5)
    moved = max(abs(log["rewards/margins"]) for log in expected)
    assert moved > 50 * TOLERANCE, "the policy must have left the reference for this to mean anything"


def test_another_beta_is_not_trl(tmp_path: Path) -> None:
    """The comparison can fail: half a percent more beta is seen."""
    groups, model, args = random_groups(STEPS * BATCH_SIZE), start(False), arguments(tmp_path, 1e-3)
    expected = train_with_trl(copy.deepcopy(model), groups, args)
    actual = train_with_fiducial(copy.deepcopy(model), groups, args, "padded", beta=0.1005)
    assert any(
        comparable(ours) != pytest.approx(comparable(theirs), abs=TOLERANCE, rel=1e-5)
        for ours, theirs in zip(actual, expected, strict=True)
    )


ROWS: dict[str, tuple[Any, Any, Any]] = {
    "text": ("Name a colour.\n", "Blue, like the sea.", "No."),
    "chat": (
        [{"role": "user", "content": "Name a colour."}],
        [{"role": "assistant", "content": "Blue, like the sea."}],
        [{"role": "assistant", "content": "No."}],
    ),
}


@pytest.mark.parametrize("kind", sorted(ROWS))
def test_token_ids_equal_trl(kind: str, tmp_path: Path) -> None:
    """TRL also trains on the newline that ChatML writes after an end of turn; here that is no part of it."""
    prompt, chosen, rejected = ROWS[kind]
    tokenizer = tiny_tokenizer()
    trainer = trl.DPOTrainer(
        model=tiny_model(),
        ref_model=tiny_model(),
        args=trl.DPOConfig(gradient_checkpointing=False, **arguments(tmp_path, 1e-3)),
        train_dataset=Dataset.from_list([{"prompt": prompt, "chosen": chosen, "rejected": rejected}]),
        processing_class=tokenizer,
    )
    theirs = trainer.train_dataset[0]
    ours = (
        GroupTokenizer(tokenizer, ChatTemplate(tokenizer, CHATML), sequence_len=512)
        .tokenize_example(
            PreferenceExample(_frozen(prompt), (_frozen(chosen), _frozen(rejected)), dataset="rows", row=0)
        )
        .group
    )
    after_the_end = 1 if kind == "chat" else 0
    assert ours.prompt.tolist() == theirs["prompt_ids"]
    for completion, name in zip(ours.completions, ("chosen_ids", "rejected_ids"), strict=True):
        ids = theirs[name]
        assert completion.tolist() == ids[: len(ids) - after_the_end]
        assert tokenizer.decode(ids[len(completion) :]).strip() == ""


def _frozen(content: Any) -> Any:
    return content if isinstance(content, str) else tuple(content)
