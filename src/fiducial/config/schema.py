"""The typed run: what every other module reads instead of YAML.

`fiducial.config.load` turns the flat dialect into one `RunConfig`. Absent is `None`; a default that is a
decision (and not a neutral value) says why beside it.
"""

from os.path import expanduser
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fiducial.config.methods import AnyMethod
from fiducial.config.section import Section

DType = Literal["float32", "bfloat16", "float16"]
AutoDType = DType | Literal["auto"]
"""`auto` is decided by the loader, which knows the hardware; the config imports no torch."""
SourceChoice = Literal[
    "auto", "none", "adapter_off", "frozen_adapter", "separate_model", "initial_policy", "endpoint"
]
ScheduleChoice = Literal["auto", "live", "precomputed", "synced"]
Location = Annotated[str, AfterValidator(expanduser)]
"""A path, whose `~` is the user's home, or a hub name."""


class ModelConfig(Section):
    """The checkpoint the policy starts from, and how it is held."""

    base_model: Location = Field(min_length=1)
    """A local folder or a hub name."""
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle_weights: bool = False
    """Open `.bin` weights, which can run code, where a checkpoint has no safetensors."""
    config_overrides: dict[str, Any] = Field(default_factory=dict)
    """Merged into the checkpoint's config.json."""
    dtype: AutoDType = "float32"
    """How the model's own weights are held.

    `auto` is bfloat16 on a GPU that computes in it and float32 anywhere else. Full fine-tuning holds its
    weights in float32 unless `bf16: full`, because bfloat16 loses small updates; the frozen base under an
    adapter loses nothing, so its default is `auto`. An adapter's own weights are float32 whatever this says,
    except under `bf16: full` (`bfloat16` here and `autocast` None).
    """
    autocast: AutoDType | None = "auto"
    """Precision of the matrix products; None means the weights' own.

    `auto`, the default, is bfloat16 on a GPU that computes in it and None anywhere else.
    """
    tf32: bool = False
    attn_implementation: str | None = None
    """Stock attention where rows are padded; packed rows use Fiducial's own."""
    packing: bool | None = None
    """Pack rows and share prompts: None measures whether the model allows it, True makes "no" an error."""
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_config_kwargs: dict[str, Any] = Field(default_factory=dict)
    reinit_weights: bool = False
    """Draw the weights at random from the config instead of loading them."""
    unfrozen_parameters: tuple[str, ...] | None = None
    """Regular expressions; parameters that match none of them are frozen."""
    gradient_checkpointing: bool = False
    gradient_checkpointing_kwargs: dict[str, Any] = Field(default_factory=dict)
    liger_rope: bool = False
    liger_rms_norm: bool = False
    liger_glu_activation: bool = False
    """With these three, Liger's kernels between a layer's products, on a GPU."""


class TokenizerConfig(Section):
    """The tokenizer, its special tokens, and the chat template."""

    path: Location | None = None
    """Where the tokenizer is, if not beside the base model."""
    use_fast: bool = True
    special_tokens: dict[str, str] = Field(default_factory=dict)
    """`pad_token`, `eos_token`, `bos_token`, `unk_token`."""
    tokens: tuple[str, ...] = ()
    """Tokens to add to the vocabulary."""
    resize_embeddings_to_32x: bool = False
    mean_resizing_embeddings: bool = True
    """New embedding rows start at the mean of the old ones (deterministic), not at random."""
    chat_template: str | None = None
    """A named template, `tokenizer_default`, or `jinja` with `chat_template_jinja`."""
    chat_template_jinja: str | None = None
    """The template's text, or a file that holds it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""


class AdapterConfig(Section):
    """A PEFT adapter: a new one, or one to continue."""

    kind: Literal["lora", "qlora"]
    path: Location | None = None
    """An existing adapter to resume (`lora_model_dir`): local folder or hub name."""
    r: PositiveInt = 8
    alpha: PositiveInt = 16
    dropout: NonNegativeFloat = 0.0
    target_modules: tuple[str, ...] | str | None = None
    target_linear: bool = False
    target_parameters: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    rank_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    alpha_pattern: dict[str, PositiveInt] = Field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    layer_replication: tuple[tuple[int, int], ...] = ()
    use_dora: bool = False
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    """How the adapter starts, PEFT's names: True, "gaussian", "pissa", "olora", "eva", "loftq", …, False."""
    loftq_bits: PositiveInt | None = None
    trainable_token_indices: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False
    autocast_adapter_dtype: bool = True
    bias: Literal["none", "all", "lora_only"] = "none"


class ReferenceConfig(Section):
    """Which policy is the reference, and when it is scored."""

    source: SourceChoice = "auto"
    schedule: ScheduleChoice = "auto"
    model: Location | None = Field(default=None, min_length=1)
    """Another checkpoint to compare with, instead of the starting policy; with `endpoint` its name there."""
    revision: str | None = None
    adapter: Location | None = Field(default=None, min_length=1)
    """An adapter that belongs to the reference: local folder or hub name."""
    endpoint: str | None = Field(default=None, min_length=1)
    """URL of an OpenAI-compatible server that answers with the log-probs of given tokens."""
    dtype: DType | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    device: Literal["cpu"] | None = None
    offload: Literal["cpu", "disk"] | None = None
    """Where the layers of a second model are kept while they do not compute."""
    sync_steps: PositiveInt | None = None
    """With `schedule: synced`, optimizer steps from one move of the reference to the next; 512 if not set."""
    mixup_alpha: Annotated[float, Field(gt=0, le=1)] | None = None
    """With `schedule: synced`, the policy's share of the reference after a move; 0.6 if not set, 1 a copy."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder or fsspec URL of precomputed log-probs; the user's own cache folder if not set."""
    flush_seconds: PositiveFloat | None = None
    """How much scoring a killed run may lose; 10 if not set."""


class DatasetConfig(Section):
    """One dataset and how to read a preference from its rows."""

    path: str
    type: str | dict[str, Any] = "auto"
    split: str | None = None
    name: str | None = None
    data_files: str | tuple[str, ...] | None = None
    ds_type: Literal["json", "csv", "parquet", "arrow", "text"] | None = None
    revision: str | None = None
    shards: PositiveInt | None = None
    """Use one of this many shards."""
    field_messages: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    field_completion: str | None = None
    field_label: str | None = None
    """Where rows hold single completions: the column that says whether one is desirable."""
    field_completions: str | None = None
    """Where rows hold several completions: the column with the list of them, best first."""
    field_scores: str | None = None
    """How good each of the completions is; they are sorted by it."""
    field_chosen_score: str | None = None
    """How good the chosen completion is, for methods that read it."""
    field_rejected_score: str | None = None
    field_prompt: str | None = None
    field_system: str | None = None
    field_tools: str | None = None
    """What the assistant could call, as the chat template is told: a list of JSON schemas, or its text."""
    roles: dict[str, tuple[str, ...]] | None = None
    """Our role (`user`, `assistant`, `system`, `tool`) to the names the rows use."""
    message_property_mappings: dict[str, str] | None = None
    """`role` and `content` to the keys the rows use."""


class DataConfig(Section):
    """The preference data and how long a sequence may be."""

    datasets: tuple[DatasetConfig, ...]
    test_datasets: tuple[DatasetConfig, ...] = ()
    val_set_size: NonNegativeFloat = 0.0
    """Below 1 a share, from 1 a number of rows, held out from `datasets`."""
    sequence_len: PositiveInt = 2048
    """Longest prompt + completion in tokens."""
    excess_length: Literal["drop", "truncate", "raise"] = "drop"
    shuffle: bool = True
    shuffle_buffer: PositiveInt = 10_000
    """Groups of streamed data that wait to be drawn from."""
    exact_deduplication: bool = False
    streaming: bool = False
    prepared_path: str | None = None
    num_proc: PositiveInt | None = None
    dataloader_num_workers: int = Field(default=0, ge=0)


class OptimizationConfig(Section):
    """The optimizer, its schedule, and how much data one step sees."""

    learning_rate: PositiveFloat = 1e-6
    optimizer: str = "adamw_torch_fused"
    optim_args: str | dict[str, Any] | None = None
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: NonNegativeFloat = 1.0
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: PositiveFloat = 1e-8
    lr_scheduler: str = "cosine"
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    num_epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    micro_batch_size: PositiveInt = 1
    """Groups a process takes in one accumulation step; only the product below matters for the result."""
    gradient_accumulation_steps: PositiveInt = 1
    micro_batch_tokens: PositiveInt | Literal["auto"] = "auto"
    """Most tokens one forward pass holds. Changes memory and speed, never the gradient."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @property
    def groups_per_step(self) -> int:
        """Groups (pairs) one process contributes to an optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


class EvaluationConfig(Section):
    """When held-out pairs are scored, and what is done with the result."""

    strategy: Literal["no", "steps", "epoch"] = "no"
    steps: PositiveFloat | None = None
    """Optimizer steps between evaluations; below 1 a share of all steps."""
    per_epoch: PositiveInt | None = None
    batch_size: PositiveInt | None = None
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None
    load_best_model_at_end: bool = False
    early_stopping_patience: PositiveInt | None = None


class DistributedConfig(Section):
    """How the run is spread over processes."""

    fsdp_version: Literal[2] | None = None
    fsdp_config: dict[str, Any] | None = None
    ddp_timeout: PositiveInt | None = None
    ddp_bucket_cap_mb: PositiveInt | None = None
    ddp_broadcast_buffers: bool | None = None


class OutputConfig(Section):
    """What is written where, and when."""

    output_dir: Location = "./model-out"
    save_strategy: Literal["no", "steps", "epoch", "best"] = "epoch"
    save_steps: PositiveFloat | None = None
    saves_per_epoch: PositiveInt | None = None
    save_total_limit: PositiveInt | None = None
    save_only_model: bool = False
    logging_steps: PositiveFloat | None = None
    log_entropy: bool = False
    """Also log the policy's entropy at the tokens it is scored on."""
    resume_from_checkpoint: Location | None = None
    auto_resume: bool = False
    hub_model_id: str | None = None
    hub_strategy: str = "every_save"
    hub_private_repo: bool = True
    """Whether a repository that the push makes is private; one that is there stays as it is."""
    loggers: tuple[str, ...] = ()
    """transformers' `report_to` names: tensorboard, wandb, mlflow, trackio, …"""
    run_name: str | None = None
    project: str | None = None
    """The loggers' project, transformers' `project` argument (trackio)."""
    logger_environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables the loggers read (WANDB_PROJECT, MLFLOW_TRACKING_URI, …)."""


class RunConfig(Section):
    """Everything a run needs to know, checked.

    `load_config` makes one of a YAML file and `validate_config` of a mapping of its keys. Both check what
    ties keys together; sections that are put together by hand are checked one by one only.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    adapter: AdapterConfig | None = None
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    method: AnyMethod | None = None
    """None when `rl` is not set: there is nothing to align, and no reference."""
    data: DataConfig | None = None
    optimization: OptimizationConfig = Field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
