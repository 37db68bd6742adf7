"""A loss of whole distributions: when its reference is scored, and what each live source says."""

from typing import Any

import pytest
import torch
from peft import PeftModel

from fiducial.config.load import validate_config
from fiducial.config.methods import TDPO1Config, TDPO2Config
from fiducial.config.schema import AdapterConfig
from fiducial.errors import ConfigError, PlanError
from fiducial.model.adapters import freeze_copy, new_adapter
from fiducial.model.scoring import Scorer
from fiducial.reference.plan import Schedule, Source, plan_reference, possible_plans
from fiducial.reference.sources import AdapterOff, FrozenAdapter, LiveReference, Precomputed, SeparateModel
from planning import assert_names_key_and_remedy, decision, facts_of, run
from run_configs import run_config
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)


@pytest.mark.parametrize("method", [TDPO1Config(), TDPO2Config()], ids=lambda method: method.name)
@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, Source.SEPARATE_MODEL),
        ({"adapter": {}}, Source.ADAPTER_OFF),
        ({"adapter": {"path": "sft"}}, Source.FROZEN_ADAPTER),
        ({"reference": {"model": "other"}}, Source.SEPARATE_MODEL),
    ],
)
def test_it_is_planned_live(method: Any, settings: dict[str, Any], source: Source) -> None:
    cfg = run(method=method, **settings)
    plan = plan_reference(cfg, facts_of(cfg))
    assert decision(plan) == (source, Schedule.LIVE)
    assert "its probability of every token" in plan.why
    assert {each.schedule for each in possible_plans(cfg, facts_of(cfg))} == {Schedule.LIVE}
    streamed = run(method=method, streaming=True, **settings)
    assert not plan_reference(streamed, facts_of(streamed)).kept
    usual = run(**settings)
    assert plan_reference(usual, facts_of(usual)).schedule is Schedule.PRECOMPUTED


@pytest.mark.parametrize("adapter", [None, {}])
def test_it_cannot_be_precomputed(adapter: Any) -> None:
    cfg = run(method=TDPO1Config(), adapter=adapter, reference={"schedule": "precomputed"})
    with pytest.raises(PlanError, match="probability of every token") as raised:
        plan_reference(cfg, facts_of(cfg))
    assert_names_key_and_remedy(str(raised.value))
    assert "reference.schedule: live" in str(raised.value)


def test_it_is_no_part_of_a_sum(tmp_path: Any) -> None:
    cfg = run_config(tmp_path, dpo_loss_type=["sigmoid", "tdpo1"])
    with pytest.raises(ConfigError, match="tdpo1 reads whole distributions"):
        validate_config(cfg)


def training() -> PeftModel:
    """With dropout, and an adapter that has moved on from its frozen copy."""
    cfg = AdapterConfig.model_validate({"kind": "lora", "r": 4, "init_lora_weights": False, "dropout": 0.5})
    model = new_adapter(tiny_model(), cfg, float32=True)
    freeze_copy(model)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05)
    return model.train()


@pytest.mark.parametrize("kind", [AdapterOff, FrozenAdapter, SeparateModel])
def test_a_distribution_is_that_of_the_log_probs(kind: type) -> None:
    policy = Scorer(training(), layout="packed")
    reference = kind(policy)
    batch = policy.pack(GROUPS)
    assert isinstance(reference, LiveReference)

    logps, distribution = reference.distribution(batch)

    assert torch.equal(logps.values, reference.token_logps(batch).values)
    logits = distribution.logits(0, distribution.size)
    own = logits.log_softmax(1).gather(1, batch.target[:, None])[:, 0]
    torch.testing.assert_close(own, logps.values, rtol=1e-5, atol=1e-5)
    assert not distribution.hidden.requires_grad


def test_stored_log_probs_are_no_distribution() -> None:
    assert not issubclass(Precomputed, LiveReference)


def test_a_second_model_says_the_same_in_its_own_layout() -> None:
    second = SeparateModel(Scorer(tiny_model(), layout="padded"))
    packed = Scorer(tiny_model(), layout="packed").pack(GROUPS)
    ours = Scorer(tiny_model(), layout="packed").distribution(packed)[1]
    torch.testing.assert_close(second.distribution(packed)[1].hidden, ours.hidden, rtol=1e-4, atol=1e-5)
