"""Which models are packed, and what they are told when they are not."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import PreTrainedModel

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.model import attention_plan, layout
from fiducial.model.attention_plan import Visibility
from fiducial.model.layout import choose_layout
from fiducial.model.scoring import Scorer
from tiny import FAMILIES, random_groups, tiny_model

GROUPS = random_groups(4, seed=1)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "stablelm"])
def test_attention_only_models_are_packed(family: str, autocast: torch.dtype | None) -> None:
    model = tiny_model(family, num_key_value_heads=2)
    assert choose_layout(model, GROUPS, packing=None, autocast=autocast).layout == "packed"


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("bloom", {}, "does not take its attention from transformers' AttentionInterface"),
        ("mamba", {}, "linear_attention layers"),
        (
            "lfm2",
            {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            "conv layers, which may carry one sequence into the next",
        ),
    ],
)
def test_models_that_mix_tokens_elsewhere_are_padded(family: str, config: dict[str, Any], why: str) -> None:
    model = tiny_model(family, **config)
    choice = choose_layout(model, GROUPS, packing=None)
    assert choice.layout == "padded"
    assert why in choice.why
    with pytest.raises(ModelError, match=r"sample_packing: true, but .*Remove it: rows are then padded"):
        choose_layout(model, GROUPS, packing=True)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_positions_that_depend_on_the_row_limit_the_length(rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"original_max_position_embeddings": 100, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny_model(rope_parameters=rope, max_position_embeddings=100)
    assert choose_layout(model, GROUPS, packing=None).layout == "packed"
    assert choose_layout(model, GROUPS, packing=None, longest=100).layout == "packed"
    scorer = Scorer(model.eval(), layout="padded")
    short, long = GROUPS[0], TokenizedGroup(np.arange(90, dtype=np.int32), (np.arange(30, dtype=np.int32),))
    with torch.no_grad():
        alone, beside = (scorer(scorer.pack(groups)).values for groups in ([short], [short, long]))
    difference = (alone - beside[: len(alone)]).abs().max().item()
    assert difference > 1e-3, "padded rows do not keep to themselves either"
    for packing in (None, False, True):
        with pytest.raises(
            ModelError, match=r"more than 100 tokens, and the longest here has 101.*sequence_len: 100"
        ):
            choose_layout(model, GROUPS, packing=packing, longest=101)


def test_prompt_tuning_is_padded() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model: Any = get_peft_model(tiny_model(), config)
    assert "before the prompt" in choose_layout(model, GROUPS, packing=None).why


def test_adapters_are_packed() -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    assert choose_layout(model, GROUPS, packing=None).layout == "packed"


def test_a_leak_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scorer.pack

    def leaking(self: Scorer, groups: Any) -> PackedBatch:
        batch = original(self, groups)
        if batch.segments is None:
            return batch
        segments = [
            replace(s, prefix_stop=s.start) if s.prefix_stop > s.prefix_start else s for s in batch.segments
        ]
        return replace(batch, segments=tuple(segments))

    monkeypatch.setattr(Scorer, "pack", leaking)
    assert "changing one completion moved another" in choose_layout(tiny_model(), GROUPS, packing=None).why


@pytest.mark.parametrize(("moved", "then"), [(1e-6, "packed"), (1e-2, "padded")])
def test_an_experts_products_may_be_rounded_otherwise(
    moved: float, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layouts = iter([0.0, moved] * 2)
    scored = layout._packed_logps
    monkeypatch.setattr(layout, "_packed_logps", lambda *args: scored(*args) + next(layouts))
    assert choose_layout(tiny_model("mixtral", num_key_value_heads=2), GROUPS, packing=None).layout == then
    assert choose_layout(tiny_model(), GROUPS, packing=None).layout == "padded", "it has no experts"


def test_rounding_may_send_a_token_to_another_expert() -> None:
    model = tiny_model("mixtral", num_key_value_heads=2)
    assert choose_layout(model, GROUPS, packing=None, autocast=torch.bfloat16).layout == "packed"


def test_layers_that_look_at_one_token_are_not_named_as_mixing() -> None:
    model = tiny_model()
    model.config.layer_types = ["linear_attention", "mlp", "moe"]
    assert "has linear_attention layers" in choose_layout(model, GROUPS, packing=None).why


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_lost_window_is_measured(autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "_interpret", lambda *_: Visibility())
    choice = choose_layout(tiny_model("mistral"), GROUPS, packing=None, autocast=autocast)
    assert "differ from padded ones" in choice.why


def test_the_longest_group_is_among_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "_interpret", lambda *_: Visibility())
    long = TokenizedGroup(np.arange(30, dtype=np.int32), (np.arange(20, dtype=np.int32),))
    model = tiny_model("mistral", sliding_window=25)
    choice = choose_layout(model, [*random_groups(3, longest=9), long], packing=None)
    assert "differ from padded ones" in choice.why


@pytest.mark.parametrize(("call", "at"), [(0, 0), (1, -1)])
def test_what_is_not_a_number_is_no_proof(call: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, scored = count(), layout._packed_logps

    def once(*args: Any) -> torch.Tensor:
        values = scored(*args).clone()
        values[at] = torch.nan if next(calls) == call else values[at]
        return values

    monkeypatch.setattr(layout, "_packed_logps", once)
    assert choose_layout(tiny_model(), GROUPS, packing=None).layout == "padded"


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "dynamic"}, 400),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 100),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 400),
        ({"rope_type": "yarn"}, None),
    ],
)
def test_rotary_frequencies_limit_the_length_by_their_kind(rope: dict[str, Any], limit: int | None) -> None:
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=400)
    assert layout._rope_limit(config) == limit


def test_a_failing_packed_pass_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr("fiducial.model.scoring.plan_attention", fail)
    choice = choose_layout(tiny_model(), GROUPS, packing=None)
    assert choice.why == "Not packed: its packed forward pass failed: no such shape"


def test_packing_can_be_switched_off_and_needs_data() -> None:
    model = tiny_model()
    assert choose_layout(model, GROUPS, packing=False).why == "Packing is switched off."
    assert "no data" in choose_layout(model, [], packing=None).why
    assert model.config._attn_implementation == "sdpa"


def test_dropout_does_not_disturb_the_measurement() -> None:
    model = tiny_model("gpt_neox", hidden_dropout=0.5).train()
    assert choose_layout(model, GROUPS, packing=None).layout == "packed"


def _state(model: PreTrainedModel) -> tuple[Any, ...]:
    modes = tuple(module.training for module in model.modules())
    return modes, model.config._attn_implementation, torch.get_rng_state().tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_the_model_comes_back_as_it_was(family: str) -> None:
    model = tiny_model(family).train()
    next(model.base_model.children()).eval()
    before = _state(model)
    choose_layout(model, GROUPS, packing=None)
    assert _state(model) == before
