"""Every input of the planner: each is planned rightly, or refused with a reason and a remedy."""

import itertools
from collections.abc import Iterator
from typing import Any

from fiducial.config.methods import DPOConfig, ORPOConfig
from fiducial.config.schema import RunConfig
from fiducial.errors import PlanError
from fiducial.reference.plan import (
    VALID,
    ReferencePlan,
    Schedule,
    Source,
    plan_live_reference,
    plan_reference,
)
from planning import assert_names_key_and_remedy, decision, facts_of, run

OTHERS: list[dict[str, str]] = [
    {},
    {"model": "base"},
    {"model": "other"},
    {"adapter": "sft"},
    {"adapter": "another"},
    {"model": "other", "adapter": "another"},
    {"model": "served", "endpoint": "http://localhost/v1"},
]
"""Which other policy is named, if any."""


def every_run() -> Iterator[dict[str, Any]]:
    adapters: list[dict[str, Any] | None] = [None, {"path": "sft"}, {"path": "sft", "bias": "all"}]
    adapters += [
        {"init_lora_weights": init, "bias": bias, "target_parameters": parameters}
        for init in (True, "pissa", False)
        for bias in ("none", "all")
        for parameters in ((), ("w",))
    ]
    sources = ["auto", *Source]
    for method, adapter, unfrozen, streaming, source, schedule, other in itertools.product(
        [DPOConfig(), ORPOConfig(), None],
        adapters,
        [None, ("model.norm",)],
        [False, True],
        sources,
        ["auto", *Schedule],
        OTHERS,
    ):
        yield {
            "method": method,
            "adapter": adapter,
            "unfrozen_parameters": unfrozen,
            "streaming": streaming,
            "reference": {
                "source": str(source),
                "schedule": str(schedule),
                **other,
                "mixup_alpha": 1.0 if schedule == Schedule.SYNCED else None,
            },
        }


def test_every_input_is_planned_rightly_or_refused_with_a_remedy() -> None:
    reached = set()
    for settings in every_run():
        cfg = run(**settings)
        facts = facts_of(cfg)
        for make in (plan_reference, plan_live_reference):
            try:
                result = make(cfg, facts)
            except PlanError as error:
                assert_names_key_and_remedy(str(error))
                continue
            reached.add(decision(result))
            assert_right(result, cfg)
    assert reached == {(source, schedule) for source, schedules in VALID.items() for schedule in schedules}


def test_auto_always_finds_a_precomputed_reference() -> None:
    for settings in every_run():
        asked = settings["reference"]
        if asked["source"] == "auto" and asked["schedule"] == "auto" and not settings["streaming"]:
            if settings["method"] in {None, ORPOConfig()} and ("model" in asked or "adapter" in asked):
                continue
            cfg = run(**settings)
            assert plan_reference(cfg, facts_of(cfg)).schedule in {Schedule.PRECOMPUTED, None}


def assert_right(result: ReferencePlan, cfg: RunConfig) -> None:
    """What must hold of any plan, stated apart from the planner's own predicates."""
    assert result.schedule in VALID[result.source]
    assert result.why.endswith(".")
    adapter, streaming = cfg.adapter, cfg.data is not None and cfg.data.streaming
    needed = cfg.method is not None and cfg.method.needs_reference
    assert (result.source is not Source.NONE) == needed
    untouched = adapter is not None and adapter.bias == "none" and cfg.model.unfrozen_parameters is None
    if result.source is Source.ADAPTER_OFF:
        assert untouched
        assert adapter is not None
        assert adapter.path is None
        assert adapter.init_lora_weights in {True}
    if result.source is Source.FROZEN_ADAPTER:
        assert untouched
        assert adapter is not None
        assert not adapter.target_parameters
    if streaming and needed:
        assert result.schedule in {Schedule.LIVE, Schedule.SYNCED}
    if result.schedule is Schedule.SYNCED:
        assert result.equals_starting_policy
        assert (result.source is Source.FROZEN_ADAPTER) == (adapter is not None)
    if not result.equals_starting_policy:
        asked = cfg.reference
        assert result.source in {Source.SEPARATE_MODEL, Source.FROZEN_ADAPTER, Source.ENDPOINT}
        assert (result.source is Source.ENDPOINT) == (asked.endpoint is not None)
        # On the policy's own base only, and where that base is still what the adapter was trained on.
        if result.source is Source.FROZEN_ADAPTER:
            assert asked.adapter is not None
            assert asked.model in {None, "base"}
            assert adapter is not None
            assert adapter.path is not None or adapter.init_lora_weights in {True, False}
    if result.source is Source.SEPARATE_MODEL and result.equals_starting_policy and adapter is not None:
        assert adapter.path is not None or adapter.init_lora_weights in {True, "pissa"}
