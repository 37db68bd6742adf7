"""Sizes large enough for a formula's small terms to be small, and runs on checkpoints of them."""

from pathlib import Path
from typing import Any

from fiducial.config.methods import DPOConfig
from fiducial.config.schema import AdapterConfig, ModelConfig, RunConfig

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 32},
    "phi3": {"num_key_value_heads": 4},
    "olmo2": {"num_key_value_heads": 4},
    "gpt_neox": {},
}
TOKENS = 512


def run_config(path: Path, *, adapter: AdapterConfig | None = None, **model: Any) -> RunConfig:
    model_config = ModelConfig(base_model=str(path), **({"autocast": None} | model))
    return RunConfig(model=model_config, adapter=adapter, method=DPOConfig())
