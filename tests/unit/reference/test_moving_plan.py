"""Plans of references that follow the policy."""

from typing import Any

import pytest

from fiducial.errors import PlanError
from fiducial.reference.kinds import Sync
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import ReferencePlan, Schedule, Source, plan_reference
from planning import assert_names_key_and_remedy, decision, facts_of, run

COPY = {"schedule": "synced", "mixup_alpha": 1.0}
MIX = {"schedule": "synced"}


def plan(**settings: Any) -> ReferencePlan:
    cfg = run(**settings)
    return plan_reference(cfg, facts_of(cfg))


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({"reference": MIX}, Source.SEPARATE_MODEL),
        ({"reference": COPY, "streaming": True}, Source.SEPARATE_MODEL),
        ({"reference": COPY, "adapter": {}}, Source.FROZEN_ADAPTER),
        ({"reference": COPY, "adapter": {"init_lora_weights": "pissa"}}, Source.FROZEN_ADAPTER),
        ({"reference": COPY, "adapter": {"path": "sft"}}, Source.FROZEN_ADAPTER),
    ],
)
def test_what_follows(settings: dict[str, Any], source: Source) -> None:
    result = plan(**settings)
    assert decision(result) == (source, Schedule.SYNCED)
    assert "moves towards the policy" in result.why


def test_defaults_and_choices() -> None:
    assert plan(reference=MIX).sync == Sync(512, 0.6)
    assert plan(reference=MIX | {"sync_steps": 3, "mixup_alpha": 0.1}).sync == Sync(3, 0.1)
    assert plan().sync is None


@pytest.mark.parametrize(
    ("settings", "why", "instead"),
    [
        ({"reference": MIX, "adapter": {}}, "the product of two mixtures", "reference.mixup_alpha: 1"),
        ({"reference": COPY | {"model": "other"}}, "must start as the policy", "Remove reference.model"),
        ({"reference": COPY | {"source": "adapter_off"}, "adapter": {}}, "cannot move", "frozen_adapter"),
        (
            {"reference": COPY | {"source": "separate_model"}, "adapter": {}},
            "only a copy of the adapter",
            "frozen_adapter",
        ),
        (
            {"reference": COPY, "adapter": {"bias": "all"}},
            "only a copy of the adapter",
            "Write peft_bias: none, train",
        ),
        (
            {"reference": COPY, "adapter": {"path": "sft", "bias": "all"}},
            "only a copy of the adapter",
            "Remove reference.schedule, or train without",
        ),
        ({"reference": COPY | {"load_in_8bit": True}}, "cannot move", "Remove reference.load_in_8bit"),
        ({"reference": COPY | {"offload": "disk"}}, "cannot move", "Remove .*reference.offload"),
    ],
)
def test_what_cannot_follow(settings: dict[str, Any], why: str, instead: str) -> None:
    with pytest.raises(PlanError, match=rf"{why}.*{instead}") as caught:
        plan(**settings)
    assert_names_key_and_remedy(str(caught.value))


@pytest.mark.parametrize(
    ("dtype", "alpha", "held"), [(None, 0.5, False), ("bfloat16", 0.5, True), ("bfloat16", 1.0, False)]
)
def test_an_average_in_float32_is_counted(dtype: str | None, alpha: float, held: bool) -> None:
    cfg = run(reference={"schedule": "synced", "mixup_alpha": alpha, "dtype": dtype}, dtype="float32")
    facts = facts_of(cfg)
    parts = {
        part.name: part.bytes for part in estimate_memory(cfg, facts, plan_reference(cfg, facts), 64).parts
    }
    assert parts.get("reference average (float32)") == (4 * 36_000 if held else None)
