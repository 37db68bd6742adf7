"""Generation settings of the base beside the aligned model: all that transformers saves, no lost model."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from fiducial.config.load import validate_config
from fiducial.merge import merge_adapter
from fiducial.train import train
from run_configs import run_config
from tiny import save_checkpoint


def settings(folder: Path, generation: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    base = save_checkpoint(folder / "base-llama")
    (base / "generation_config.json").write_text(json.dumps(generation))
    return run_config(folder, max_steps=1, **overrides)


def saved(folder: Path, names: dict[str, Any]) -> dict[str, Any]:
    config = GenerationConfig.from_pretrained(folder)
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize(
    ("generation", "left"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "top_k": 7}, {"temperature": None, "top_p": None, "top_k": None}),
        ({"do_sample": True, "temperature": 0.9}, {"temperature": 0.9}),
        ({"length_penalty": 2.0}, {"length_penalty": None}),
        ({"num_beams": 2, "length_penalty": 2.0, "top_p": 0.6}, {"length_penalty": 2.0, "top_p": None}),
    ],
)
def test_what_transformers_does_not_save_again_is_left_out_before_training(
    tmp_path: Path, generation: dict[str, Any], left: dict[str, Any]
) -> None:
    train(settings(tmp_path, generation))  # whose tokenizer has tokens that these settings do not name
    assert saved(tmp_path / "out", left) == left


def test_a_merged_adapter_keeps_what_servers_sample_by(tmp_path: Path) -> None:
    generation = {"temperature": 0.9, "top_p": 0.6}
    run = settings(tmp_path, generation, adapter="lora")
    train(run)
    assert saved(merge_adapter(validate_config(run), tmp_path / "merged"), generation) == generation
