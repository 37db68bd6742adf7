"""How a trained adapter acts is compared with what a run's settings make of its tensors."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights

from fiducial.errors import ModelError
from fiducial.model.trained_adapter import require_same_settings, require_same_tensors
from tiny import tiny_model


def adapted(**lora: object) -> PeftModel:
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    } | lora
    return get_peft_model(tiny_model(), LoraConfig(**config))


def test_the_same_adapter_is_the_same(tmp_path: Path) -> None:
    adapted(rank_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    require_same_settings(adapted(rank_pattern={"q_proj": 2}), tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    require_same_tensors(adapted(rank_pattern={"q_proj": 2}), weights, tmp_path)


def test_another_scale_is_another_policy(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lora_alpha: 8 there, 16 in this run; .*peft_use_rslora: False there"
    ):
        require_same_settings(adapted(lora_alpha=16, use_rslora=True), tmp_path)
    with pytest.raises(ModelError, match="trainable_token_indices"):
        require_same_settings(adapted(trainable_token_indices=[1, 2]), tmp_path)


def test_a_setting_that_one_version_of_peft_does_not_know_is_not_compared(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["layer_replication"]
    path.write_text(json.dumps(saved))
    require_same_settings(adapted(), tmp_path)


def test_shards_alone_do_not_say_how_they_act(tmp_path: Path) -> None:
    require_same_settings(adapted(), tmp_path)


@pytest.mark.parametrize("lora", [{"r": 8}, {"target_modules": ["q_proj"]}, {"use_dora": True}])
def test_other_tensors_are_found(lora: dict[str, object], tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    weights = load_peft_weights(str(tmp_path), device="cpu")
    with pytest.raises(ModelError, match="other weights than this run trains"):
        require_same_tensors(adapted(**lora), weights, tmp_path)
