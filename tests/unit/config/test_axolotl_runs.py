"""Runs as people write them for axolotl load unchanged, and mean what they say."""

from pathlib import Path

import pytest

from fiducial.config.load import LoadedRun, load_run
from fiducial.errors import ConfigError

LORA_DPO = """\
base_model: org/instruct-8b
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
hub_model_id: me/aligned
load_in_8bit: true
load_in_4bit: false
chat_template: llama3
rl: dpo
datasets:
  - path: org/preferences
    type: chat_template.default
    field_messages: conversation
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings:
      role: role
      content: content
    roles:
      system: [system]
      user: [user]
      assistant: [assistant]
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/lora-out
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: false
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
wandb_project:
wandb_entity:
wandb_watch:
wandb_name:
wandb_log_model:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
resume_from_checkpoint:
logging_steps: 1
attn_implementation: flash_attention_2
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""

FULL_DPO = """\
base_model: org/base-0.5b
strict: false
chat_template: tokenizer_default
rl: dpo
rl_beta: 0.1
datasets:
  - path: org/pairs
    split: train
    type: chatml.intel
val_set_size: 0.0
output_dir: ./outputs/dpo-out
sequence_len: 2048
sample_packing: false
adapter:
lora_model_dir:
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 5e-7
bf16: true
fp16:
tf32: true
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_steps: 10
evals_per_epoch: 1
eval_table_size:
eval_max_new_tokens: 128
saves_per_epoch: 1
debug:
deepspeed:
weight_decay: 0.0
fsdp:
fsdp_config:
special_tokens:
precompute_ref_log_probs: true
"""

QLORA_ORPO = """\
base_model: org/base-7b
model_type: MistralForCausalLM
tokenizer_type: LlamaTokenizer
load_in_8bit: false
load_in_4bit: true
rl: orpo
orpo_alpha: 0.1
remove_unused_columns: false
chat_template: chatml
datasets:
  - path: org/pairs-cleaned
    type: chat_template.argilla
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/out
adapter: qlora
lora_model_dir:
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
attn_implementation: flash_attention_2
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""

KTO = """\
base_model: org/base-1b
rl: kto
rl_beta: 0.5
kto_desirable_weight: 0.2
kto_undesirable_weight: 1.0
remove_unused_columns: false
datasets:
  - path: org/labelled
    type: llama3.ultra
    split: train
dataset_prepared_path: last_run_prepared
val_set_size: 0.0
output_dir: ./outputs/out
adapter: qlora
load_in_8bit: false
load_in_4bit: true
lora_r: 32
lora_alpha: 64
lora_target_linear: true
sequence_len: 2048
sample_packing: false
eval_sample_packing: false
pad_to_sequence_len: true
gradient_accumulation_steps: 1
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: true}
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
special_tokens:
  pad_token: "<|end_of_text|>"
"""

SIMPO_FSDP = """\
base_model: org/base-9b
rl: simpo
rl_beta: 2.5
simpo_gamma: 0.5
cpo_alpha: 0
datasets:
  - path: rows.jsonl
    ds_type: json
    type:
      field_prompt: question
      field_chosen: good
      field_rejected: bad
test_datasets:
  - path: held_out.jsonl
    split: train
batch_size: 16
micro_batch_size: 2
learning_rate: 1e-6
bf16: true
eval_steps: 0.25
save_steps: 0.25
load_best_model_at_end: true
metric_for_best_model: eval_rewards/accuracies
greater_is_better: true
early_stopping_patience: 3
fsdp_version: 2
fsdp_config:
  offload_params: false
  cpu_ram_efficient_loading: true
  auto_wrap_policy: TRANSFORMER_BASED_WRAP
  transformer_layer_cls_to_wrap: Gemma2DecoderLayer
  state_dict_type: FULL_STATE_DICT
  final_state_dict_type: FULL_STATE_DICT
  reshard_after_forward: true
use_wandb: true
wandb_project: align
wandb_name: simpo-1
"""


def load(folder: Path, text: str) -> LoadedRun:
    path = folder / "run.yaml"
    path.write_text(text)
    return load_run(path)


@pytest.mark.parametrize("text", [LORA_DPO, FULL_DPO, QLORA_ORPO, KTO, SIMPO_FSDP])
def test_the_file_loads_and_survives_json(tmp_path: Path, text: str) -> None:
    config = load(tmp_path, text).config
    assert type(config).model_validate_json(config.model_dump_json()) == config


def test_lora_dpo(tmp_path: Path) -> None:
    run = load(tmp_path, LORA_DPO)
    config = run.config
    assert config.adapter is not None
    assert config.data is not None
    assert (config.adapter.r, config.adapter.dropout, config.adapter.path) == (32, 0.05, None)
    assert (config.model.load_in_8bit, config.model.dtype, config.model.autocast) == (True, "auto", "auto")
    assert config.data.datasets[0].roles == {
        "system": ("system",),
        "user": ("user",),
        "assistant": ("assistant",),
    }
    assert (config.evaluation.strategy, config.evaluation.per_epoch) == ("steps", 4)
    assert config.optimization.groups_per_step == 8
    assert {note.split("  ")[1].split(":")[0] for note in run.notes} == {
        "model_type",
        "tokenizer_type",
        "sample_packing",
        "pad_to_sequence_len",
    }


def test_older_files_name_the_keys_of_a_message_one_by_one(tmp_path: Path) -> None:
    """What is read anyway is left out; another name is to be written as it is written now."""
    older = "    message_field_role: from\n    message_field_content: value\n"
    text = FULL_DPO.replace("    type: chatml.intel\n", "    type: chat_template.default\n" + older)
    assert sum("message_field_" in note for note in load(tmp_path, text).notes) == 2
    with pytest.raises(ConfigError, match=r"message_field_role: who — .* write message_property_mappings"):
        load(tmp_path, text.replace("role: from", "role: who"))


def test_local_files_may_be_named_without_a_path(tmp_path: Path) -> None:
    """The form axolotl's documentation shows for local files."""
    text = FULL_DPO.replace("  - path: org/pairs\n", "  - ds_type: json\n    data_files: [rows.jsonl]\n")
    data = load(tmp_path, text).config.data
    assert data is not None
    assert (data.datasets[0].path, data.datasets[0].data_files) == ("json", ("rows.jsonl",))


def test_full_dpo(tmp_path: Path) -> None:
    config = load(tmp_path, FULL_DPO).config
    assert config.adapter is None
    assert (config.model.dtype, config.model.autocast, config.model.tf32) == ("float32", "bfloat16", True)
    assert (config.reference.source, config.reference.schedule) == ("auto", "precomputed")
    assert config.optimization.learning_rate == 5e-7
    assert config.evaluation.strategy == "no"


def test_qlora_orpo(tmp_path: Path) -> None:
    run = load(tmp_path, QLORA_ORPO)
    assert run.config.method is not None
    assert run.config.method.model_dump() == {"name": "orpo", "beta": 0.1}
    assert any("loss_watchdog_threshold" in note for note in run.notes)


def test_kto(tmp_path: Path) -> None:
    config = load(tmp_path, KTO).config
    assert config.method is not None
    assert config.method.model_dump()["desirable_weight"] == 0.2
    assert config.tokenizer.special_tokens == {"pad_token": "<|end_of_text|>"}


def test_simpo_with_fsdp(tmp_path: Path) -> None:
    config = load(tmp_path, SIMPO_FSDP).config
    assert config.distributed.fsdp_version == 2
    assert config.distributed.fsdp_config is not None
    assert "final_state_dict_type" not in config.distributed.fsdp_config
    assert config.optimization.gradient_accumulation_steps == 8
    assert config.output.loggers == ("wandb",)
    assert config.data is not None
    assert config.data.datasets[0].type == {
        "field_prompt": "question",
        "field_chosen": "good",
        "field_rejected": "bad",
    }
