"""Every row of the contract of `setup_reference_model`, and what the real TRL makes of its answer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from fiducial.config.load import DictDefault, validate_config
from fiducial.model.loader import ModelLoader
from fiducial.reference.setup import setup_reference_model
from tiny import save_adapter, save_checkpoint, tiny_tokenizer

LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
ROWS = [
    {"prompt": "What is one plus one?", "chosen": " It is two.", "rejected": " Three."},
    {"prompt": "Say yes.", "chosen": " Yes!", "rejected": " I would rather not say that."},
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, another base, and an adapter trained on the first."""
    folder = tmp_path_factory.mktemp("contract")
    save_checkpoint(folder / "base", tie_word_embeddings=True)
    save_checkpoint(folder / "other", seed=1)
    save_adapter(folder / "adapter", folder / "base")
    return folder


def settings(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"base_model": str(folder / "base"), **keys}


def reference_for(folder: Path, **keys: Any) -> PreTrainedModel | None:
    return setup_reference_model(DictDefault(settings(folder, **keys)), tiny_tokenizer())


NOTHING_LOADED = {
    "rl unset": {},
    "orpo": {"rl": "orpo"},
    "simpo": {"rl": "simpo"},
    "cpo": {"rl": "cpo"},
    "orpo with an adapter": {"rl": "orpo", **LORA},
    "orpo with an adapter, separate copy asked for": {"rl": "orpo", "rl_adapter_ref_model": True, **LORA},
    "lora": {"rl": "dpo", **LORA},
    "lora, switch off": {"rl": "dpo", "rl_adapter_ref_model": False, **LORA},
    "ipo lora": {"rl": "ipo", **LORA},
    "kto lora": {"rl": "kto", **LORA},
    "full, precomputed": {"rl": "dpo", "precompute_ref_log_probs": True},
    "full, precomputed in the reference block": {"rl": "dpo", "reference": {"schedule": "precomputed"}},
}


@pytest.mark.parametrize("keys", NOTHING_LOADED.values(), ids=NOTHING_LOADED)
def test_rows_that_need_no_second_model(
    checkpoints: Path, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: ModelLoader) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(ModelLoader, "load", never)
    assert reference_for(checkpoints, **keys) is None


def test_another_checkpoint_scored_ahead_is_not_kept(checkpoints: Path) -> None:
    named = {"model": str(checkpoints / "other"), "schedule": "precomputed"}
    assert reference_for(checkpoints, rl="dpo", reference=named) is None


def test_without_rl_not_even_the_checkpoint_is_looked_for(tmp_path: Path) -> None:
    assert reference_for(tmp_path / "nowhere") is None


SECOND_MODEL = {
    "dpo full": {"rl": "dpo"},
    "ipo full": {"rl": "ipo"},
    "kto full": {"rl": "kto"},
    "dpo full, separate copy asked for": {"rl": "dpo", "rl_adapter_ref_model": True},
    "adapter, separate copy asked for": {"rl": "dpo", "rl_adapter_ref_model": True, **LORA},
}


@pytest.mark.parametrize("keys", SECOND_MODEL.values(), ids=SECOND_MODEL)
def test_rows_that_get_a_separate_full_copy(checkpoints: Path, keys: dict[str, Any]) -> None:
    reference = reference_for(checkpoints, **keys)
    assert isinstance(reference, PreTrainedModel)
    assert not isinstance(reference, PeftModel)
    assert not any("lora" in name for name, _ in reference.named_modules())
    assert not any(module.training for module in reference.modules())
    assert not any(value.requires_grad for value in reference.parameters())
    start = AutoModelForCausalLM.from_pretrained(checkpoints / "base", dtype=reference.dtype)
    for name, value in start.named_parameters():
        assert torch.equal(reference.get_parameter(name), value), name


def test_a_named_reference_is_that_checkpoint(checkpoints: Path) -> None:
    reference = reference_for(
        checkpoints, rl="dpo", reference={"model": str(checkpoints / "other"), "schedule": "live"}
    )
    other = AutoModelForCausalLM.from_pretrained(checkpoints / "other")
    assert reference is not None
    assert torch.equal(reference.lm_head.weight, other.lm_head.weight)


def test_a_resumed_adapter_gets_none_and_a_warning(
    checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"rl": "dpo", "lora_model_dir": str(checkpoints / "adapter"), **LORA}
    with caplog.at_level("WARNING", "fiducial"):
        assert reference_for(checkpoints, **keys) is None
    assert "frozen copy of that adapter" in caplog.text


def test_every_form_of_config_means_the_same(checkpoints: Path) -> None:
    plain = settings(checkpoints, rl="dpo")
    forms = [plain, DictDefault(plain), validate_config(plain)]
    answers = [setup_reference_model(form, tiny_tokenizer()) for form in forms]
    assert all(isinstance(answer, PreTrainedModel) for answer in answers)
    assert DictDefault(plain).lora_model_dir is None


def test_it_is_the_public_name(checkpoints: Path) -> None:
    from fiducial.train import setup_reference_model as public

    assert public is setup_reference_model


def bare_base(folder: Path, keys: dict[str, Any]) -> tuple[Any, Any]:
    """The policy as other trainers take it: the base, and the adapter's config to wrap it with."""
    _, peft_config = ModelLoader(settings(folder, **keys), tiny_tokenizer()).load()
    return AutoModelForCausalLM.from_pretrained(folder / "base"), peft_config


def loaded(folder: Path, keys: dict[str, Any]) -> tuple[Any, Any]:
    """The policy as we load it, its adapter attached."""
    return ModelLoader(settings(folder, **keys), tiny_tokenizer()).load()[0], None


def step_in_trl(
    model: Any, peft_config: Any, reference: PreTrainedModel | None, folder: Path, **args: Any
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        peft_config=peft_config,
        processing_class=tiny_tokenizer(chat_template=None),
        train_dataset=Dataset.from_list(ROWS),
        args=DPOConfig(
            output_dir=str(folder),
            max_steps=1,
            per_device_train_batch_size=2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
            **args,
        ),
    )
    trainer.train()
    return trainer.state.log_history[0]


TRL_ROWS: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "full, separate copy": (loaded, {"rl": "dpo"}, {}),
    "full, precomputed": (
        loaded,
        {"rl": "dpo", "precompute_ref_log_probs": True},
        {"precompute_ref_log_probs": True},
    ),
    "lora, adapter switched off": (bare_base, {"rl": "dpo", **LORA}, {}),
    "lora, attached": (loaded, {"rl": "dpo", **LORA}, {}),
    "lora, separate copy": (bare_base, {"rl": "dpo", "rl_adapter_ref_model": True, **LORA}, {}),
    "lora, attached, separate copy": (loaded, {"rl": "dpo", "rl_adapter_ref_model": True, **LORA}, {}),
    "resumed": (loaded, {"rl": "dpo", "lora_model_dir": "adapter", **LORA}, {}),
    "ipo, separate copy": (loaded, {"rl": "ipo"}, {}),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # TRL calls what transformers deprecates
@pytest.mark.parametrize("row", TRL_ROWS.values(), ids=TRL_ROWS)
def test_trl_starts_at_reward_0_and_loss_log_2(checkpoints: Path, tmp_path: Path, row: Any) -> None:
    pytest.importorskip("trl", reason="TRL is the `trl` extra")
    as_policy, keys, args = row
    if "lora_model_dir" in keys:
        keys = keys | {"lora_model_dir": str(checkpoints / "adapter")}
    reference = reference_for(checkpoints, **keys)
    model, peft_config = as_policy(checkpoints, keys)
    first = step_in_trl(model, peft_config, reference, tmp_path, **args)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # TRL calls what transformers deprecates
def test_another_reference_shows_in_trl(checkpoints: Path, tmp_path: Path) -> None:
    # The negative control: rewards are 0 because the reference is right, not because TRL always says so.
    pytest.importorskip("trl", reason="TRL is the `trl` extra")
    named = {"model": str(checkpoints / "other"), "schedule": "live"}
    reference = reference_for(checkpoints, rl="dpo", reference=named)
    model, _ = loaded(checkpoints, {"rl": "dpo"})
    first = step_in_trl(model, None, reference, tmp_path)
    assert abs(first["rewards/chosen"]) > 0.1
