"""A model that reads pictures too trains what text passes through."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    PaliGemmaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from fiducial.config.schema import AdapterConfig
from fiducial.errors import ModelError
from fiducial.model.adapters import new_adapter
from fiducial.model.layout import choose_layout
from fiducial.model.loader import ModelLoader
from fiducial.model.scoring import Scorer
from fiducial.model.text_path import beside_text, freeze_beside_text
from oracles import naive_token_logps
from tiny import VOCAB, random_groups, tiny_model, tiny_tokenizer

_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_pictures() -> PreTrainedModel:
    text = _SHAPE | {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8}
    vision = _SHAPE | {"image_size": 28, "patch_size": 14}
    config: Any = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config)


def scaled_up(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def text_and_vision(text: str) -> dict[str, Any]:
    language = _SHAPE | {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8, "model_type": text}
    vision = "siglip_vision_model" if text == "gemma" else "pixtral"
    return {
        "text_config": language,
        "vision_config": _SHAPE | {"image_size": 28, "patch_size": 14, "model_type": vision},
    }


def without_gradient(model: PreTrainedModel | PeftModel) -> list[str]:
    scorer = Scorer(model, layout="packed")
    scorer(scorer.pack(random_groups(2, seed=1))).values.sum().backward()
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return [name for name, value in trained if value.grad is None]


def test_every_trained_weight_gets_a_gradient() -> None:
    model = with_pictures()
    unreached = without_gradient(model)
    assert unreached
    freeze_beside_text(model)
    assert without_gradient(model) == []
    frozen = [name for name, value in model.named_parameters() if not value.requires_grad]
    assert frozen == unreached


@pytest.mark.parametrize("targets", [{"target_linear": True}, {"target_modules": ("q_proj", "v_proj")}, {}])
def test_an_adapter_is_put_where_text_passes(targets: dict[str, Any]) -> None:
    policy = new_adapter(with_pictures(), AdapterConfig(kind="lora", r=2, **targets), float32=True)
    assert without_gradient(policy) == []


def test_all_of_a_model_of_text_alone_meets_text() -> None:
    assert beside_text(tiny_model()) == []


def test_a_checkpoint_with_no_class_for_text_alone_is_read_whole(tmp_path: Path) -> None:
    model = scaled_up(Mistral3Config(**text_and_vision("mistral"), tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    cfg = {"base_model": str(tmp_path / "base")}
    policy, _ = ModelLoader(cfg, tiny_tokenizer()).load()
    groups = random_groups(2, seed=1)
    assert choose_layout(policy, groups, packing=None).layout == "packed"
    scorer = Scorer(policy, layout="packed")
    ours, naive = scorer(scorer.pack(groups)).values, naive_token_logps(model, groups)
    assert (ours - naive).abs().max() <= 1e-5
    policy.save_pretrained(tmp_path / "again")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "again")]
    assert {name: value.shape for name, value in stored[0].items()} == {
        name: value.shape for name, value in stored[1].items()
    }


def test_a_model_that_reads_text_in_both_directions_is_refused() -> None:
    config = PaliGemmaConfig(**text_and_vision("gemma"), image_token_index=300, projection_dim=32)
    with pytest.raises(ModelError, match="PaliGemmaForConditionalGeneration is no causal language model"):
        choose_layout(scaled_up(config), random_groups(2, seed=1), packing=None)
