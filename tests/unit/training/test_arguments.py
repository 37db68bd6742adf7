"""Every setting reaches transformers, and what cannot be honoured is refused."""

import logging
import sys
from typing import Any

import pytest
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from fiducial.config.load import validate_config
from fiducial.errors import ConfigError
from fiducial.training.arguments import check_settings, setting_callbacks, training_arguments

BASE = {"base_model": "m", "rl": "dpo", "datasets": [{"path": "d.jsonl"}], "output_dir": "unused-out"}
HELD_OUT = {"val_set_size": 0.1}


def arguments(rows: int = 100, *, resuming: bool = False, **settings: Any):
    cfg = validate_config(BASE | settings)
    held_out = bool(cfg.data and (cfg.data.val_set_size or cfg.data.test_datasets))
    return training_arguments(cfg, num_rows=rows, has_evaluation=held_out, resuming=resuming)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"learning_rate": 3e-4}, {"learning_rate": 3e-4}),
        ({"optimizer": "adafactor"}, {"optim": "adafactor"}),
        (
            {"optimizer": "sgd", "optim_args": {"momentum": 0.9}},
            {"optim": "sgd", "optim_args": "momentum=0.9"},
        ),
        ({"weight_decay": 0.1, "max_grad_norm": 0.5}, {"weight_decay": 0.1, "max_grad_norm": 0.5}),
        (
            {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
            {"adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
        ),
        ({"lr_scheduler": "constant_with_warmup"}, {"lr_scheduler_type": SchedulerType.CONSTANT_WITH_WARMUP}),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        ),
        ({"warmup_steps": 7}, {"warmup_steps": 7}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"num_epochs": 2.5}, {"num_train_epochs": 2.5, "max_steps": -1}),
        ({"max_steps": 12}, {"max_steps": 12}),
        (
            {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
            {
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "per_device_eval_batch_size": 8,
            },
        ),
        ({"seed": 7}, {"seed": 7, "tf32": False}),
        (
            {"save_steps": 5, "save_total_limit": 2},
            {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2},
        ),
        ({"saves_per_epoch": 4}, {"save_strategy": "steps", "save_steps": 25}),
        ({"save_strategy": "no"}, {"save_strategy": "no"}),
        ({"save_only_model": True}, {"save_only_model": True}),
        (
            HELD_OUT | {"evals_per_epoch": 2},
            {"eval_strategy": "steps", "eval_steps": 50, "eval_on_start": True},
        ),
        (HELD_OUT | {"eval_steps": 0.2}, {"eval_strategy": "steps", "eval_steps": 0.2}),
        (HELD_OUT | {"eval_batch_size": 3}, {"eval_strategy": "epoch", "per_device_eval_batch_size": 3}),
        (
            HELD_OUT | {"load_best_model_at_end": True, "metric_for_best_model": "rewards/accuracies"},
            {
                "load_best_model_at_end": True,
                "metric_for_best_model": "rewards/accuracies",
                "greater_is_better": True,
            },
        ),
        (
            HELD_OUT | {"metric_for_best_model": "kl", "greater_is_better": False},
            {"greater_is_better": False},
        ),
        (
            {"logging_steps": 3},
            {"logging_steps": 3, "logging_first_step": True, "logging_nan_inf_filter": False},
        ),
        ({"use_tensorboard": True}, {"report_to": ["tensorboard"]}),
        (
            {},
            {"report_to": [], "run_name": None, "remove_unused_columns": False, "fp16": False, "bf16": False},
        ),
        ({"dataloader_num_workers": 2}, {"dataloader_num_workers": 2}),
        ({"ddp_timeout": 60, "ddp_bucket_cap_mb": 5}, {"ddp_timeout": 60, "ddp_bucket_cap_mb": 5}),
        (
            {"ddp_broadcast_buffers": True},
            {"ddp_broadcast_buffers": True, "ddp_find_unused_parameters": False},
        ),
        (
            {"hub_model_id": "me/mine"},
            {"push_to_hub": True, "hub_model_id": "me/mine", "hub_private_repo": True},
        ),
        ({"hub_model_id": "me/mine", "hub_private_repo": False}, {"hub_private_repo": False}),
    ],
)
def test_a_setting_reaches_transformers(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    args = arguments(**settings)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("rows", "processes", "saves", "steps"),
    [(100, 1, 6, 17), (10, 1, 30, 1), (41, 1, 1, 11), (41, 2, 1, 6)],
)
def test_a_number_an_epoch_is_one_of_steps(
    rows: int, processes: int, saves: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiducial.training.arguments.world_size", lambda: processes)
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    batch = 4 if saves == 1 else 1
    assert arguments(rows, saves_per_epoch=saves, micro_batch_size=batch).save_steps == steps


def test_a_warm_up_may_last_the_whole_run() -> None:
    assert arguments(warmup_ratio=1.0).get_warmup_steps(50) == 50


@pytest.mark.parametrize(("rows", "steps"), [(100, 1), (600, 3), (100_000, 10)])
def test_logging_follows_the_length_of_the_run(rows: int, steps: int) -> None:
    assert arguments(rows).logging_steps == steps


def test_attention_that_is_not_installed_is_missed_before_data_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """axolotl's files all name it, and only padded rows have a use for it."""
    cfg = validate_config(BASE | {"flash_attention": True})
    monkeypatch.setattr("fiducial.training.arguments.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"flash_attention_2 needs .* flash_attn, .*flash_attention: true\)"
    ):
        check_settings(cfg)
    monkeypatch.setattr("fiducial.training.arguments.find_spec", lambda name: object())
    check_settings(cfg)


def test_a_resumed_run_is_not_evaluated_at_its_start_again() -> None:
    assert not arguments(resuming=True, **HELD_OUT).eval_on_start


def test_early_stopping_is_a_callback() -> None:
    cfg = validate_config(BASE | HELD_OUT | {"early_stopping_patience": 2})
    (callback,) = setting_callbacks(cfg)
    assert callback.early_stopping_patience == 2
    assert arguments(**HELD_OUT, early_stopping_patience=2).metric_for_best_model == "loss"
    assert setting_callbacks(validate_config(BASE)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adalomo"}, "inside backward"),
        ({"optimizer": "galore_adamw_layerwise"}, "inside backward"),
        (
            {"optimizer": "adamw_torch_fuzed"},
            "optimizer: adamw_torch_fuzed .* did you mean adamw_torch_fused",
        ),
        ({"optimizer": "zzz"}, "optimizer: zzz .* write one of adamw_torch, "),
        ({"lr_scheduler": "cosinus"}, "lr_scheduler: cosinus .* did you mean cosine"),
        ({"tf32": True}, "tf32: true needs an NVIDIA GPU"),
        ({"optim_args": {"betas": 3}}, "optim_args: adamw_torch_fused does not read betas"),
        ({"optimizer": "sgd", "optim_args": "momentum=0.9,foo=3"}, "sgd does not read foo"),
        (
            {"optimizer": "sgd", "optim_args": {"momentum": "much"}},
            "optim_args: sgd cannot use momentum=much",
        ),
        ({"optimizer": "sgd", "optim_args": "momentum"}, "'momentum' is not of the form name=value"),
        ({"lr_scheduler_kwargs": {"foo": 3}}, "lr_scheduler: cosine cannot be made .* 'foo'"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "lr_scheduler: cosine_with_min_lr .* min_lr"),
        ({"fsdp_version": 2}, "there is no GPU"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "requires an eval strategy"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(**settings)


def test_an_optimizer_whose_package_is_missing_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("galore_torch", "schedulefree"):
        monkeypatch.setitem(sys.modules, module, None)
    for optimizer, package in {"galore_adamw": "galore_torch", "schedule_free_adamw": "schedulefree"}.items():
        with pytest.raises(
            ConfigError, match=rf"optimizer: {optimizer} is not at hand: .*install `{package}`"
        ):
            arguments(optimizer=optimizer)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("sgd", {"momentum": 0.0}),
        ("sgd", {"nesterov": False}),
        ("ademamix", {"alpha": 5.0}),  # its default, which changes nothing
    ],
)
def test_options_that_the_optimizer_reads_may_have_any_value(optimizer: str, options: dict[str, Any]) -> None:
    arguments(optimizer=optimizer, optim_args=options)


def test_another_precision_from_the_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="mixed_precision no"):
        arguments()


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_the_run_does_not_know_of_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(ConfigError, match=f"--use_{kind.lower()}.*fsdp_version: 2"):
        arguments()


def test_fsdp_settings_reach_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    from fiducial.training.arguments import _check_launch, distribution

    cfg = validate_config(
        BASE | {"fsdp_version": 2, "fsdp_config": {"offload_params": True, "reshard_after_forward": True}}
    )
    _check_launch(cfg)
    settings = distribution(cfg)
    assert settings["fsdp"] is True
    assert settings["fsdp_config"] == {"version": 2, "cpu_offload": True, "reshard_after_forward": True}
    assert settings["ddp_backend"] == "cuda:nccl,cpu:gloo"


def test_one_process_may_offload_but_has_nothing_to_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    sharded: dict[str, Any] = BASE | {"fsdp_version": 2}
    with pytest.raises(ConfigError, match=r"nothing to shard between.*offload_params: true"):
        check_settings(validate_config(sharded))
    offloaded = validate_config(sharded | {"fsdp_config": {"offload_params": True}})
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 1"):
        check_settings(offloaded)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_settings(offloaded)


def test_one_process_passes_on_what_transformers_warns_of(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = arguments()
    assert chosen.get_process_log_level() < logging.ERROR
    monkeypatch.setattr(type(chosen), "should_log", False)
    assert chosen.get_process_log_level() == logging.ERROR
