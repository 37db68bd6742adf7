"""Which weights a run trains, against what PEFT trains."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from fiducial.config.schema import AdapterConfig
from fiducial.model.adapters import new_adapter
from fiducial.reference.facts import gather_facts
from fiducial.reference.trained import USUAL_TARGETS, count_trained
from sized import FAMILY, SIZES, run_config
from tiny import tiny_model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ("q_proj", "down_proj")},
        {"target_linear": True},
        {"use_dora": True, "r": 4},
        {"modules_to_save": ("lm_head",)},
        {"rank_pattern": {"v_proj": 2}},
        {"layers_to_transform": (1,)},
        {"trainable_token_indices": (1, 2, 3)},
    ],
)
def test_trained_weights_are_those_peft_trains(options: dict[str, Any], families: dict[str, Path]) -> None:
    adapter = AdapterConfig(kind="lora", **options)
    cfg = run_config(families["llama"], adapter=adapter)
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    targets = {"target_modules": "all-linear"} if given.pop("target_linear", False) else {}
    policy = get_peft_model(
        tiny_model("llama", **SIZES, **FAMILY["llama"]), LoraConfig(task_type="CAUSAL_LM", **given, **targets)
    )
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert count_trained(cfg, gather_facts(cfg)).total == trained


@pytest.mark.parametrize("named", [("embed_tokens", "q_proj"), ("q_proj",)])
def test_targets_beside_all_linear_layers_are_counted(
    named: tuple[str, ...], families: dict[str, Path]
) -> None:
    adapter = AdapterConfig(kind="lora", target_linear=True, target_modules=named)
    cfg = run_config(families["llama"], adapter=adapter)
    policy = new_adapter(tiny_model("llama", **SIZES, **FAMILY["llama"]), adapter, float32=True)
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert count_trained(cfg, gather_facts(cfg)).total == trained


def test_the_bias_setting_counts_the_biases_it_trains(families: dict[str, Path]) -> None:
    cfg = run_config(families["gpt_neox"], adapter=AdapterConfig(kind="lora", bias="all"))
    policy = get_peft_model(
        tiny_model("gpt_neox", **SIZES, **FAMILY["gpt_neox"]), LoraConfig(task_type="CAUSAL_LM", bias="all")
    )
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert count_trained(cfg, gather_facts(cfg)).total == trained


def test_unfrozen_parameters_are_counted_by_name(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"], unfrozen_parameters=(r"model\.norm",))
    assert count_trained(cfg, gather_facts(cfg)).total == SIZES["hidden_size"]


def test_the_usual_targets_are_pefts() -> None:
    theirs = {name: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[name] for name in USUAL_TARGETS}
    assert {name: list(targets) for name, targets in USUAL_TARGETS.items()} == theirs
