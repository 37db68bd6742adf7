"""Rules between keys: each row is refused with its reason, and its neighbour that is right is accepted."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from fiducial.config.load import load_run, validate_config
from fiducial.errors import ConfigError

DATA = {"datasets": [{"path": "a"}]}
STREAM = DATA | {"streaming": True, "max_steps": 5}
HELD_OUT = DATA | {"val_set_size": 100}
SERVED = {"endpoint": "http://h/v1", "model": "m"}
BEST = {"save_strategy": "best", "metric_for_best_model": "eval_loss"}
LORA = {"adapter": "lora"}
QLORA = {"adapter": "qlora", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("wrong", "message", "right"),
    [
        (
            {"warmup_steps": 5, "warmup_ratio": 0.1},
            "warmup_ratio: 0.1 — contradicts warmup_steps",
            {"warmup_steps": 5},
        ),
        (
            {"warmup_steps": 0, "warmup_ratio": 0.1},
            "warmup_ratio: 0.1 — has no effect with warmup_steps: 0",
            {"warmup_steps": 5, "warmup_ratio": 0},
        ),
        (
            {"datasets": "a.jsonl"},
            "datasets: a.jsonl — must be a list of mappings; write datasets: [{path: a.jsonl}]",
            {"datasets": [{"path": "a.jsonl"}]},
        ),
        (
            DATA | {"test_datasets": ["b.jsonl"]},
            "test_datasets.0: b.jsonl — must be a mapping; write {path: b.jsonl}",
            DATA | {"test_datasets": [{"path": "b.jsonl"}]},
        ),
        (
            HELD_OUT | {"test_datasets": [{"path": "b"}]},
            "contradicts val_set_size",
            DATA | {"test_datasets": [{"path": "b"}]},
        ),
        (
            QLORA | {"load_in_8bit": True},
            "load_in_4bit: True — contradicts load_in_8bit",
            QLORA | {"load_in_8bit": False},
        ),
        ({"adapter": "qlora"}, "adapter: qlora — qlora needs load_in_4bit: true", QLORA),
        (
            LORA | {"load_in_8bit": True, "reinit_weights": True},
            "reinit_weights: True — contradicts load_in_8bit",
            LORA | {"reinit_weights": True},
        ),
        (QLORA | {"reinit_weights": True}, "reinit_weights: True — contradicts load_in_4bit", QLORA),
        (
            {"load_in_8bit": True},
            "quantised weights cannot be trained; write adapter",
            LORA | {"load_in_8bit": True},
        ),
        (QLORA | {"fsdp_version": 2}, "cannot be sharded by FSDP 2", LORA | {"fsdp_version": 2}),
        (
            LORA | {"bnb_config_kwargs": {"a": 1}},
            "needs load_in_8bit or load_in_4bit",
            QLORA | {"bnb_config_kwargs": {"a": 1}},
        ),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrnt": True}},
            "gradient_checkpointing_kwargs.use_reentrnt: True — torch has no such option; there are use_reen",
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ),
        (
            {"lora_r": 8},
            "lora_r: 8 — has no effect without adapter; write adapter: lora",
            LORA | {"lora_r": 8},
        ),
        ({"peft_use_dora": True}, "has no effect without adapter", {"peft_use_dora": False}),
        (
            {"rl": "kto", "kto_desirable_weight": 0, "kto_undesirable_weight": "0.0"},
            "kto_undesirable_weight: 0.0 — with kto_desirable_weight: 0 nothing is learned",
            {"rl": "kto", "kto_desirable_weight": 0},
        ),
        (
            {"lora_model_dir": "a"},
            "lora_model_dir: a — has no effect without adapter",
            LORA | {"lora_model_dir": "a"},
        ),
        (
            LORA | {"peft_layers_pattern": ["layers"]},
            "peft_layers_pattern: ['layers'] — needs peft_layers_to_transform",
            LORA | {"peft_layers_pattern": ["layers"], "peft_layers_to_transform": [0]},
        ),
        (
            LORA | {"lora_target_parameters": ["a"], "lora_dropout": 0.1},
            "lora_dropout: 0.1 — must be 0 with lora_target_parameters",
            LORA | {"lora_target_parameters": ["a"], "lora_dropout": 0},
        ),
        (
            DATA | {"streaming": True},
            "streaming: True — needs max_steps",
            DATA | {"streaming": True, "max_steps": 5},
        ),
        (
            DATA | {"streaming": True, "max_steps": 5, "val_set_size": 0.1},
            "a stream's length is not known; write a number of rows",
            DATA | {"streaming": True, "max_steps": 5, "val_set_size": 10},
        ),
        (
            STREAM | {"dataset_exact_deduplication": True},
            "all rows would have to be remembered; remove it, or streaming",
            STREAM | {"dataset_exact_deduplication": False},
        ),
        (
            DATA | {"streaming_multipack_buffer_size": 10},
            "needs streaming: other data is shuffled as a whole",
            STREAM | {"streaming_multipack_buffer_size": 10},
        ),
        (
            STREAM | {"streaming_multipack_buffer_size": 10, "shuffle_merged_datasets": False},
            "has no effect without shuffling",
            STREAM | {"shuffle_merged_datasets": False},
        ),
        (
            STREAM | HELD_OUT | {"evals_per_epoch": 2, "val_set_size": 9},
            "evals_per_epoch: 2 — a stream has no epochs; write eval_steps",
            STREAM | {"eval_steps": 2, "val_set_size": 9},
        ),
        (
            STREAM | {"saves_per_epoch": 2},
            "saves_per_epoch: 2 — a stream has no epochs; write save_steps",
            STREAM | {"save_steps": 2},
        ),
        (
            STREAM | {"save_strategy": "epoch"},
            "save_strategy: epoch — a stream has no epochs; write save_steps",
            STREAM | {"save_strategy": "no"},
        ),
        (
            STREAM | {"eval_strategy": "epoch", "val_set_size": 9},
            "eval_strategy: epoch — a stream has no epochs; write eval_steps",
            STREAM | {"eval_strategy": "no", "val_set_size": 9},
        ),
        (
            STREAM | {"evaluation_strategy": "epoch", "val_set_size": 9},
            "evaluation_strategy: epoch — a stream has no epochs; write eval",
            STREAM | {"eval_steps": 2, "val_set_size": 9},
        ),
        ({"datasets": []}, "is empty; name at least one", DATA),
        ({"val_set_size": 5}, "has no effect without datasets", {"val_set_size": 0}),
        (
            DATA | {"early_stopping_patience": 3},
            "needs evaluation",
            HELD_OUT | {"early_stopping_patience": 3},
        ),
        (
            DATA | {"load_best_model_at_end": True},
            "needs evaluation",
            HELD_OUT | {"load_best_model_at_end": True},
        ),
        (
            HELD_OUT | {"eval_strategy": False, "early_stopping_patience": 3},
            "early_stopping_patience: 3 — needs evaluation",
            HELD_OUT | {"eval_strategy": "epoch", "early_stopping_patience": 3},
        ),
        (
            HELD_OUT | {"evals_per_epoch": 0, "early_stopping_patience": 3},
            "early_stopping_patience: 3 — needs evaluation",
            HELD_OUT | {"evals_per_epoch": 1, "early_stopping_patience": 3},
        ),
        (
            HELD_OUT | {"load_best_model_at_end": True, "save_strategy": False},
            "needs checkpoints; remove save_strategy: no",
            HELD_OUT | {"load_best_model_at_end": True},
        ),
        (
            HELD_OUT | {"load_best_model_at_end": True, "eval_steps": 5},
            "needs a checkpoint at every evaluation; save as often as you evaluate",
            HELD_OUT | {"load_best_model_at_end": True, "eval_steps": 5, "save_steps": 5},
        ),
        (
            HELD_OUT | {"load_best_model_at_end": True, "saves_per_epoch": 0},
            "needs checkpoints; remove saves_per_epoch: 0",
            HELD_OUT | BEST | {"load_best_model_at_end": True, "eval_steps": 5},
        ),
        (
            HELD_OUT | {"greater_is_better": True},
            "needs metric_for_best_model",
            HELD_OUT | {"greater_is_better": True, "metric_for_best_model": "eval_rewards/margins"},
        ),
        (
            {"fsdp_config": {"offload_params": True}},
            "fsdp_config: {'offload_params': True} — needs fsdp_version: 2",
            {"fsdp_config": {"offload_params": True, "fsdp_version": 2}},
        ),
        (
            {"fsdp_version": 2, "fsdp_config": {"fsdp_version": 1}},
            "fsdp_config.fsdp_version: 1 — contradicts fsdp_version: 2",
            {"fsdp_version": 2, "fsdp_config": {"fsdp_version": 2}},
        ),
        ({"chat_template": "jinja"}, "jinja needs chat_template_jinja", {"chat_template_jinja": "{{ x }}"}),
        (
            {"overrides_of_model_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
            "overrides_of_model_config.rope_scaling: {'type': 'linear', 'factor': 2.0} — has another name",
            {"overrides_of_model_config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
        ),
        ({"val_set_size": 1.5, "datasets": [{"path": "a"}]}, "whole one, or a share below 1", {}),
        (
            {"val_set_size": "2.5", "datasets": [{"path": "a"}]},
            "whole one, or a share below 1",
            {"val_set_size": "2", "datasets": [{"path": "a"}]},
        ),
        (
            {"unfrozen_parameters": ["lm_head", "("]},
            "( is no regular expression: missing )",
            {"unfrozen_parameters": ["lm_head", r"\("]},
        ),
        (
            LORA | {"lora_target_modules": "*proj"},
            "*proj is no regular expression: nothing to repeat",
            LORA | {"lora_target_modules": ".*proj"},
        ),
        (
            LORA | {"lora_rank_pattern": {"[": 4}},
            "[ is no regular expression",
            LORA | {"lora_rank_pattern": {"q_proj": 4}},
        ),
        ({"chat_template": "qwen_2.5"}, "did you mean qwen_25?", {"chat_template": "qwen_25"}),
        ({"chat_template": "phi_4"}, "write tokenizer_default, or", {"chat_template": "tokenizer_default"}),
        (
            {"chat_template": "chatml", "chat_template_jinja": "{{ x }}"},
            "contradicts chat_template: chatml; write chat_template: jinja",
            {"chat_template": "jinja", "chat_template_jinja": "{{ x }}"},
        ),
        (
            {"overrides_of_model_config": {}, "model_config": {}},
            "overrides_of_model_config: {} — means the same",
            {},
        ),
    ],
)
def test_keys_that_do_not_go_together(wrong: dict[str, Any], message: str, right: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        validate_config({"base_model": "m", "rl": "dpo", **wrong})
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    validate_config({"base_model": "m", "rl": "dpo", **right})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl": "dpo", "reference": {"source": "none"}}, "rl: dpo needs a reference; write auto"),
        (
            {"rl": "orpo", "reference": {"source": "separate_model"}},
            "has no effect: rl: orpo has no reference",
        ),
        ({"rl": "simpo", "reference": {"model": "x"}}, "has no effect: rl: simpo has no reference"),
        ({"rl": "cpo", "precompute_ref_log_probs": True}, "has no effect: rl: cpo has no reference"),
        ({"rl": None, "reference": {"model": "x"}}, "there is no reference without rl"),
        (
            {"reference": {"source": "initial_policy", "schedule": "live"}},
            "the initial policy is gone after step 1",
        ),
        (
            {"reference": {"source": "adapter_off"}},
            "adapter_off needs an adapter; write auto or separate_model",
        ),
        (
            {"reference": {"source": "initial_policy", "model": "x"}},
            "reference.model: x — has no effect with source",
        ),
        (
            {"reference": {"source": "initial_policy", "device": "cpu"}},
            "reference.device: cpu — has no effect",
        ),
        (
            LORA | {"rl_adapter_ref_model": True, "reference": {"source": "adapter_off"}},
            "rl_adapter_ref_model: True — contradicts reference.source: adapter_off",
        ),
        (
            {"precompute_ref_log_probs": True, "reference": {"schedule": "live"}},
            "precompute_ref_log_probs: True — contradicts reference.schedule: live",
        ),
        ({"reference": "separate_model"}, "reference: separate_model — must be a mapping"),
        (
            {"reference": {"source": "initial_policy", "load_in_8bit": True}},
            "reference.load_in_8bit: True — has no effect with source",
        ),
        (
            {"reference": {"source": "adapter_off", "adapter": "a"}} | LORA,
            "reference.adapter: a — has no effect with source: adapter_off",
        ),
        (
            {"reference": {"load_in_8bit": True, "load_in_4bit": True}},
            "reference.load_in_4bit: True — contradicts load_in_8bit",
        ),
        (
            {"reference": {"offload": "disk", "device": "cpu"}},
            "reference.device: cpu — cannot be combined with offload",
        ),
        (
            {"reference": {"offload": "disk", "load_in_4bit": True}},
            "reference.load_in_4bit: True — cannot be combined with offload",
        ),
        ({"reference": {"offload": "gpu"}}, "reference.offload: gpu — must be one of cpu or disk"),
        ({"reference": {"source": "endpoint"}}, "endpoint needs reference.endpoint: the server's URL"),
        (
            {"reference": {"endpoint": "http://h/v1"}},
            "needs reference.model: the model's name on that server",
        ),
        (
            {"reference": SERVED | {"source": "separate_model"}},
            "reference.endpoint: http://h/v1 — contradicts source: separate_model",
        ),
        (
            {"reference": SERVED | {"dtype": "bfloat16"}},
            "reference.dtype: bfloat16 — has no effect with endpoint",
        ),
        ({"reference": SERVED | {"adapter": "a"}}, "reference.adapter: a — has no effect with endpoint"),
        (
            {"reference": SERVED | {"endpoint": "h:8000"}},
            "must be a URL, for example http://localhost:8000/v1",
        ),
        (
            {"reference": SERVED | {"endpoint": "http://h/v1?key=secret"}},
            "must hold no credentials or query",
        ),
        (
            {"reference": SERVED | {"endpoint": "http://me:secret@h/v1"}},
            "must hold no credentials or query; put a key into the environment as FIDUCIAL_ENDPOINT_KEY",
        ),
        ({"rl_adapter_ref_model": "yes!"}, "must be true or false"),
        ({"precompute_ref_log_probs": "once"}, "must be true or false"),
        ({"reference": {"device": "cuda"}}, "reference.device: cuda — must be cpu"),
    ],
)
def test_a_reference_that_contradicts_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_config({"base_model": "m", "rl": "dpo", **settings})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"rl": "orpo", "reference": {"source": "none"}},
        {"rl": "dpo", "reference": SERVED},
        {"rl": "dpo", "reference": SERVED | {"source": "endpoint", "revision": "a"}},
        {"rl": "dpo", "reference": {"adapter": "a", "load_in_4bit": False}},
        {"rl": "dpo"} | LORA | {"reference": {"source": "frozen_adapter", "adapter": "a"}},
        {"rl": "orpo", "precompute_ref_log_probs": False, "rl_adapter_ref_model": False},
        {"rl": "dpo", "rl_beta": 0},
        {"rl": "dpo"} | LORA | {"reference": {"source": "frozen_adapter", "schedule": "live"}},
    ],
)
def test_references_that_are_fine(settings: dict[str, Any]) -> None:
    validate_config({"base_model": "m", **settings})


def test_harmless_leftovers_are_noted(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base_model: m\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
        "hub_strategy: end\n"
        "hub_private_repo: true\n"
        "lora_fan_in_fan_out: false\n"
    )
    notes = load_run(path).notes
    assert [note.split(":")[1].split("  ")[1] for note in notes] == [
        "lora_fan_in_fan_out",
        "gradient_checkpointing_kwargs",
        "hub_strategy",
        "hub_private_repo",
    ]


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (LORA | {"rl": "orpo"}, "asks for nothing: rl: orpo has no reference"),
        ({"rl": "dpo"}, "asks for what is so anyway: there is no adapter to switch off"),
    ],
)
def test_a_separate_copy_is_asked_for_in_vain(settings: dict[str, Any], note: str, tmp_path: Path) -> None:
    """axolotl's files have the switch in them; with it or without, it is the same run."""
    path = tmp_path / "run.yaml"
    asked = {"base_model": "m"} | DATA | settings | {"rl_adapter_ref_model": True}
    path.write_text(yaml.safe_dump(asked))
    assert any("rl_adapter_ref_model" in each and note in each for each in load_run(path).notes)
