"""Keys of axolotl about the method, the model and the adapter that Fiducial does not act on."""

from fiducial.config.unsupported import drop, no, table

_NOT_YET = "not in this version; remove it"
_KERNEL = (
    "another library's kernel; remove it: packed attention and the chunked log-prob head are Fiducial's own"
)
_ONLINE = "for methods that generate while they train; Fiducial learns from given preferences: remove it"
_SFT = "for supervised training; remove it: preference losses score every completion token and nothing else"
_IMAGES = "for images; Fiducial aligns text models: remove it"
_HARDWARE = "the launcher places models (CUDA_VISIBLE_DEVICES, torchrun); remove it"
ROPE = "{rope_parameters: {rope_type: ..., rope_theta: ..., factor: ...}}"
"""How transformers 5 names it; what is given replaces the whole, base frequency included."""
_INTERNAL = "filled in by axolotl itself; nothing here reads it"

METHOD = table(
    (
        "dpo_norm_loss",
        no("axolotl removed it too; dpo_loss_type: sigmoid_norm is the length-normalised loss"),
    ),
    ("dpo_use_liger_kernel", drop("the log-prob head always works in chunks")),
    ("dpo_use_logits_to_keep", drop("only scored positions ever pass the head")),
    ("dpo_padding_free", drop("rows are packed without padding wherever the model allows it")),
    ("dpo_generate_during_eval", no(_ONLINE)),
    ("max_prompt_len", no("prompts are never cut; bound prompt + completion with sequence_len")),
    ("vllm ebft", no(_ONLINE)),
    (
        "reward_model process_reward_model",
        no("trains a reward model; Fiducial aligns the policy itself: remove it"),
    ),
    ("center_rewards_coefficient num_labels", no("belongs to reward models; remove it")),
    ("trainer_cls", no("Fiducial has one trainer; remove it")),
    (
        "plugins",
        no(
            "liger_* keys and loggers need no plugin here; any other changes axolotl's own code: remove it",
            suffixes=(".LigerPlugin", ".CutCrossEntropyPlugin", ".KernelsPlugin", ".SwanLabPlugin"),
        ),
    ),
)

MODEL = table(
    ("base_model_config", no("the config is read beside base_model; use model_config for changes to it")),
    ("cls_model_config", no("the config class comes from the checkpoint; remove it", "AutoConfig")),
    (
        "model_type type_of_model",
        no(
            "the class comes from the checkpoint's config.json, which must be a causal LM; remove it",
            suffixes=("ForCausalLM",),
        ),
    ),
    (
        "tokenizer_type",
        no("the class comes from the tokenizer's files; remove it", suffixes=("Tokenizer", "TokenizerFast")),
    ),
    (
        "model_kwargs overrides_of_model_kwargs",
        no("from_pretrained is called in one way; use model_config for changes to the config"),
    ),
    ("tokenizer_legacy", no("set `legacy` in the tokenizer's tokenizer_config.json instead", off=False)),
    (
        "tokenizer_use_mistral_common",
        no("tokenizers are transformers' own; use a checkpoint that has its files"),
    ),
    (
        "tokenizer_save_jinja_files",
        no("the template is always written beside the tokenizer; remove it", True, off=False),
    ),
    (
        "added_tokens_overrides",
        no("rename the tokens in the tokenizer's own files and name it with tokenizer_config"),
    ),
    ("shrink_embeddings", no("embeddings never shrink: an id in use could be lost; remove it")),
    ("embeddings_skip_upcast", no("set the precision of the base with bf16; remove it")),
    ("eot_tokens", drop("every token of a completion is scored, its end included")),
    (
        "default_system_message",
        no("put system messages into the data, or into the template with chat_template_jinja"),
    ),
    (
        "fix_untrained_tokens",
        no("it would move the policy away from the reference before step 1; mend the checkpoint first"),
    ),
    (
        "freeze_mm_modules processor_type processor_kwargs image_size image_resize_algorithm role_boundaries",
        no(_IMAGES),
    ),
    ("use_kernels experts_implementation llama4_linearized_experts use_onebitllms", no(_KERNEL, "eager")),
    (
        "low_cpu_mem_usage experimental_skip_move_to_device",
        drop("weights are always loaded without a second copy in memory"),
    ),
    ("max_memory gpu_memory_limit device", no(_HARDWARE)),
    ("device_map", no(_HARDWARE, "auto")),
    ("hub_revision", no("pushes go to the main branch of hub_model_id; remove it", "main")),
    ("save_safetensors", no("weights are always saved as safetensors; remove it", True, off=False)),
    (
        "is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model",
        drop(_INTERNAL),
    ),
    ("rope_scaling", no(f"write it under model_config: {ROPE}")),
    (
        "noisy_embedding_alpha neftune_noise_alpha",
        no("noise on the policy alone would move it away from the reference; remove it"),
    ),
)

ADAPTER = table(
    ("qlora_sharded_model_loading lora_on_cpu", no(_NOT_YET)),
    ("loraplus_lr_ratio", no(_NOT_YET)),
    ("loraplus_lr_embedding", no("belongs to loraplus_lr_ratio; remove it", 1e-6)),
    ("lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel", no(_KERNEL)),
    ("merge_lora", no("merge after training with `fiducial merge`; remove it")),
    ("merge_method", no("`fiducial merge` has one way; remove it", "memory_efficient")),
    ("relora relora_prune_ratio relora_cpu_offload", no(_SFT)),
    ("relora_prune_method", no(_SFT, "magnitude")),
    ("gptq", no("GPTQ bases are not offered; use load_in_4bit with adapter: qlora")),
    (
        "model_quantization_config model_quantization_config_kwargs quantize_moe_experts",
        no("use load_in_8bit or load_in_4bit with an adapter"),
    ),
    (
        "qat quantization",
        no("quantise the aligned model afterwards, with the tool that will serve it; remove it"),
    ),
    ("fp8 fp8_config fp8_enable_fsdp_float8_all_gather", no("not in this version; use bf16: true")),
)
