"""How long a run will take: the operations by hand, and the speed against a clock."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fiducial.config.methods import ORPOConfig
from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts, gather_facts
from fiducial.reference.plan import plan_reference
from fiducial.training.expected_time import (
    Amount,
    ExpectedSeconds,
    expected_seconds,
    forward_operations,
    products_a_second,
)
from planning import run
from tiny import save_checkpoint

TRAIN, HELD_OUT = Amount(tokens=1000, scored=600), Amount(tokens=100, scored=50)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base"))


def expected(cfg: RunConfig, facts: Facts | None = None) -> ExpectedSeconds | None:
    facts = facts or gather_facts(cfg)
    amounts = {"train": TRAIN, "held_out": HELD_OUT}
    return expected_seconds(cfg, facts, plan_reference(cfg, facts), **amounts, epochs=3.0, speed=1e6)


def test_operations_are_two_a_weight(base: Path) -> None:
    model = gather_facts(run(base_model=str(base))).model
    head = 320 * 32
    body = sum(
        fact.size
        for name, fact in model.tensors.items()
        if not name.endswith(("embed_tokens.weight", "lm_head.weight"))
    )
    assert not model.tied_embeddings
    assert forward_operations(model, TRAIN) == 2 * (1000 * body + 600 * head)


def test_a_precomputed_reference_is_one_pass_over_everything(base: Path) -> None:
    cfg = run(base_model=str(base))
    model = gather_facts(cfg).model
    found = expected(cfg)
    assert found is not None
    assert found.training == pytest.approx(3 * 3 * forward_operations(model, TRAIN) / 1e6)
    assert found.scoring == pytest.approx(forward_operations(model, Amount(1100, 650)) / 1e6)


def test_a_live_reference_costs_every_epoch_and_an_adapter_less_backward(base: Path) -> None:
    cfg = run(base_model=str(base), adapter={}, reference={"schedule": "live"})
    forward = forward_operations(gather_facts(cfg).model, TRAIN) / 1e6
    assert expected(cfg) == ExpectedSeconds(
        scoring=pytest.approx(3 * forward), training=pytest.approx(3 * 2 * forward)
    )


def test_without_a_reference_nothing_is_scored_and_experts_are_not_guessed(base: Path) -> None:
    cfg = run(base_model=str(base), method=None)
    found = expected(cfg)
    assert found is not None
    assert found.scoring == 0
    facts = gather_facts(cfg)
    mixture = replace(facts.model, sizes=replace(facts.model.sizes, experts=8))
    assert expected(cfg, replace(facts, model=mixture)) is None


def test_the_speed_is_that_of_the_products(base: Path) -> None:
    model = gather_facts(run(base_model=str(base))).model
    model = replace(model, sizes=replace(model.sizes, hidden=512, intermediate=1024))
    speed = products_a_second(model, torch.float32, torch.device("cpu"))
    left, right = torch.randn(512, 512), torch.randn(512, 1024)
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - began)
    assert 0.2 < speed * min(seconds) / (2 * 512 * 512 * 1024) < 5


@pytest.mark.parametrize(
    ("settings", "scoring"),
    [
        ({}, ", and scoring the reference 3.0 s where nothing of it is cached."),
        ({"reference": {"schedule": "live"}}, ", and scoring the reference 3.0 s."),
        ({"method": ORPOConfig()}, "."),
    ],
)
def test_a_reference_that_nothing_is_kept_of_is_not_said_to_be_cached(
    base: Path, settings: dict[str, Any], scoring: str
) -> None:
    cfg = run(base_model=str(base), **settings)
    sentence = ExpectedSeconds(3.0, 600.0).sentence(2e9, plan_reference(cfg, gather_facts(cfg)))
    assert sentence == f"At 2 GFLOP/s, training takes at least 10 min{scoring}"
