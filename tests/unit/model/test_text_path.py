"""A model that reads pictures too trains what text passes through."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from fiducial.config.schema import AdapterConfig
from fiducial.model.adapters import new_adapter
from fiducial.model.scoring import Scorer
from fiducial.model.text_path import beside_text, freeze_beside_text
from tiny import VOCAB, random_groups, tiny_model

_SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def with_pictures() -> PreTrainedModel:
    text = _SHAPE | {"vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8}
    vision = _SHAPE | {"image_size": 28, "patch_size": 14}
    config: Any = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config)


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
