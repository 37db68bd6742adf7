"""The two tables of keys in docs/ list every key, and no key that does not exist."""

import re
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from fiducial.config import dialect
from fiducial.config.schema import RunConfig
from fiducial.config.unsupported_run import PREFIXES

DOCS = Path(__file__).parents[3] / "docs"
AXOLOTL = (DOCS / "from-axolotl.md").read_text()
TRL = (DOCS / "from-trl.md").read_text()


DPO_CONFIG = """
model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout dataset_num_proc max_length
truncation_mode padding_free pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size loss_type
loss_weights ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting
discopop_tau activation_offloading sync_ref_model ref_model_mixup_alpha ref_model_sync_steps pad_token
"""
"""What TRL 1.16's `DPOConfig` adds to transformers' `TrainingArguments`."""


def words(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+\*?)", text))


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]


def test_every_supported_key_is_listed() -> None:
    supported, _, unsupported = AXOLOTL.partition("## Keys that are known and not acted on")
    assert not dialect.SUPPORTED - words(supported)
    assert not dialect.SUPPORTED & {word for row in rows(unsupported) for word in words(row[0])}


def test_every_unsupported_key_is_listed_with_its_reason() -> None:
    listed = {
        key: row[1].removeprefix("*note only:* ").rstrip(" |")
        for row in rows(AXOLOTL.partition("## Keys that are known and not acted on")[2])
        for key in re.findall(r"`([^`]+)`", row[0])
    }
    families = {f"{prefix}*": entry.why for prefix, entry in PREFIXES.items()}
    assert listed == {key: entry.why for key, entry in dialect.UNSUPPORTED.items()} | families


def test_every_default_in_the_table_is_the_default() -> None:
    shown = {row[0].strip("`"): row[2].rstrip(" |").strip("`") for row in rows(AXOLOTL) if len(row) == 3}
    for key in shown.keys() & dialect.DIRECT.keys():
        if key in ("adapter", "lora_model_dir", "orpo_alpha"):
            continue
        assert _default(key) in shown[key], key


def test_every_argument_of_dpo_config_is_mapped_to_a_key_that_exists() -> None:
    assert not set(DPO_CONFIG.split()) - words(TRL)


def test_every_key_named_for_trl_users_exists() -> None:
    named = {word for row in rows(TRL.partition("## Arguments of LoraConfig")[0]) for word in words(row[1])}
    values = {"all", "drop", "truncate", "raise", "reference", "model", "special_tokens"}
    assert named - values <= dialect.SUPPORTED


def _default(key: str) -> str:
    section, name = dialect.DIRECT[key].split(".")
    annotation = RunConfig.model_fields[section].annotation
    model = next(part for part in (annotation, *get_args(annotation)) if isinstance(part, type))
    assert issubclass(model, BaseModel)
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in (None, (), {}) else "none"
