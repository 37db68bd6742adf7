"""Is a trained adapter on disk the one that a run's settings make? Its tensors do not say how they act."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from fiducial.config.dialect import KEY_OF
from fiducial.errors import ModelError
from fiducial.model.adapters import POLICY_ADAPTER

_ACTS_BY = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias"),
    *("init_lora_weights", "layer_replication", "trainable_token_indices"),
)
"""Fields of a PEFT config on which it depends what given tensors compute."""


def require_same_settings(model: PeftModel, folder: Path) -> None:
    """Raise `ModelError` where the adapter in `folder` acts otherwise than its tensors would in `model`.

    A checkpoint of shards alone does not say how its adapter acts.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    saved = json.loads(config.read_text(encoding="utf-8"))
    held = _plain(model.peft_config[POLICY_ADAPTER].to_dict())
    changed = [
        f"{_key(name)}: {saved[name]} there, {held[name]} in this run"
        for name in _ACTS_BY
        if name in saved and name in held and (saved[name] or None) != (held[name] or None)
    ]
    if changed:
        raise ModelError(
            f"the adapter in {folder} was trained with other settings than this run's: {'; '.join(changed)}. "
            "Under these it would be another policy. Put the settings back."
        )


def require_same_tensors(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise `ModelError` where `weights`, read from `folder`, are others than the policy's in `model`."""
    saved = {name: tensor.shape for name, tensor in weights.items()}
    state = get_peft_model_state_dict(model, adapter_name=POLICY_ADAPTER, save_embedding_layers=False)
    held = {name: tensor.shape for name, tensor in state.items()}
    embeddings = {name for name in saved.keys() - held if "embed" in name or "lm_head" in name}
    other = sorted(name for name in (saved.keys() | held) - embeddings if saved.get(name) != held.get(name))
    if other:
        raise ModelError(
            f"the adapter in {folder} has other weights than this run trains ({len(other)} differ: "
            f"{other[0]}, …). It was trained with another rank, other targets, or on another base: put the "
            "settings back."
        )


def _key(field: str) -> str:
    return KEY_OF.get(f"adapter.{'alpha' if field == 'lora_alpha' else field}", field)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(config, default=list))
    return plain
