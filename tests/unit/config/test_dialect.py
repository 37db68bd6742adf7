"""The tables: every key of axolotl is known, every field can be set, no value of a key breaks the reader."""

import re
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fiducial.config import dialect, nested
from fiducial.config.load import validate_config
from fiducial.config.method_keys import HYPERPARAMETERS
from fiducial.config.methods import METHODS
from fiducial.config.other_tools import NO_KEY, OTHER_NAMES
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError

AXOLOTL_KEYS = """
accelerator_config activation_offloading adam_beta1 adam_beta2 adam_beta3 adam_epsilon adam_epsilon2 adapter
added_tokens_overrides attn_implementation auto_find_batch_size auto_resume_from_checkpoints
axolotl_config_path base_model base_model_config batch_flattening batch_size bench_dataset bench_split bf16
bfloat16 bnb_config_kwargs center_rewards_coefficient chat_template chat_template_jinja chat_template_kwargs
chunked_cross_entropy chunked_cross_entropy_num_chunks cls_model_config comet_api_key
comet_experiment_config comet_experiment_key comet_mode comet_online comet_project_name comet_workspace
context_parallel_size cosine_constant_lr_ratio cosine_min_lr_ratio cpo_alpha curriculum_sampling
cut_cross_entropy dataloader_drop_last dataloader_num_workers dataloader_pin_memory
dataloader_prefetch_factor dataset_exact_deduplication dataset_keep_in_memory dataset_num_proc
dataset_prepared_path dataset_processes dataset_shard_idx dataset_shard_num datasets ddp
ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_timeout deepcompile deepspeed
default_system_message device device_map dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of
do_bench_eval do_causal_lm_eval dp_replicate_size dp_shard_size dpo_beta dpo_generate_during_eval
dpo_label_smoothing dpo_loss_type dpo_loss_weights dpo_norm_loss dpo_padding_free dpo_use_liger_kernel
dpo_use_logits_to_keep dpo_use_weighting dynamic_checkpoint eaft_alpha eaft_k eager_attention
early_stopping_patience ebft embedding_lr embedding_lr_scale embeddings_skip_upcast eot_tokens
eval_batch_size eval_causal_lm_metrics eval_max_new_tokens eval_sample_packing eval_sequence_len eval_steps
eval_strategy eval_table_size evals_per_epoch evaluation_strategy excess_length_strategy
experimental_skip_move_to_device expert_backend experts_implementation fix_untrained_tokens flash_attention
flash_attn_cross_entropy flash_attn_d512 flash_attn_fuse_mlp flash_attn_rms_norm flash_optimum
flex_attention flex_attn_compile_kwargs float16 float32 fp16 fp32_norm_classes fp32_norms fp8 fp8_config
fp8_enable_fsdp_float8_all_gather freeze_mm_modules fsdp fsdp_config fsdp_final_state_dict_type fsdp_version
fused_attn_kernel gc_collect_steps gc_steps gemma4_hybrid_attn_impl generate_samples generation_do_sample
generation_max_new_tokens generation_prompt_ratio generation_temperature generation_top_k generation_top_p
gptq gpu_memory_limit gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
gradio_max_new_tokens gradio_server_name gradio_server_port gradio_share gradio_temperature gradio_title
greater_is_better group_by_length heads_k_stride hf_mlflow_log_artifacts hf_use_auth_token hub_model_id
hub_revision hub_strategy image_resize_algorithm image_size include_tkps include_tokens_per_second
is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_preprocess is_qwen_derived_model
jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps kto_desirable_weight
kto_undesirable_weight large_head_attention layer_offloading learning_rate liger_cross_entropy
liger_fused_linear_cross_entropy liger_glu_activation liger_kernel_impl liger_layer_norm liger_rms_norm
liger_rms_norm_gated liger_rope liger_use_token_scaling lisa_layers_attribute lisa_n_layers
lisa_step_interval llama4_linearized_experts load_best_model_at_end load_in_4bit load_in_8bit local_rank
logging_steps lora_alpha lora_alpha_pattern lora_dropout lora_embedding_kernel lora_fan_in_fan_out
lora_mlp_kernel lora_model_dir lora_modules_to_save lora_o_kernel lora_on_cpu lora_qkv_kernel lora_r
lora_rank_pattern lora_target_linear lora_target_modules lora_target_parameters loraplus_lr_embedding
loraplus_lr_ratio loss_watchdog_patience loss_watchdog_threshold low_cpu_mem_usage lr_div_factor lr_groups
lr_quadratic_warmup lr_scheduler lr_scheduler_kwargs max_grad_norm max_memory max_packed_sequence_len
max_prompt_len max_steps mean_resizing_embeddings merge_lora merge_method metric_for_best_model
micro_batch_size min_sample_len mlflow_experiment_name mlflow_run_name mlflow_tracking_uri model_config
model_kwargs model_quantization_config model_quantization_config_kwargs model_revision model_type
multipack_real_batches neftune_noise_alpha noisy_embedding_alpha num_dataset_shards_to_save num_epochs
num_generation_samples num_labels optim_args optim_target_modules optimizer orpo_alpha otel_metrics_host
otel_metrics_port output_dir overrides_of_model_config overrides_of_model_kwargs pad_to_multiple_of
pad_to_sequence_len peft peft_autocast_adapter_dtype peft_ensure_weight_tying peft_init_lora_weights
peft_layer_replication peft_layers_pattern peft_layers_to_transform peft_trainable_token_indices
peft_use_dora peft_use_rslora ple_cpu_offload plugins pose_max_context_len pose_num_chunks
pose_split_on_token_ids precompute_ref_log_probs preprocess_iterable pretrain_multipack_attn
pretrain_multipack_buffer_size pretraining_dataset pretraining_sample_concatenation process_reward_model
processor_kwargs processor_type profiler_steps profiler_steps_start push_dataset_to_hub qat
qgalore_cos_threshold qgalore_gamma_proj qgalore_proj_bits qgalore_proj_group_size qgalore_proj_quant
qgalore_proj_type qgalore_queue_size qgalore_rank qgalore_scale qgalore_update_proj_gap
qlora_sharded_model_loading quantization quantize_moe_experts ray_num_workers ray_run_name reinit_weights
relora relora_cpu_offload relora_prune_method relora_prune_ratio remove_unused_columns
resize_token_embeddings_to_32x resources_per_worker resume_from_checkpoint revision_of_model reward_model
ring_attn_func rl rl_beta role_boundaries rope_scaling rpo_alpha s2_attention sage_attention sample_packing
sample_packing_bin_size sample_packing_eff_est sample_packing_group_size sample_packing_mp_start_method
sample_packing_sequentially save_first_step save_only_model save_safetensors save_steps save_strategy
save_total_limit saves_per_epoch scaling_softmax scaling_softmax_bias scaling_softmax_factor sdp_attention
sdpa_varlen seed selective_checkpointing sequence_len sequence_parallel_degree shrink_embeddings
shuffle_before_merging_datasets shuffle_merged_datasets simpo_gamma skip_prepare_dataset special_tokens
spectrum_model_name spectrum_top_fraction streaming streaming_multipack_buffer_size strict
swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_log_completions swanlab_project
tensor_parallel_size test_datasets tf32 tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp
tokenizer_config tokenizer_legacy tokenizer_save_jinja_files tokenizer_type tokenizer_use_fast
tokenizer_use_mistral_common tokens torch_compile torch_compile_backend torch_compile_mode
torch_compile_options torch_empty_cache_steps torchdistx_path total_num_tokens total_supervised_tokens
trackio_project_name trackio_run_name trackio_space_id train_on_inputs trainer_cls trl trust_remote_code
type_of_model unfrozen_parameters use_comet use_eaft use_kernels use_mlflow use_onebitllms use_otel_metrics
use_pose use_ray use_swanlab use_tensorboard use_trackio use_wandb val_set_size vllm wandb_entity
wandb_log_model wandb_mode wandb_name wandb_project wandb_run_id wandb_watch warmup_ratio warmup_steps
weight_decay world_size xformers_attention
"""
"""Every key of axolotl 0.19 that a run with `rl:` can set, its aliases and its common plugins' keys."""


@pytest.mark.parametrize("key", AXOLOTL_KEYS.split())
def test_every_axolotl_key_is_supported_or_known_with_a_reason(key: str) -> None:
    entry = dialect.unsupported(key)
    assert (key in dialect.SUPPORTED) != (entry is not None)
    assert entry is None or len(entry.why.split()) >= 3


def test_no_key_is_both_supported_and_not() -> None:
    assert not dialect.SUPPORTED & dialect.UNSUPPORTED.keys()
    others = OTHER_NAMES.keys() | NO_KEY.keys()
    assert not others & (dialect.SUPPORTED | dialect.UNSUPPORTED.keys())
    assert not OTHER_NAMES.keys() & NO_KEY.keys()


def test_what_other_tools_call_a_key_leads_to_keys_that_are_there() -> None:
    outer = {path.partition(".")[0] for path in nested.nested_keys()} | {"lora_"}
    for words in OTHER_NAMES.values():
        first = re.match(r"\w+", words)
        assert first is not None
        assert first[0] in dialect.SUPPORTED | outer, words


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tokenizer_name_or_path", "tokenizer_config"),
        ("dataset_mixer", "datasets: [{path"),
        ("pref_bco_weight", "bco_pair"),
        ("orpo_beta", "orpo_alpha"),
        ("liger_swiglu", "liger_glu_activation"),
        ("hub_token", "export HF_TOKEN"),
        ("upcast_layernorm", "remove it"),
    ],
)
def test_a_key_of_another_tool_is_not_taken_for_one_that_is_spelt_alike(key: str, meant: str) -> None:
    assert meant in dialect.suggest(key)


def test_an_entry_of_dataset_info_json_leads_to_a_dataset_here() -> None:
    entry = {"file_name": "rows.json", "formatting": "sharegpt", "ranking": True, "columns": {"chosen": "a"}}
    with pytest.raises(ConfigError) as raised:
        validate_config({"base_model": "m", "rl": "dpo", "datasets": [entry | {"num_samples": 9}]})
    said = str(raised.value)
    assert "file_name: rows.json — unknown key; write path" in said
    assert "write split: 'train[:1000]'" in said
    assert "name them with field_messages" in said
    assert "did you mean" not in said


def test_an_unknown_key_is_neither() -> None:
    assert "rl_beat" not in dialect.SUPPORTED
    assert dialect.unsupported("rl_beat") is None


@pytest.mark.parametrize("target", sorted(dialect.DIRECT.values()))
def test_every_target_is_a_field(target: str) -> None:
    section, field = target.split(".")
    assert field in _section(section).model_fields


def test_every_field_of_a_run_can_be_set() -> None:
    converted = {
        "model.dtype",
        "model.autocast",
        "model.tf32",
        "model.attn_implementation",
        "model.packing",
        "adapter.loftq_bits",
        "optimization.micro_batch_size",
        "optimization.gradient_accumulation_steps",
        "evaluation.strategy",
        "evaluation.steps",
        "evaluation.per_epoch",
        "output.save_strategy",
        "output.save_steps",
        "output.saves_per_epoch",
        "output.loggers",
        "output.logger_environment",
        "output.run_name",
        "output.project",
        "distributed.fsdp_version",
        "distributed.fsdp_config",
    }
    sections = [name for name in RunConfig.model_fields if name not in ("method", "reference")]
    fields = {f"{name}.{field}" for name in sections for field in _section(name).model_fields}
    assert fields - set(dialect.DIRECT.values()) == converted


def test_every_hyperparameter_of_every_method_can_be_set() -> None:
    fields = {field for method in METHODS for field in method.model_fields}
    assert fields - {"name", "beta"} == set(HYPERPARAMETERS.values())
    assert len(set(HYPERPARAMETERS.values())) == len(HYPERPARAMETERS)


ODD_VALUES: tuple[Any, ...] = (
    True, False, 0, -1, 3, 0.5, "word", "", [], ["a"], [["a"]], [{"a": 1}], {}, {"a": 1}, {"beta": {}},
    [None], [{"path": "a", "type": {"x": []}}],
)  # fmt: skip


@pytest.mark.parametrize("key", sorted(dialect.SUPPORTED))
def test_no_value_of_a_supported_key_breaks_the_reader(key: str) -> None:
    others: tuple[dict[str, Any], ...] = (
        {"rl": "dpo"},
        {"rl": "kto", "adapter": "lora", "datasets": [{"path": "a"}], "val_set_size": 0.1, "use_wandb": True},
        {"rl": "simpo", "reference": {"source": "none"}, "fsdp_config": {"offload_params": True}},
    )
    for value in ODD_VALUES:
        for other in others:
            lines = _refusals({"base_model": "m", **other, key: value})
            assert all(" — " in line for line in lines), lines


@pytest.mark.parametrize("key", sorted(dialect.UNSUPPORTED))
def test_an_unsupported_key_is_refused_with_its_reason_unless_it_changes_nothing(key: str) -> None:
    entry = dialect.UNSUPPORTED[key]
    settings = {"base_model": "m", "rl": "dpo"}
    assert validate_config(settings | {key: None}) == validate_config(settings)
    value = next(
        value for value in ({"anything": 1}, False) if entry.always or not entry.changes_nothing(value)
    )
    if entry.always:
        assert validate_config(settings | {key: value}) == validate_config(settings)
        return
    with pytest.raises(ConfigError) as error:
        validate_config(settings | {key: value})
    assert str(error.value).endswith(entry.why)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("neftune_noise_alpha", 0),
        ("plugins", []),
        ("plugins", ["axolotl.integrations.liger.LigerPlugin", "axolotl.integrations.kernels.KernelsPlugin"]),
        ("relora", False),
        ("loraplus_lr_embedding", 1e-6),
        ("save_safetensors", True),
        ("device_map", "auto"),
        ("model_type", "LlamaForCausalLM"),
        ("tokenizer_type", "AutoTokenizer"),
        ("dp_shard_size", 1),
        ("dynamic_checkpoint", {"enabled": False}),
        ("pad_to_sequence_len", True),
        ("nemo_gym_port", 0),
    ],
)
def test_a_value_that_asks_for_what_happens_anyway_is_accepted(key: str, value: Any) -> None:
    settings = {"base_model": "m", "rl": "dpo"}
    assert validate_config(settings | {key: value}) == validate_config(settings)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("save_safetensors", False, "weights are always saved as safetensors"),
        ("model_type", "MambaModel", "must be a causal LM"),
        ("dp_shard_size", True, "fsdp_version: 2"),
        (
            "plugins",
            ["axolotl.integrations.liger.LigerPlugin", "my.KDPlugin"],
            "any other changes axolotl's own code",
        ),
        ("liger_layer_norm", True, "another library's kernel"),
        ("torch_compile", True, "would be compiled anew"),
        ("nemo_gym_port", 5, "generate while they train"),
        ("swanlab_log_completions", True, "generate while they train"),
        ("per_device_train_batch_size", 4, "unknown key; write micro_batch_size"),
        ("max_length", 4, "unknown key; write sequence_len"),
        ("loftq_config", {}, "unknown key; it belongs under peft"),
        ("dataset_config", "default", "unknown key; write datasets: [{path: ..., name: ...}]"),
        ("use_galore", True, "unknown key; name an optimizer of transformers"),
        ("eval_on_start", True, "unknown key; held-out data is scored before step 1 anyway"),
        ("learning_rat", 1, "unknown key; did you mean learning_rate?"),
        ("zzzzzz", 1, "unknown key; docs/from-axolotl.md lists every key"),
        (True, 1, "True: 1 — unknown key"),
    ],
)
def test_a_refusal_says_what_to_do(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate_config({"base_model": "m", "rl": "dpo", key: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        (
            "datasets",
            {"path": "a", "chat_template": "x"},
            "datasets.0.chat_template: x — one template serves the whole run",
        ),
        (
            "datasets",
            {"path": "a", "type": {"field_promt": "q"}},
            "datasets.0.type.field_promt: q — unknown key; did you mean",
        ),
        (
            "test_datasets",
            {"path": "a", "roles_to_train": ["x"]},
            "preference losses score every completion token",
        ),
        ("datasets", {"path": "a", "trust_remote_code": True}, "no longer runs dataset scripts"),
        ("trl", {"num_generations": 8}, "trl.num_generations: 8 — for methods that generate"),
        ("reference", {"sorce": "auto"}, "reference.sorce: auto — unknown key; did you mean source?"),
        ("reference", {"source": "base"}, "reference.source: base — must be one of auto, none, adapter_off"),
        ("fsdp_config", {"offload_param": True}, "did you mean offload_params?"),
        ("special_tokens", {"additional_special_tokens": ["a"]}, "list them under tokens"),
    ],
)
def test_keys_inside_a_key_are_checked_too(outer: str, inner: dict[str, Any], message: str) -> None:
    value = [inner] if outer.endswith("datasets") else inner
    with pytest.raises(ConfigError) as error:
        validate_config(
            {"base_model": "m", "rl": "dpo", "fsdp_version": 2, "datasets": [{"path": "a"}], outer: value}
        )
    assert message in str(error.value)


def test_harmless_keys_inside_a_key_are_left_out() -> None:
    settings = {"base_model": "m", "rl": "dpo", "datasets": [{"path": "a"}]}
    harmless = settings | {
        "trl": {"sync_ref_model": False, "vllm_server_port": 8000},
        "datasets": [{"path": "a", "preprocess_shards": 4, "trust_remote_code": False}],
    }
    assert validate_config(harmless) == validate_config(settings)


def test_a_datasets_template_that_is_the_runs_own_is_left_out() -> None:
    run = {"base_model": "m", "rl": "dpo", "chat_template": "llama3", "datasets": [{"path": "a"}]}
    repeated = run | {"datasets": [{"path": "a", "chat_template": "llama3"}]}
    assert validate_config(repeated) == validate_config(run)
    with pytest.raises(ConfigError, match="one template serves the whole run"):
        validate_config(repeated | {"chat_template": "gemma"})


def test_every_nested_key_of_a_section_is_one_of_its_fields() -> None:
    reference = {
        key.removeprefix("reference.") for key in nested.nested_keys() if key.startswith("reference.")
    }
    assert reference == _section("reference").model_fields.keys()


def _refusals(settings: dict[str, Any]) -> list[str]:
    try:
        validate_config(settings)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _section(name: str) -> type[BaseModel]:
    annotation = RunConfig.model_fields[name].annotation
    return next(part for part in (annotation, *get_args(annotation)) if isinstance(part, type))
