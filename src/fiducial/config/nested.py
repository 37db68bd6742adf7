"""Keys inside a key: datasets, `reference`, `trl`, `peft`, `fsdp_config`, `special_tokens`."""

import difflib
from collections.abc import Iterator
from functools import partial
from typing import Any

from fiducial.config.document import KeyPath
from fiducial.config.outcomes import Note, Outcome, Outcomes, Refuse, Settings
from fiducial.config.schema import DatasetConfig, ReferenceConfig
from fiducial.config.unsupported import Unsupported, drop, no, table

_GENERATION = "for methods that generate while they train; remove it"
_ONE_TEMPLATE = "one template serves the whole run; write it at the top level"
_EVERY_TOKEN = "preference losses score every completion token; remove it"
_TOKENS = (
    "role or from and content or value are read; "
    "for others write message_property_mappings: {role: ..., content: ...}"
)

_TEMPLATE = ("chat_template", "chat_template_jinja")
_DATASET = table(
    (" ".join(_TEMPLATE), no(_ONE_TEMPLATE)),
    ("message_field_role", no(_TOKENS, "role", "from")),
    ("message_field_content", no(_TOKENS, "content", "value")),
    ("field_human field_model conversation", no(_TOKENS)),
    ("message_field_training message_field_training_detail", no(_EVERY_TOKEN)),
    ("roles_to_train train_on_eos train_on_eot", no(_EVERY_TOKEN)),
    ("preprocess_shards", drop("how rows are read cannot change the result")),
    (
        "shards_idx",
        no("shards takes the first one; take another part with split, for example train[25%:50%]"),
    ),
    (
        "field input_format input_transform",
        no("for supervised data; name the columns with field_prompt, field_chosen, ..."),
    ),
    ("field_thinking template_thinking_key split_thinking", no("not in this version; remove it")),
    ("drop_system_message", no("not in this version; remove system messages from the data")),
    ("logprobs_field temperature", no("for distillation; remove it")),
    (
        "trust_remote_code",
        no("datasets no longer runs dataset scripts; remove it, and convert such data to parquet or jsonl"),
    ),
)
_DATASET_INFO = {
    "file_name": "write path",
    "hf_hub_url": "write path",
    "subset": "write name",
    "num_samples": "write split: 'train[:1000]'",
    "formatting": "the columns say which format it is; remove it, or write type",
    "ranking": "the columns say which format it is; remove it, or write type",
    "columns": "name them with field_messages, field_prompt, field_chosen, ...",
    "tags": "write roles and message_property_mappings",
}
"""Keys of LLaMA-Factory's dataset_info.json: what to do in a dataset here."""
_TRL = table(
    ("chat_template_kwargs", no("write it at the top level")),
    ("use_liger_loss", drop("the log-prob head always works in chunks")),
    (
        "max_completion_length use_vllm vllm_mode vllm_server_timeout vllm_guided_decoding_regex",
        no(_GENERATION),
    ),
    ("vllm_server_host", no(_GENERATION, "0.0.0.0")),
    ("vllm_server_port", no(_GENERATION, 8000)),
    ("vllm_enable_sleep_mode vllm_sync_interval vllm_lora_sync", no(_GENERATION)),
    ("vllm_importance_sampling_correction vllm_importance_sampling_mode", no(_GENERATION)),
    ("vllm_importance_sampling_cap off_policy_mask_threshold use_bias_correction_kl", no(_GENERATION)),
    ("reward_funcs reward_weights reward_num_workers rollout_func", no(_GENERATION, 1)),
    ("generation_batch_size num_generations generation_kwargs num_iterations", no(_GENERATION)),
    ("log_completions num_completions_to_print mask_truncated_completions", no(_GENERATION)),
    ("scale_rewards replay_recompute_logps skip_zero_advantage_batches", no(_GENERATION, True)),
    ("temperature top_p top_k min_p repetition_penalty", no(_GENERATION)),
    ("importance_sampling_level epsilon epsilon_high multi_objective_aggregation", no(_GENERATION)),
    ("loss_type", no("write dpo_loss_type at the top level")),
    ("use_data_producer async_prefetch prefetch_depth replay_buffer_size", no(_GENERATION)),
    ("streaming_partial_batch streaming_min_groups", no(_GENERATION)),
    ("reroll_start_fraction reroll_max_groups", no(_GENERATION, 1, 1.0)),
)
_FSDP = table(
    ("use_orig_params sync_module_states", drop("belongs to FSDP 1; FSDP 2 always does it")),
    (
        "limit_all_gathers backward_prefetch forward_prefetch",
        drop("belongs to FSDP 1; it cannot change the result"),
    ),
    (
        "sharding_strategy",
        no("belongs to FSDP 1; write reshard_after_forward: true for FULL_SHARD, false for SHARD_GRAD_OP"),
    ),
    ("activation_checkpointing", no("write gradient_checkpointing: true, which works with FSDP 2 too")),
    ("final_state_dict_type", drop("the final model is always saved whole")),
    ("cpu_offload_pin_memory mixed_precision_policy", no("not in this version; precision follows bf16")),
)
_SPECIAL_TOKENS = table(("additional_special_tokens", no("list them under tokens")))

_INSIDE: dict[str, tuple[str, dict[str, Unsupported]]] = {
    "datasets": (" ".join(DatasetConfig.model_fields), _DATASET),
    "test_datasets": (" ".join(DatasetConfig.model_fields), _DATASET),
    "datasets.type": (
        "field_prompt field_system field_chosen field_rejected field_completion field_label"
        " prompt_format chosen_format rejected_format completion_format",
        {},
    ),
    "reference": (" ".join(ReferenceConfig.model_fields), {}),
    "trl": ("beta sync_ref_model ref_model_mixup_alpha ref_model_sync_steps", _TRL),
    "peft": ("loftq_config", {}),
    "fsdp_config": (
        "fsdp_version offload_params cpu_ram_efficient_loading state_dict_type auto_wrap_policy"
        " transformer_layer_cls_to_wrap min_num_params reshard_after_forward",
        _FSDP,
    ),
    "special_tokens": ("bos_token eos_token pad_token unk_token", _SPECIAL_TOKENS),
}
"""Key to what may stand inside it, and what is known there and not acted on."""


def nested_keys() -> Iterator[str]:
    """Every supported nested key as `outer.inner`."""
    for outer, (inner, _) in _INSIDE.items():
        yield from (f"{outer}.{key}" for key in inner.split())


def check_inside(settings: Settings) -> Outcomes:
    """What to say about the keys inside the mappings of `settings`."""
    for outer in ("reference", "trl", "peft", "fsdp_config", "special_tokens"):
        yield from _check(settings.get(outer), (outer,), outer)
    for outer in ("datasets", "test_datasets"):
        items = settings.get(outer)
        for index, item in enumerate(items if isinstance(items, list) else []):
            yield from map(partial(_leave_out_repeated, settings), _check(item, (outer, index), outer))
            kind = item.get("type") if isinstance(item, dict) else None
            yield from _check(kind, (outer, index, "type"), "datasets.type")


def _leave_out_repeated(settings: Settings, outcome: Outcome) -> Outcome:
    """A note in place of the error for a dataset's template that is the run's own."""
    match outcome:
        case Refuse((str(outer), int(index), str(key)), why) if key in _TEMPLATE:
            if settings[outer][index][key] == settings.get(key):
                return Note((outer, index, key), why)
    return outcome


def _check(value: Any, path: KeyPath, outer: str) -> Outcomes:
    """Unknown and unsupported keys of the mapping at `path`; other values are the schema's business."""
    if not isinstance(value, dict):
        return
    supported, known = _INSIDE[outer][0].split(), _INSIDE[outer][1]
    for key, inner in value.items():
        name = _name(key, outer)
        entry = known.get(name)
        if name in supported:
            if name != key and name in value:
                yield Refuse((*path, key), f"means the same as {name}; keep one of them")
            continue
        if entry is None:
            near = difflib.get_close_matches(str(name), supported, n=1)
            other = _DATASET_INFO.get(key) if outer in ("datasets", "test_datasets") else None
            yield Refuse((*path, key), f"unknown key; {other or _meant(str(key), near, supported)}")
        elif inner is not None:
            yield (
                Note((*path, key), entry.why)
                if entry.changes_nothing(inner)
                else Refuse((*path, key), entry.why)
            )


def supported_part(value: Any, outer: str) -> Any:
    """`value` without the keys that are not acted on inside `outer`, and without nulls."""
    if outer not in _INSIDE:
        return value
    if isinstance(value, list):
        return [supported_part(item, outer) for item in value]
    if not isinstance(value, dict):
        return value
    supported = _INSIDE[outer][0].split()
    named = {_name(key, outer): inner for key, inner in value.items()}
    kept = {key: inner for key, inner in named.items() if key in supported and inner is not None}
    if (
        outer in ("datasets", "test_datasets")
        and "path" not in kept
        and {"data_files", "ds_type"} <= kept.keys()
    ):
        kept["path"] = kept["ds_type"]  # as axolotl's documentation names local files
    return kept


def _name(key: Any, outer: str) -> Any:
    """`key` as it is called here: axolotl's older files write `fsdp_` before options of `fsdp_config`."""
    is_older = outer == "fsdp_config" and isinstance(key, str) and key != "fsdp_version"
    return key.removeprefix("fsdp_") if is_older else key


def _meant(key: str, near: list[str], supported: list[str]) -> str:
    if ":" in key:
        return f"a colon is followed by a space; write {key.replace(':', ': ')}"
    return f"did you mean {near[0]}?" if near else f"here may stand {', '.join(supported)}"
