"""From a `RunConfig` to transformers' `TrainingArguments`, and to the callbacks its settings ask for.

What is decided here and not passed on: a dataloader item is a whole optimizer step, so the batch size is that
of the step and transformers accumulates nothing; autocast is the scorer's, so transformers' own is off (but
for float16, whose gradients need its scaler); gradient checkpointing is switched on when the model is loaded.
"""

import math
import os
from difflib import get_close_matches
from enum import Enum
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils.import_utils import is_torch_tf32_available

from fiducial.compat import use_one_device
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError
from fiducial.model.precision import resolve_precision
from fiducial.reference.holding import offloads_policy
from fiducial.training.callbacks import BestMetricIsMeasured
from fiducial.training.optimizer_settings import check_optimizer_settings, optimizer_options

STEPS_INSIDE_BACKWARD = ("lomo", "adalomo")
FLASH_ATTENTION = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""The package of each; transformers takes a kernel from the hub instead where `kernels` is installed."""


def training_arguments(
    cfg: RunConfig, *, num_rows: int, has_evaluation: bool, resuming: bool = False
) -> TrainingArguments:
    """Arguments for `num_rows` training rows.

    Raises:
        ConfigError: a setting, or two together, that transformers or this machine cannot honour.
    """
    check_settings(cfg)
    steps_per_epoch = math.ceil(num_rows / (cfg.optimization.groups_per_step * world_size()))
    settings: dict[str, Any] = (
        _optimization(cfg)
        | _evaluation(cfg, steps_per_epoch, has_evaluation=has_evaluation, resuming=resuming)
        | _saving(cfg, steps_per_epoch)
        | _logging(cfg, steps_per_epoch)
        | distribution(cfg)
    )
    try:
        args = TrainingArguments(**{key: value for key, value in settings.items() if value is not None})
    except (ValueError, ImportError) as error:  # transformers checks combinations and optional packages
        raise ConfigError(f"The training settings do not go together: {error}") from error
    assert args.world_size == world_size(), "each process would train on its own"
    use_one_device(args)
    check_optimizer_settings(args)
    return args


def check_settings(cfg: RunConfig) -> None:
    """What can be said of the settings before any data is read.

    Raises:
        ConfigError: a name that transformers does not know, or what this machine or launch cannot honour.
    """
    _check_name("optimizer", cfg.optimization.optimizer, OptimizerNames)
    _check_name("lr_scheduler", cfg.optimization.lr_scheduler, SchedulerType)
    _check_optimizer(cfg)
    _check_tf32(cfg)
    _check_attention(cfg)
    _check_launch(cfg)


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def setting_callbacks(cfg: RunConfig) -> list[TrainerCallback]:
    """Callbacks of transformers that settings ask for."""
    patience, best = cfg.evaluation.early_stopping_patience, cfg.evaluation.metric_for_best_model
    callbacks: list[TrainerCallback] = [] if best is None else [BestMetricIsMeasured()]
    return callbacks if patience is None else [*callbacks, EarlyStoppingCallback(patience)]


def _optimization(cfg: RunConfig) -> dict[str, Any]:
    options = cfg.optimization
    return {
        "output_dir": cfg.output.output_dir,
        "per_device_train_batch_size": options.groups_per_step,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": options.num_epochs,
        "max_steps": options.max_steps,
        "learning_rate": options.learning_rate,
        "optim": options.optimizer,
        "optim_args": optimizer_options(options.optim_args),
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "adam_epsilon": options.adam_epsilon,
        "lr_scheduler_type": options.lr_scheduler,
        "lr_scheduler_kwargs": options.lr_scheduler_kwargs or None,
        "warmup_steps": _warmup(cfg),
        "seed": options.seed,
        "fp16": resolve_precision(cfg).autocast == torch.float16,
        "tf32": cfg.model.tf32,  # off, too: an earlier run of this process may have left it on
        "remove_unused_columns": False,
        "dataloader_num_workers": cfg.data.dataloader_num_workers if cfg.data else 0,
    }


def _evaluation(
    cfg: RunConfig, steps_per_epoch: int, *, has_evaluation: bool, resuming: bool
) -> dict[str, Any]:
    options = cfg.evaluation
    strategy = options.strategy
    if options.steps is not None or options.per_epoch is not None:
        strategy = "steps"
    if strategy != "no" and not has_evaluation:
        raise ConfigError(
            "eval_strategy: there is nothing to evaluate on. Hold rows out with val_set_size: 0.05, name "
            "test_datasets, or remove the evaluation settings."
        )
    best = options.metric_for_best_model
    if options.early_stopping_patience is not None and best is None:
        best = "loss"
    return {
        "eval_strategy": strategy,
        "eval_steps": _every(options.steps, options.per_epoch, steps_per_epoch),
        # A resumed run was evaluated at its start, when it started.
        "eval_on_start": strategy != "no" and not resuming,
        "per_device_eval_batch_size": options.batch_size or cfg.optimization.groups_per_step,
        "metric_for_best_model": best,
        "greater_is_better": options.greater_is_better,
        "load_best_model_at_end": options.load_best_model_at_end,
    }


def _saving(cfg: RunConfig, steps_per_epoch: int) -> dict[str, Any]:
    options = cfg.output
    by_steps = options.save_steps is not None or options.saves_per_epoch is not None
    return {
        "save_strategy": "steps" if by_steps else options.save_strategy,
        "save_steps": _every(options.save_steps, options.saves_per_epoch, steps_per_epoch),
        "save_total_limit": options.save_total_limit,
        "save_only_model": options.save_only_model,
        "push_to_hub": options.hub_model_id is not None,
        "hub_model_id": options.hub_model_id,
        "hub_strategy": options.hub_strategy,
        "hub_private_repo": options.hub_private_repo,
    }


def _logging(cfg: RunConfig, steps_per_epoch: int) -> dict[str, Any]:
    options = cfg.output
    steps = cfg.optimization.max_steps or math.ceil(cfg.optimization.num_epochs * steps_per_epoch)
    return {
        "logging_strategy": "steps",
        "logging_steps": options.logging_steps or min(max(round(0.005 * steps), 1), 10),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "report_to": list(options.loggers) or "none",
        "run_name": options.run_name,
        "project": options.project,
        "disable_tqdm": True,  # the progress bar is `fiducial.training.progress`
        "log_level_replica": "error",  # what transformers warns of is the same in every process
    }


def distribution(cfg: RunConfig) -> dict[str, Any]:
    """How the run is spread over processes, in the names of `TrainingArguments`."""
    options = cfg.distributed
    return {
        "fsdp": True if options.fsdp_version is not None else None,
        "fsdp_config": _fsdp_config(options.fsdp_config) if options.fsdp_version is not None else None,
        # Without a GPU several processes find each other only if told that this is meant.
        "use_cpu": not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"),
        # Gradients of offloaded weights are clipped on the CPU, where NCCL adds up nothing.
        "ddp_backend": "cuda:nccl,cpu:gloo" if offloads_policy(cfg) and torch.cuda.is_available() else None,
        "ddp_timeout": options.ddp_timeout,
        "ddp_bucket_cap_mb": options.ddp_bucket_cap_mb,
        # Every pass of every process uses every trained weight; looking for unused ones costs time.
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": options.ddp_broadcast_buffers,
    }


def _fsdp_config(options: dict[str, Any] | None) -> dict[str, Any]:
    config = dict(options or {}) | {"version": 2}
    config.pop("fsdp_version", None)
    if "offload_params" in config:
        config["cpu_offload"] = config.pop("offload_params")
    return config


def _every(steps: float | None, per_epoch: int | None, steps_per_epoch: int) -> float | None:
    return max(round(steps_per_epoch / per_epoch), 1) if per_epoch is not None else steps


def _warmup(cfg: RunConfig) -> float:
    """Steps, or below 1 a share of all steps, which is how transformers tells them apart."""
    if cfg.optimization.warmup_steps is not None:
        return cfg.optimization.warmup_steps
    return min(cfg.optimization.warmup_ratio or 0.0, math.nextafter(1.0, 0.0))


def _check_optimizer(cfg: RunConfig) -> None:
    name = cfg.optimization.optimizer
    if name in STEPS_INSIDE_BACKWARD or name.endswith("_layerwise"):
        raise ConfigError(
            f"optimizer: {name} updates weights inside backward, so a step could not be cut into "
            "micro-batches without changing its result. Use adafactor, or adapter: lora, to save memory."
        )


def _check_name(key: str, name: str, known: type[Enum]) -> None:
    names = [member.value for member in known]
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"write one of {', '.join(names)}"
        raise ConfigError(f"{key}: {name} is no {key} of transformers; {hint}")


def _check_tf32(cfg: RunConfig) -> None:
    if cfg.model.tf32 and not is_torch_tf32_available():
        raise ConfigError(
            "tf32: true needs an NVIDIA GPU of the Ampere generation or newer, and there is none. Remove it, "
            "or write tf32: auto."
        )


def _check_attention(cfg: RunConfig) -> None:
    asked = cfg.model.attn_implementation
    package = FLASH_ATTENTION.get(asked or "")
    if package is None or find_spec(package) or find_spec("kernels"):
        return
    raise ConfigError(
        f"attn_implementation: {asked} needs the package {package}, which is not installed. Install it, or "
        "remove attn_implementation (or flash_attention: true): packed rows have Fiducial's own attention, "
        "and it is asked for padded ones alone."
    )


def _check_launch(cfg: RunConfig) -> None:
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", ""):
        raise ConfigError(
            f"accelerate was launched with mixed precision {mixed}, which would override the run's own. "
            "Set bf16 or fp16 in the YAML and launch with --mixed_precision no."
        )
    if _launched("DEEPSPEED"):
        raise ConfigError(
            "accelerate was launched with --use_deepspeed, which is not in this version. Launch without it, "
            "and shard with fsdp_version: 2 in the YAML."
        )
    if _launched("FSDP") and cfg.distributed.fsdp_version is None:
        raise ConfigError(
            "accelerate was launched with --use_fsdp, which would shard the model without the run knowing. "
            "Set fsdp_version: 2 in the YAML, or launch without it."
        )
    if cfg.distributed.fsdp_version is None:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "fsdp_version: there is no GPU, and on a CPU accelerate would replicate the model instead of "
            "sharding it, without a word. Remove it."
        )
    if world_size() > 1:
        return
    if not offloads_policy(cfg):
        raise ConfigError(
            "fsdp_version: one process has nothing to shard between. Launch with torchrun, or keep the "
            "weights in the CPU's memory with fsdp_config: {offload_params: true}."
        )
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "fsdp_config: offload_params needs torchrun, for one process too: "
            "torchrun --nproc-per-node 1 -m fiducial train run.yaml."
        )


def _launched(kind: str) -> bool:
    """Whether accelerate's launcher was told to spread the model in this way."""
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"
