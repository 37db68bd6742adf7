"""The decision: each row of docs/reference.md's tables, each contract, and each choice of the user's."""

import re
from dataclasses import replace
from typing import Any

import pytest

from fiducial.config.methods import (
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
    TDPO1Config,
)
from fiducial.errors import PlanError
from fiducial.reference.checkpoint import TensorFact
from fiducial.reference.plan import (
    Checkpoint,
    ReferencePlan,
    Schedule,
    Source,
    plan_live_reference,
    plan_reference,
)
from planning import assert_names_key_and_remedy, decision, facts_of, run

LIVE, PRECOMPUTED = Schedule.LIVE, Schedule.PRECOMPUTED
IDENTITY = [True, "gaussian", "eva"]
NOT_IDENTITY = [False, "pissa", "pissa_niter_4", "olora", "loftq", "orthogonal", "corda", "lora_ga", "mica"]


def plan(**settings: Any) -> ReferencePlan:
    cfg = run(**settings)
    return plan_reference(cfg, facts_of(cfg))


def live_plan(**settings: Any) -> ReferencePlan:
    cfg = run(**settings)
    return plan_live_reference(cfg, facts_of(cfg))


# The table of `auto`, row by row.


@pytest.mark.parametrize(
    "method",
    [None, ORPOConfig(), SimPOConfig(), CPOConfig(), DPOConfig(beta=0), KTOConfig(beta=0)],
    ids=lambda method: method and f"{method.name}-{method.beta}",
)
@pytest.mark.parametrize("adapter", [None, {}, {"path": "sft"}])
def test_without_need_there_is_no_reference(method: Any, adapter: Any) -> None:
    result = plan(method=method, adapter=adapter)
    assert result == ReferencePlan(Source.NONE, None, None, result.why)
    assert live_plan(method=method, adapter=adapter) == result


@pytest.mark.parametrize("method", [DPOConfig(), IPOConfig(), KTOConfig()], ids=lambda method: method.name)
def test_full_fine_tuning_scores_itself_before_step_one(method: Any) -> None:
    assert decision(plan(method=method)) == (Source.INITIAL_POLICY, PRECOMPUTED)


def test_full_fine_tuning_on_streaming_data_needs_a_second_model() -> None:
    result = plan(streaming=True, revision="v2")
    assert decision(result) == (Source.SEPARATE_MODEL, LIVE)
    assert result.checkpoint == Checkpoint("base", "v2")


@pytest.mark.parametrize("init", IDENTITY)
@pytest.mark.parametrize(("streaming", "schedule"), [(False, PRECOMPUTED), (True, LIVE)])
def test_a_new_lora_is_switched_off(init: Any, streaming: bool, schedule: Schedule) -> None:
    result = plan(adapter={"init_lora_weights": init}, streaming=streaming)
    assert decision(result) == (Source.ADAPTER_OFF, schedule)


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ("lm_head",)},
        {"trainable_token_indices": (1, 2)},
        {"use_rslora": True},
        {"use_dora": True},
        {"target_parameters": ("experts.down_proj",)},
        {"layer_replication": ((0, 1), (0, 2))},
        {"kind": "qlora"},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_peft_restores_exactly_is_switched_off(options: dict[str, Any]) -> None:
    assert plan(adapter=options).source is Source.ADAPTER_OFF
    assert decision(plan(adapter=options, streaming=True)) == (Source.ADAPTER_OFF, LIVE)


@pytest.mark.parametrize(("streaming", "schedule"), [(False, PRECOMPUTED), (True, LIVE)])
def test_a_resumed_adapter_is_part_of_the_reference(streaming: bool, schedule: Schedule) -> None:
    result = plan(adapter={"path": "sft"}, streaming=streaming)
    assert decision(result) == (Source.FROZEN_ADAPTER, schedule)
    assert result.checkpoint == Checkpoint("base", None, "sft")
    assert any("only switches adapters off" in note for note in result.notes)


@pytest.mark.parametrize("init", NOT_IDENTITY)
def test_an_adapter_that_changes_the_policy_is_never_switched_off(init: Any) -> None:
    adapter = {"init_lora_weights": init}
    assert decision(plan(adapter=adapter)) == (Source.INITIAL_POLICY, PRECOMPUTED)
    assert decision(plan(adapter=adapter, streaming=True)) == (Source.FROZEN_ADAPTER, LIVE)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"bias": "all"}},
        {"adapter": {"bias": "lora_only"}},
        {"adapter": {}, "unfrozen_parameters": ("model.norm",)},
    ],
    ids=["all", "lora_only", "unfrozen"],
)
def test_trained_base_weights_rule_out_adapter_off_and_frozen_copies(settings: dict[str, Any]) -> None:
    assert decision(plan(**settings)) == (Source.INITIAL_POLICY, PRECOMPUTED)
    assert decision(plan(**settings, streaming=True)) == (Source.SEPARATE_MODEL, LIVE)
    resumed = settings | {"adapter": settings["adapter"] | {"path": "sft"}}
    assert decision(plan(**resumed)) == (Source.INITIAL_POLICY, PRECOMPUTED)
    result = plan(**resumed, streaming=True)
    assert decision(result) == (Source.SEPARATE_MODEL, LIVE)
    assert result.checkpoint == Checkpoint("base", None, "sft")


def test_a_resumed_adapters_own_bias_counts_not_the_configs() -> None:
    cfg = run(adapter={"path": "sft"}, streaming=True)
    assert plan_reference(cfg, facts_of(cfg, bias="lora_only")).source is Source.SEPARATE_MODEL


def test_target_parameters_are_not_copied() -> None:
    cfg = run(adapter={"path": "sft"}, streaming=True)
    assert plan_reference(cfg, facts_of(cfg, target_parameters=("w",))).source is Source.SEPARATE_MODEL


@pytest.mark.parametrize(("streaming", "schedule"), [(False, PRECOMPUTED), (True, LIVE)])
@pytest.mark.parametrize("adapter", [None, {}, {"path": "sft"}])
def test_another_checkpoint_is_a_second_model(streaming: bool, schedule: Schedule, adapter: Any) -> None:
    reference = {"model": "other", "revision": "v1", "dtype": "bfloat16", "device": "cpu"}
    result = plan(reference=reference, streaming=streaming, adapter=adapter)
    assert decision(result) == (Source.SEPARATE_MODEL, schedule)
    assert result.checkpoint == Checkpoint("other", "v1")
    assert not result.equals_starting_policy


def test_naming_the_starting_checkpoint_changes_nothing() -> None:
    for adapter in (None, {}):
        assert plan(reference={"model": "base"}, adapter=adapter) == plan(adapter=adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"adapter": {"path": "sft"}},
        {"adapter": {"init_lora_weights": "pissa"}},
        {"reinit_weights": True},
        {"revision": "v2"},
        {
            "adapter": {"path": "sft"},
            "reinit_weights": True,
            "reference": {"model": "base", "adapter": "sft"},
        },
        {"adapter": {}, "reinit_weights": True, "reference": {"model": "base", "adapter": "sft"}},
    ],
    ids=str,
)
def test_the_base_is_another_policy_where_the_run_does_not_start_from_it(settings: dict[str, Any]) -> None:
    result = plan(**{"reference": {"model": "base"}} | settings)
    assert result.source is Source.SEPARATE_MODEL
    assert not result.equals_starting_policy


# The contract of setup_reference_model: which live reference another trainer is handed.


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_contract_adapters_hand_over_nothing(kind: str) -> None:
    assert decision(live_plan(adapter={"kind": kind})) == (Source.ADAPTER_OFF, LIVE)


@pytest.mark.parametrize("make", [plan, live_plan])
def test_contract_an_adapter_with_its_own_reference_model(make: Any) -> None:
    result = make(adapter={}, reference={"source": "separate_model"})
    assert decision(result) == (Source.SEPARATE_MODEL, LIVE)


@pytest.mark.parametrize("method", [DPOConfig(), IPOConfig(), KTOConfig()], ids=lambda method: method.name)
def test_contract_full_fine_tuning_hands_over_a_copy(method: Any) -> None:
    assert decision(live_plan(method=method)) == (Source.SEPARATE_MODEL, LIVE)
    precomputed = live_plan(method=method, reference={"schedule": "precomputed"})
    assert decision(precomputed) == (Source.INITIAL_POLICY, PRECOMPUTED)
    initial = live_plan(method=method, reference={"source": "initial_policy"})
    assert decision(initial) == (Source.INITIAL_POLICY, PRECOMPUTED)


def test_contract_a_resumed_adapter_hands_over_nothing_and_warns() -> None:
    result = live_plan(adapter={"path": "sft"})
    assert decision(result) == (Source.FROZEN_ADAPTER, LIVE)
    assert any("wrong policy" in note for note in result.notes)


# Choices of the user's.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"reference": {"source": "none"}}, "compares the policy with a reference"),
        ({"reference": {"source": "adapter_off"}}, "no adapter"),
        ({"reference": {"source": "frozen_adapter"}}, "no adapter"),
        ({"adapter": {"path": "sft"}, "reference": {"source": "adapter_off"}}, "the bare base"),
        ({"adapter": {"init_lora_weights": "olora"}, "reference": {"source": "adapter_off"}}, "olora"),
        ({"adapter": {"bias": "all"}, "reference": {"source": "adapter_off"}}, "in place"),
        ({"adapter": {"bias": "all"}, "reference": {"source": "frozen_adapter"}}, "shares with the policy"),
        ({"adapter": {"init_lora_weights": False}, "reference": {"source": "separate_model"}}, "another one"),
        (
            {
                "adapter": {"init_lora_weights": "pissa"},
                "dtype": "bfloat16",
                "reference": {"source": "separate_model"},
            },
            "do not add up",
        ),
        (
            {
                "adapter": {"init_lora_weights": "olora"},
                "dtype": "float16",
                "reference": {"source": "separate_model"},
            },
            "do not add up",
        ),
        (
            {"adapter": {"layer_replication": ((0, 2),)}, "reference": {"source": "separate_model"}},
            "layers that the checkpoint does not have",
        ),
        (
            {"adapter": {"path": "sft"}, "load_in_4bit": True, "reference": {"source": "separate_model"}},
            "round them again",
        ),
        ({"reference": {"source": "initial_policy", "schedule": "live"}}, "only before step 1"),
        ({"streaming": True, "reference": {"source": "initial_policy"}}, "only before step 1"),
        ({"streaming": True, "reference": {"schedule": "precomputed"}}, "cannot be scored ahead"),
        ({"adapter": {}, "reference": {"model": "other", "source": "adapter_off"}}, "a model of its own"),
        ({"reference": {"dtype": "bfloat16"}}, "cannot have an effect"),
        ({"adapter": {}, "reference": {"device": "cpu"}}, "cannot have an effect"),
        ({"reference": {"revision": "v1"}}, "without reference.model"),
        ({"method": ORPOConfig(), "reference": {"model": "other"}}, "cannot have an effect"),
        ({"method": ORPOConfig(), "reference": {"source": "separate_model"}}, "cannot have an effect"),
        ({"method": DPOConfig(beta=0), "reference": {"schedule": "live"}}, "cannot have an effect"),
        (
            {"adapter": {"init_lora_weights": False, "bias": "all"}, "streaming": True},
            "makes the starting policy another one",
        ),
    ],
    ids=str,
)
def test_a_wrong_choice_is_refused_with_its_reason(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=re.escape(reason)) as caught:
        plan(**settings)
    assert_names_key_and_remedy(str(caught.value))


@pytest.mark.parametrize(
    ("settings", "reason", "remedy"),
    [
        (
            {"schedule": "live", "source": "separate_model"},
            "at every step",
            "reference.schedule: precomputed",
        ),
        ({"schedule": "live", "streaming": True}, "at every step", "reference.schedule: auto"),
        ({"schedule": "synced"}, "moves with the policy, so .* in output_dir", "schedule: precomputed for a"),
        ({"schedule": "synced", "streaming": True}, "moves with the policy", "schedule: auto for a"),
        ({"method": TDPO1Config()}, "probability of every token", None),
        ({"method": TDPO1Config(), "schedule": "synced"}, "probability of every token", None),
    ],
)
@pytest.mark.parametrize("key", ["cache", "flush_seconds"])
def test_a_cache_that_nothing_goes_into_is_refused(
    key: str, settings: dict[str, Any], reason: str, remedy: str | None
) -> None:
    apart = {name: settings[name] for name in ("streaming", "method") if name in settings}
    reference = {name: value for name, value in settings.items() if name not in apart}
    value = {"cache": "/team", "flush_seconds": 5}[key]
    with pytest.raises(PlanError) as caught:
        plan(reference=reference | {key: value}, **apart)
    message = str(caught.value)
    assert re.match(rf"reference\.{key}: {value}\S* cannot have an effect: the .*{reason}", message)
    assert re.search(r"Remove it\.$" if remedy is None else f"Remove it, or write .*{remedy}", message)


def test_a_merged_copy_is_refused_where_it_would_change_a_tied_weight() -> None:
    cfg = run(adapter={"path": "sft"}, reference={"source": "separate_model"})
    shape = TensorFact("F32", (4, 32))
    on_head = {"base_model.model.lm_head.lora_A.weight": shape}
    for name in ("lm_head.lora_A", "transformer.wte.lora_embedding_A", "gpt_neox.embed_in.lora_embedding_A"):
        tensors = {f"base_model.model.{name}": shape}
        with pytest.raises(PlanError, match="merging it would change both"):
            plan_reference(cfg, facts_of(cfg, tied=True, tensors=tensors))
    assert plan_reference(cfg, facts_of(cfg, tensors=on_head)).source is Source.SEPARATE_MODEL
    assert plan_reference(cfg, facts_of(cfg, tied=True)).source is Source.SEPARATE_MODEL


def test_an_adapter_on_stacked_layers_is_never_merged() -> None:
    resumed = run(adapter={"path": "sft"}, reference={"source": "separate_model"})
    with pytest.raises(PlanError, match="merging it would change all of them"):
        plan_reference(resumed, facts_of(resumed, layer_replication=((0, 2), (1, 2))))
    for adapter in (None, {}):
        named = run(adapter=adapter, reference={"adapter": "sft"})
        facts = facts_of(named)
        assert facts.reference_adapter is not None
        assert plan_reference(named, facts)
        other = replace(facts.reference_adapter, layer_replication=((0, 2), (1, 2)))
        with pytest.raises(PlanError, match="merging it would change all of them"):
            plan_reference(named, replace(facts, reference_adapter=other))


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "IA3"])
def test_other_adapters_than_lora_are_refused(kind: str) -> None:
    cfg = run(adapter={"path": "prefix"})
    with pytest.raises(PlanError, match=f"lora_model_dir: prefix holds a {kind}"):
        plan_reference(cfg, facts_of(cfg, peft_type=kind))


def test_the_refusal_offers_what_works() -> None:
    with pytest.raises(PlanError, match=r"Write reference\.source: auto, which picks frozen_adapter here"):
        plan(adapter={"path": "sft"}, reference={"source": "adapter_off"})


def test_choices_that_are_right_stand() -> None:
    frozen = plan(adapter={}, reference={"source": "frozen_adapter", "schedule": "live"})
    assert decision(frozen) == (Source.FROZEN_ADAPTER, LIVE)
    assert any("without a copy" in note for note in frozen.notes)
    ahead = plan(adapter={}, reference={"source": "separate_model", "schedule": "precomputed"})
    assert decision(ahead) == (Source.SEPARATE_MODEL, PRECOMPUTED)
    rounded = plan(adapter={"init_lora_weights": "pissa"}, reference={"source": "separate_model"})
    assert decision(rounded) == (Source.SEPARATE_MODEL, LIVE)
    resumed = plan(adapter={"path": "sft"}, reference={"source": "separate_model"})
    assert resumed.checkpoint == Checkpoint("base", None, "sft")
    assert plan(method=ORPOConfig(), reference={"source": "none"}).source is Source.NONE


def test_notes_say_what_surprises() -> None:
    lower = plan(reference={"source": "separate_model", "dtype": "bfloat16"})
    assert any("only up to that rounding" in note for note in lower.notes)
    cfg = run(reference={"model": "other"})
    assert any("vocabulary" in note for note in plan_reference(cfg, facts_of(cfg, reference_vocab=500)).notes)
    cfg = run(adapter={"bias": "all"})
    assert any("no biases" in note for note in plan_reference(cfg, facts_of(cfg, has_biases=False)).notes)
    assert not any("no biases" in note for note in plan_reference(cfg, facts_of(cfg)).notes)
