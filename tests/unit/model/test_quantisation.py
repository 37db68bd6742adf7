"""Weights in 8 and 4 bits: they compute the same in training and scoring, and take what the plan says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fiducial.config.load import validate_config
from fiducial.errors import PlanError
from fiducial.model.loader import ModelLoader
from fiducial.model.mode import evaluating
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.reference.facts import gather_facts
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import plan_reference
from quantised import HELD, save_checkpoints
from tiny import random_groups

pytest.importorskip("bitsandbytes", reason="bitsandbytes is the `quantization` extra")

GROUPS = random_groups(4)

held = pytest.mark.parametrize("keys", HELD.values(), ids=HELD)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("quantised"))


def config(folder: Path, keys: dict[str, Any]) -> Any:
    return validate_config({"base_model": str(folder / "base"), "rl": "dpo"} | keys)


def load(cfg: Any) -> Any:
    return ModelLoader(cfg, load_tokenizer(cfg)).load()[0]


@held
def test_it_computes_the_same_whether_it_trains_or_scores(checkpoints: Path, keys: dict[str, Any]) -> None:
    scorer = Scorer(load(config(checkpoints, keys)).train(), layout="packed")
    batch = scorer.pack(GROUPS)
    training = scorer(batch).values.detach()
    with torch.no_grad(), evaluating(scorer.model):
        scoring = scorer(batch).values
    assert torch.equal(training, scoring)
    assert all(module.training for module in scorer.model.modules())


def test_without_our_care_8_bits_would_differ(checkpoints: Path) -> None:
    # The negative control of the test above.
    model = load(config(checkpoints, HELD["8-bit"])).train()
    for module in model.modules():
        module._forward_pre_hooks.clear()
    scorer = Scorer(model, layout="packed")
    batch = scorer.pack(GROUPS)
    training = scorer(batch).values.detach()
    with torch.no_grad(), evaluating(model):
        assert (training - scorer(batch).values).abs().max() > 1e-3


@held
def test_gradients_reach_every_layer_after_scoring(checkpoints: Path, keys: dict[str, Any]) -> None:
    # A kernel that eval mode would choose has no backward, and cannot be left again.
    scorer = Scorer(load(config(checkpoints, keys)).train(), layout="packed")
    batch = scorer.pack(GROUPS)
    with torch.no_grad(), evaluating(scorer.model):
        scorer(batch)
    scorer(batch).values.sum().backward()
    trained = {name: value for name, value in scorer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trained)
    for name, value in trained.items():
        assert value.grad is not None, name
        assert "lora_A" in name or value.grad.abs().max() > 0, name


@held
def test_the_plan_says_what_the_weights_take(checkpoints: Path, keys: dict[str, Any]) -> None:
    cfg = config(checkpoints, keys)
    facts = gather_facts(cfg)
    memory = estimate_memory(cfg, facts, plan_reference(cfg, facts), 64, gpu=False)
    planned = next(part.bytes for part in memory.parts if part.name == "policy weights")
    model = load(cfg)
    state = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    # Every 4-bit layer's table of values, and its shapes as text, are too small to plan in a real model.
    weights = {
        name: value for name, value in state.items() if "quant_map" not in name and "bitsandbytes" not in name
    }
    measured = sum(value.numel() * value.element_size() for value in weights.values())
    assert planned == pytest.approx(measured, rel=0.01)


def test_how_it_is_held_needs_a_second_model(checkpoints: Path) -> None:
    cfg = config(checkpoints, {"reference": {"load_in_8bit": True}})
    with pytest.raises(
        PlanError, match=r"reference.load_in_8bit: True cannot have an effect: the reference is initial"
    ):
        plan_reference(cfg, gather_facts(cfg))
