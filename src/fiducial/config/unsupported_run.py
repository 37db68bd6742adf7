"""Keys of axolotl about data, optimisation, evaluation, output and hardware that Fiducial does not act on."""

from fiducial.config.unsupported import drop, no, table

_KERNEL = (
    "another library's kernel; remove it: packed attention and the chunked log-prob head are Fiducial's own"
)
_ONLINE = "for methods that generate while they train; Fiducial learns from given preferences: remove it"
_SFT = "for supervised training; remove it: preference losses score every completion token and nothing else"
_OPTIMIZER = "belongs to an optimizer that is not offered; remove it and name an optimizer of transformers"
_GALORE = "belongs to q_galore, which is not offered; remove it"
_INTERNAL = "filled in by axolotl itself; nothing here reads it"
_PACKED = "rows are packed without padding, so it cannot change the result"
_DEEPSPEED = (
    "not in this version: it clips gradients by its own file, not by max_grad_norm; write fsdp_version: 2"
)
_SPREAD = "not in this version; spread a run with torchrun, and shard it with fsdp_version: 2"
_MEMORY = "memory is governed by micro_batch_tokens"
_SHUFFLE = "not in this version; shuffle_merged_datasets: false keeps the rows' own order"
_BENCH = (
    "evaluation reports the preference metrics on held-out pairs; remove it and run benchmarks on the result"
)
_CHAT = "for chatting with the result; it cannot change the training"
_OFFLOAD = "not in this version; use gradient_checkpointing: true and a smaller micro_batch_tokens"

DATA = table(
    ("skip_prepare_dataset", no("rows are always checked and counted; remove it")),
    ("shuffle_before_merging_datasets curriculum_sampling", no(_SHUFFLE)),
    ("group_by_length sample_packing_sequentially", no("packing needs no sorting by length; remove it")),
    (
        "num_dataset_shards_to_save dataset_keep_in_memory",
        drop("storage of prepared rows cannot change the result"),
    ),
    (
        "dataset_shard_num dataset_shard_idx",
        no("take a part with `split` of the dataset, for example split: train[:25%]"),
    ),
    ("push_dataset_to_hub", no("prepared rows stay local; remove it")),
    ("hf_use_auth_token", drop("the hub's token is read from the environment or `hf auth login`")),
    ("remove_unused_columns", drop("only the columns a preference needs are read")),
    ("train_on_inputs", no("preference losses score completions, never prompts; remove it")),
    ("eval_sequence_len", no("evaluation uses sequence_len; remove it")),
    ("min_sample_len", no(_SFT)),
    ("pad_to_sequence_len pad_to_multiple_of batch_flattening sdpa_varlen", drop(_PACKED)),
    (
        "multipack_real_batches sample_packing_group_size sample_packing_bin_size",
        drop(_PACKED),
    ),
    (
        "pretrain_multipack_buffer_size pretrain_multipack_attn",
        drop(_PACKED),
    ),
    (
        "sample_packing_mp_start_method sample_packing_eff_est",
        drop(_PACKED),
    ),
    ("max_packed_sequence_len", no("rows are packed anyway; use sequence_len")),
    (
        "dataloader_prefetch_factor dataloader_pin_memory",
        drop("how rows are read ahead cannot change the result"),
    ),
    (
        "dataloader_drop_last",
        no("the last, smaller step is trained too; bound the run with max_steps instead"),
    ),
    (
        "pretraining_dataset pretraining_sample_concatenation",
        no("for pretraining; use datasets with preference data"),
    ),
    ("use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks", no(_SFT)),
    (
        "preprocess_iterable is_preprocess total_num_tokens total_supervised_tokens axolotl_config_path",
        drop(_INTERNAL),
    ),
)

OPTIMIZATION = table(
    ("optim_target_modules adam_beta3 adam_epsilon2 dion_lr dion_momentum torchdistx_path", no(_OPTIMIZER)),
    ("dion_rank_fraction", no(_OPTIMIZER, 1.0, 1)),
    ("dion_rank_multiple_of", no(_OPTIMIZER, 1)),
    ("qgalore_rank qgalore_proj_group_size", no(_GALORE, 256)),
    ("qgalore_update_proj_gap", no(_GALORE, 200)),
    ("qgalore_scale", no(_GALORE, 0.25)),
    ("qgalore_proj_type", no(_GALORE, "std")),
    ("qgalore_proj_quant", no(_GALORE, True)),
    ("qgalore_proj_bits", no(_GALORE, 4)),
    ("qgalore_cos_threshold", no(_GALORE, 0.4)),
    ("qgalore_gamma_proj", no(_GALORE, 2)),
    ("qgalore_queue_size", no(_GALORE, 5)),
    (
        "embedding_lr embedding_lr_scale lr_groups",
        no("not in this version; all trained weights share learning_rate"),
    ),
    ("lr_quadratic_warmup", no("the warm-up is linear; remove it")),
    ("lr_div_factor", drop("axolotl never reads it either")),
    (
        "cosine_min_lr_ratio",
        no("write lr_scheduler: cosine_with_min_lr and lr_scheduler_kwargs: {min_lr_rate: ...}"),
    ),
    ("cosine_constant_lr_ratio", no("write lr_scheduler: warmup_stable_decay and its lr_scheduler_kwargs")),
    ("jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps", no(_SFT)),
    ("lisa_n_layers lisa_step_interval", no(_SFT)),
    ("lisa_layers_attribute", no(_SFT, "model.layers")),
    ("use_eaft", no(_SFT)),
    ("eaft_alpha", no(_SFT, 1.0, 1)),
    ("eaft_k", no(_SFT, 20)),
    ("auto_find_batch_size", drop("micro_batch_tokens: auto finds what fits, without changing the batch")),
)

EVALUATION = table(
    ("do_bench_eval do_causal_lm_eval eval_causal_lm_metrics bench_dataset bench_split", no(_BENCH)),
    ("eval_table_size generate_samples", no(_BENCH)),
    ("eval_max_new_tokens eval_table_max_new_tokens", drop("evaluation generates nothing")),
    ("num_generation_samples", no(_BENCH, 3)),
    ("generation_max_new_tokens", no(_BENCH, 50)),
    ("generation_temperature", no(_BENCH, 0.7)),
    ("generation_top_p generation_top_k", no(_BENCH)),
    ("generation_prompt_ratio", no(_BENCH, 0.5)),
    ("generation_do_sample", no(_BENCH, True)),
)

OUTPUT = table(
    ("save_first_step", no("not in this version; save_steps: 1 saves every step")),
    ("dynamic_checkpoint", no("not in this version; Ctrl-C saves a checkpoint", {"enabled": False})),
    (
        "loss_watchdog_threshold loss_watchdog_patience",
        drop("a loss that is not a number stops the run anyway"),
    ),
    ("include_tokens_per_second include_tkps", drop("tokens per second are always recorded")),
    ("profiler_steps profiler_steps_start", no("not in this version; profile the process from outside")),
    ("debug", drop("the account of the data is always printed")),
    ("use_otel_metrics", no("use one of use_wandb, use_mlflow, use_tensorboard, use_trackio, use_comet")),
    ("otel_metrics_host", no("belongs to use_otel_metrics; remove it", "localhost")),
    ("otel_metrics_port", no("belongs to use_otel_metrics; remove it", 8000)),
    ("comet_api_key", no("a secret would be copied beside the model; export COMET_API_KEY and remove it")),
    ("comet_experiment_config", no("set Comet's environment variables instead")),
    ("strict", drop("unknown keys are always errors")),
    ("gradio_title gradio_share gradio_server_name gradio_server_port", drop(_CHAT)),
    ("gradio_max_new_tokens gradio_temperature", drop(_CHAT)),
)

HARDWARE = table(
    ("fsdp", no("the old list form; write fsdp_version: 2 and fsdp_config")),
    ("fsdp_final_state_dict_type", drop("the final model is always saved whole")),
    ("fp32_norms fp32_norm_classes", no("set the precision with bf16; remove it")),
    ("dp_shard_size dp_replicate_size tensor_parallel_size context_parallel_size", no(_SPREAD, 1)),
    ("sequence_parallel_degree", no(_SPREAD, 1)),
    ("heads_k_stride ring_attn_func", no("belongs to context parallelism; remove it", 1)),
    ("ddp world_size local_rank", drop("the launcher says how many processes there are")),
    ("ddp_find_unused_parameters", no("every trained parameter takes part in every step; remove it")),
    ("use_ray ray_run_name", no("not in this version; start the run with torchrun")),
    ("ray_num_workers", no("belongs to use_ray; remove it", 1)),
    ("resources_per_worker", no("belongs to use_ray; remove it", {"GPU": 1})),
    ("accelerator_config", no("not in this version; set what you need with the other keys")),
    ("deepspeed", no(_DEEPSPEED)),
    ("deepcompile", no("not in this version; remove it")),
    ("selective_checkpointing activation_offloading layer_offloading ple_cpu_offload", no(_OFFLOAD)),
    (
        "torch_compile torch_compile_backend torch_compile_mode torch_compile_options",
        no(
            "every packed row has a length of its own, and each would be compiled anew; on a GPU use "
            "liger_rope, liger_rms_norm and liger_glu_activation"
        ),
    ),
    (
        "chunked_cross_entropy chunked_cross_entropy_num_chunks",
        drop("the log-prob head always works in chunks"),
    ),
    ("tiled_mlp", no(_OFFLOAD)),
    ("tiled_mlp_num_shards", no(_OFFLOAD)),
    ("tiled_mlp_use_original_mlp", no(_OFFLOAD, True)),
    ("gc_steps gc_collect_steps torch_empty_cache_steps", drop(_MEMORY)),
)

KERNELS = table(
    ("fused_attn_kernel flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm", no(_KERNEL)),
    ("flash_optimum sage_attention s2_attention gemma4_hybrid_attn_impl large_head_attention", no(_KERNEL)),
    ("flash_attn_d512 flex_attn_compile_kwargs", no(_KERNEL)),
    (
        "scaling_softmax scaling_softmax_factor scaling_softmax_bias",
        no("changes the model itself; remove it"),
    ),
    ("liger_layer_norm liger_rms_norm_gated liger_kernel_impl expert_backend", no(_KERNEL)),
    (
        "liger_cross_entropy liger_fused_linear_cross_entropy liger_use_token_scaling cut_cross_entropy",
        drop("the log-prob head always works in chunks"),
    ),
    ("use_scattermoe use_sonicmoe", no(_KERNEL)),
    ("spectrum_top_fraction spectrum_model_name", no("name the weights to train with unfrozen_parameters")),
    ("swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer", no(_ONLINE)),
)

PREFIXES = {
    "nemo_gym_": no(_ONLINE),
    "swanlab_": no("set SwanLab's environment variables instead"),
    "kd_": no("distillation is not preference alignment; remove it"),
    "lm_eval_": no(_BENCH),
}
"""Whole families of plugin keys."""
