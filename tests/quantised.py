"""Runs in 8 and 4 bits, on checkpoints that every kernel of bitsandbytes could take."""

from pathlib import Path
from typing import Any

from run_configs import run_config
from tiny import save_adapter, save_checkpoint

LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
HELD: dict[str, dict[str, Any]] = {
    "4-bit": LORA | {"adapter": "qlora", "load_in_4bit": True},
    "8-bit": LORA | {"adapter": "lora", "load_in_8bit": True},
}
SIZES = {"hidden_size": 128, "intermediate_size": 192}
"""Widths of whole blocks."""


def save_checkpoints(folder: Path) -> Path:
    """A base, another one, and an adapter trained on the base."""
    save_checkpoint(folder / "base", **SIZES)
    save_checkpoint(folder / "other", seed=1, **SIZES)
    save_adapter(folder / "sft", folder / "base")
    return folder


def short_run(folder: Path, checkpoints: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Two steps on a few pairs."""
    given = {"base_model": str(checkpoints / "base"), "rows": 6, "max_steps": 2, "sequence_len": 64}
    return run_config(folder, **(given | keys))
