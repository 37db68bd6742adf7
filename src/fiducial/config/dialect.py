"""The dialect: which key of the user's YAML sets which field of `RunConfig`.

`DIRECT` keys are copied as they are. `CONVERTED` keys are read together by a conversion, because one field
depends on several of them. Everything else that axolotl knows is in the tables of unsupported keys.
"""

import difflib
from collections.abc import Callable

from fiducial.config import (
    conversions,
    method_keys,
    reference_keys,
    schedule_keys,
    unsupported_model,
    unsupported_run,
)
from fiducial.config.nested import nested_keys
from fiducial.config.other_tools import NO_KEY, OTHER_NAMES
from fiducial.config.outcomes import Outcomes, Settings
from fiducial.config.unsupported import Unsupported

_SAME_NAME = {
    "model": "base_model trust_remote_code allow_pickle_weights load_in_8bit load_in_4bit bnb_config_kwargs"
    " reinit_weights unfrozen_parameters gradient_checkpointing gradient_checkpointing_kwargs liger_rope"
    " liger_rms_norm liger_glu_activation",
    "tokenizer": "special_tokens tokens mean_resizing_embeddings chat_template chat_template_jinja"
    " chat_template_kwargs",
    "data": "datasets test_datasets val_set_size sequence_len streaming dataloader_num_workers",
    "optimization": "learning_rate optimizer optim_args weight_decay max_grad_norm adam_beta1 adam_beta2"
    " adam_epsilon lr_scheduler lr_scheduler_kwargs warmup_steps warmup_ratio num_epochs max_steps"
    " micro_batch_tokens seed",
    "evaluation": "metric_for_best_model greater_is_better load_best_model_at_end early_stopping_patience",
    "distributed": "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers",
    "output": "output_dir save_total_limit save_only_model logging_steps log_entropy resume_from_checkpoint"
    " hub_model_id hub_strategy hub_private_repo",
}
"""Section to the fields whose key is the field's name."""

_RENAMED = {
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "model_config": "model.config_overrides",
    "overrides_of_model_config": "model.config_overrides",
    "tokenizer_config": "tokenizer.path",
    "tokenizer_use_fast": "tokenizer.use_fast",
    "resize_token_embeddings_to_32x": "tokenizer.resize_embeddings_to_32x",
    "adapter": "adapter.kind",
    "lora_model_dir": "adapter.path",
    "lora_r": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target_modules": "adapter.target_modules",
    "lora_target_linear": "adapter.target_linear",
    "lora_target_parameters": "adapter.target_parameters",
    "lora_modules_to_save": "adapter.modules_to_save",
    "lora_fan_in_fan_out": "adapter.fan_in_fan_out",
    "lora_rank_pattern": "adapter.rank_pattern",
    "lora_alpha_pattern": "adapter.alpha_pattern",
    "peft_layers_to_transform": "adapter.layers_to_transform",
    "peft_layers_pattern": "adapter.layers_pattern",
    "peft_layer_replication": "adapter.layer_replication",
    "peft_use_dora": "adapter.use_dora",
    "peft_use_rslora": "adapter.use_rslora",
    "peft_init_lora_weights": "adapter.init_lora_weights",
    "peft_trainable_token_indices": "adapter.trainable_token_indices",
    "peft_ensure_weight_tying": "adapter.ensure_weight_tying",
    "peft_autocast_adapter_dtype": "adapter.autocast_adapter_dtype",
    "peft_bias": "adapter.bias",
    "excess_length_strategy": "data.excess_length",
    "shuffle_merged_datasets": "data.shuffle",
    "streaming_multipack_buffer_size": "data.shuffle_buffer",
    "dataset_exact_deduplication": "data.exact_deduplication",
    "dataset_prepared_path": "data.prepared_path",
    "dataset_num_proc": "data.num_proc",
    "dataset_processes": "data.num_proc",
    "eval_batch_size": "evaluation.batch_size",
    "auto_resume_from_checkpoints": "output.auto_resume",
}

DIRECT: dict[str, str] = _RENAMED | {
    key: f"{section}.{key}" for section, keys in _SAME_NAME.items() for key in keys.split()
}
"""Key to `section.field`."""

KEY_OF = {target: key for key, target in reversed(DIRECT.items())}
"""`section.field` to the key that sets it."""

ONE_FIELD_TWO_KEYS = tuple(
    (first, second)
    for first, target in DIRECT.items()
    for second, other in DIRECT.items()
    if first < second and target == other
)
"""Keys that mean the same; a run sets one of each pair."""

Conversion = Callable[[Settings], Outcomes]

CONVERTED: tuple[tuple[Conversion, str], ...] = (
    (conversions.precision, "bf16 bfloat16 fp16 float16 float32 tf32"),
    (
        conversions.attention,
        "attn_implementation flash_attention sdp_attention eager_attention flex_attention xformers_attention"
        " sample_packing eval_sample_packing",
    ),
    (method_keys.method, " ".join(method_keys.KEYS)),
    (reference_keys.reference, "reference rl_adapter_ref_model precompute_ref_log_probs"),
    (conversions.loftq, "peft"),
    (conversions.sharding, "fsdp_version fsdp_config"),
    (schedule_keys.batches, "micro_batch_size gradient_accumulation_steps batch_size"),
    (schedule_keys.evaluation, "eval_steps evals_per_epoch eval_strategy evaluation_strategy"),
    (schedule_keys.saving, "save_steps saves_per_epoch save_strategy"),
    (
        schedule_keys.logging,
        " ".join(
            [
                *schedule_keys.LOGGERS,
                *schedule_keys.ENVIRONMENT,
                *schedule_keys.RUN_NAMES,
                "trackio_project_name",
            ]
        ),
    ),
)
"""Each conversion and the keys it reads."""

SUPPORTED = frozenset(DIRECT).union(*(keys.split() for _, keys in CONVERTED))

UNSUPPORTED: dict[str, Unsupported] = {
    key: entry
    for table in (
        unsupported_model.METHOD,
        unsupported_model.MODEL,
        unsupported_model.ADAPTER,
        unsupported_run.DATA,
        unsupported_run.OPTIMIZATION,
        unsupported_run.EVALUATION,
        unsupported_run.OUTPUT,
        unsupported_run.HARDWARE,
        unsupported_run.KERNELS,
    )
    for key, entry in table.items()
}


def unsupported(key: str) -> Unsupported | None:
    """Why a known key is not acted on; None for keys that are supported or unknown."""
    if key in UNSUPPORTED:
        return UNSUPPORTED[key]
    families = [entry for prefix, entry in unsupported_run.PREFIXES.items() if key.startswith(prefix)]
    return families[0] if families and key not in SUPPORTED else None


def suggest(key: str) -> str:
    """What an unknown top-level key was probably meant to be, as the end of a sentence."""
    if key in OTHER_NAMES:
        return f"write {OTHER_NAMES[key]}"
    if key in NO_KEY:
        return NO_KEY[key]
    inside = [path for path in nested_keys() if path.rpartition(".")[2] == key]
    if inside:
        return f"it belongs under {inside[0].rpartition('.')[0]}"
    near = difflib.get_close_matches(key, sorted(SUPPORTED), n=1)
    return f"did you mean {near[0]}?" if near else "docs/from-axolotl.md lists every key"
