"""Which layers a plan lets policy and reference share, and what that costs and saves."""

from dataclasses import replace
from typing import Any

import pytest

from fiducial.config.methods import TDPO1Config
from fiducial.config.schema import DistributedConfig
from fiducial.reference.alternatives import relative_time
from fiducial.reference.facts import Facts
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import ReferencePlan, Source, plan_reference
from fiducial.reference.shapes import implied_tensors
from fiducial.reference.trained import layer_of, untrained_layers
from planning import facts_of, run

LIVE = {"schedule": "live"}
UPPER = (r"model\.layers\.[23]\.",)


def facts_for(cfg: Any, layers: int = 4, **adapter: Any) -> Facts:
    facts = facts_of(cfg, **adapter)
    sizes = replace(facts.model.sizes, layers=layers)
    tensors = implied_tensors(sizes, tied=False, gated=True, dtype="F32")
    number = sum(tensor.size for tensor in tensors.values())
    model = replace(facts.model, sizes=sizes, tensors=tensors, num_parameters=number)
    return replace(facts, model=model)


def plan(reference: Any = LIVE, **settings: Any) -> ReferencePlan:
    cfg = run(reference=reference, **settings)
    return plan_reference(cfg, facts_for(cfg))


@pytest.mark.parametrize(
    ("patterns", "layers"),
    [
        (UPPER, 2),
        ((*UPPER, r"model\.norm\.weight", r"lm_head\.weight"), 2),
        ((r"lm_head\.weight", r"model\.norm\."), 4),
        ((r"model\.layers\.3\.mlp\.",), 3),
        ((r"model\.layers\.0\.",), 0),
        ((*UPPER, r"model\.embed_tokens"), 0),
        ((r"nothing",), 0),
        ((r"layers\.3\.",), 0),
        (None, 0),
    ],
)
def test_full_fine_tuning_shares_what_lies_below_what_trains(patterns: Any, layers: int) -> None:
    found = plan(unfrozen_parameters=patterns)
    assert found.shared_layers == layers
    assert found.why.endswith(".")
    said = f"lowest {layers} of 4 layers hold nothing that is trained" if layers else "a pass of its own"
    assert said in found.why


@pytest.mark.parametrize(
    ("adapter", "layers"),
    [
        ({}, 0),
        ({"layers_to_transform": (2, 3), "target_modules": ("q_proj",)}, 2),
        ({"layers_to_transform": (3,), "target_modules": ("q_proj",), "modules_to_save": ("lm_head",)}, 3),
        (
            {
                "layers_to_transform": (3,),
                "target_modules": ("q_proj",),
                "modules_to_save": ("embed_tokens",),
            },
            0,
        ),
        ({"layers_to_transform": (3,), "target_modules": ("q_proj",), "trainable_token_indices": (1,)}, 0),
        ({"layers_to_transform": (3,), "target_modules": ("q_proj",), "target_parameters": ("w",)}, 0),
        ({"layers_to_transform": (3,), "target_modules": ("q_proj",), "bias": "all"}, 0),
        ({"layers_to_transform": (3,), "target_modules": ("q_proj",), "layer_replication": ((0, 4),)}, 0),
    ],
    ids=str,
)
def test_an_adapter_shares_what_lies_below_it(adapter: Any, layers: int) -> None:
    cfg = run(reference=LIVE, adapter=adapter)
    assert untrained_layers(cfg, facts_for(cfg)) == layers
    assert plan(adapter=adapter).shared_layers == layers


def test_a_resumed_adapter_is_where_its_tensors_are() -> None:
    cfg = run(reference=LIVE, adapter={"path": "sft"})
    tensors = {f"base_model.model.model.layers.{n}.mlp.up_proj.lora_A.weight": None for n in (2, 3)}
    assert plan_reference(cfg, facts_for(cfg, tensors=tensors)).shared_layers == 2
    assert plan_reference(cfg, facts_for(cfg)).shared_layers == 0, "unseen tensors may be anywhere"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"reference": LIVE | {"model": "other"}}, "two different networks"),
        ({"reference": LIVE | {"dtype": "bfloat16"}, "dtype": "float32"}, "held in bfloat16"),
        ({"method": TDPO1Config()}, "already reads the reference's distributions"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant checkpoints",
        ),
    ],
    ids=str,
)
def test_what_keeps_two_passes(settings: dict[str, Any], why: str) -> None:
    found = plan(**({"unfrozen_parameters": UPPER} | settings))
    assert found.shared_layers == 0
    assert why in found.why.partition("Each has a pass of its own: ")[2]


def test_sharded_weights_are_held_twice_and_computed_once() -> None:
    cfg = run(reference=LIVE, unfrozen_parameters=UPPER)
    cfg = cfg.model_copy(update={"distributed": DistributedConfig(fsdp_version=2)})
    found = plan_reference(cfg, facts_for(cfg))
    assert (found.shared_layers, found.frozen_held_once) == (2, False)


def sharded_plan(reference: Any = LIVE, fsdp_config: Any = None, **settings: Any) -> ReferencePlan:
    cfg = run(reference=reference, **settings)
    cfg = cfg.model_copy(update={"distributed": DistributedConfig(fsdp_version=2, fsdp_config=fsdp_config)})
    return plan_reference(cfg, facts_for(cfg))


QUERIES = {"target_modules": ("q_proj",)}
UPPER_QUERIES = QUERIES | {"layers_to_transform": (2, 3)}


@pytest.mark.parametrize(
    ("adapter", "layers", "said"),
    [
        (QUERIES, 0, "The sharded weights of each layer are gathered once for both."),
        (
            UPPER_QUERIES,
            2,
            "both compute them once. The sharded weights of each layer above are gathered once for both.",
        ),
        (QUERIES | {"path": "sft"}, 0, "a pass of its own: the adapter begins in the lowest layer, or below"),
    ],
    ids=["all layers", "upper layers", "where its tensors are unseen"],
)
def test_an_adapters_sharded_layers_are_gathered_once(adapter: Any, layers: int, said: str) -> None:
    found = sharded_plan(adapter=adapter)
    assert (found.shared_layers, found.gathered_once) == (layers, "gathered once" in said)
    assert said in found.why
    assert not plan(adapter=adapter).gathered_once, "without sharding there is nothing to gather"


def test_a_named_adapter_goes_through_the_policys_layers() -> None:
    found = sharded_plan(LIVE | {"adapter": "other"}, adapter=QUERIES)
    assert (found.source, found.gathered_once) == (Source.FROZEN_ADAPTER, True)
    assert sharded_plan(LIVE | {"adapter": "other"}, adapter=UPPER_QUERIES).shared_layers == 0, (
        "where that one begins is not looked at"
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"adapter": {"target_modules": ("embed_tokens", "q_proj")}}, "what the lowest layer reads may be"),
        ({"adapter": QUERIES | {"modules_to_save": ("embed_tokens",)}}, "what the lowest layer reads may be"),
        ({"fsdp_config": {"reshard_after_forward": False}}, "weights stay gathered"),
        ({"fsdp_config": {"reshard_after_forward": "false"}}, "weights stay gathered"),
        ({"fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "it is not layers"),
        ({"reference": LIVE | {"source": "separate_model"}}, "each has weights of its own"),
        ({"method": TDPO1Config()}, "already reads the reference's distributions"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant checkpoints",
        ),
    ],
    ids=str,
)
def test_what_gathers_twice(settings: dict[str, Any], why: str) -> None:
    found = sharded_plan(**({"adapter": QUERIES} | settings))
    assert not found.gathered_once
    assert why in found.why.partition("Each has a pass of its own: ")[2]


def test_an_adapter_above_the_layers_leaves_nothing_to_gather_twice() -> None:
    found = sharded_plan(adapter={"target_modules": ("lm_head",)})
    assert (found.shared_layers, found.gathered_once) == (4, False)


@pytest.mark.parametrize("schedule", ["precomputed", "synced"])
def test_other_schedules_have_passes_of_their_own(schedule: str) -> None:
    found = plan({"schedule": schedule}, unfrozen_parameters=UPPER)
    assert found.shared_layers == 0
    assert "pass of its own" not in found.why
    assert found.frozen_held_once == (schedule == "synced")


def test_the_second_model_holds_what_is_trained() -> None:
    cfg = run(reference=LIVE, unfrozen_parameters=UPPER)
    facts = facts_for(cfg)
    found = plan_reference(cfg, facts)
    assert found.frozen_held_once
    memory = estimate_memory(cfg, facts, found, 64)
    upper = sum(tensor.size for name, tensor in facts.model.tensors.items() if layer_of(name) in {2, 3})
    (reference,) = (part for part in memory.parts if part.name.startswith("reference"))
    assert reference.bytes == 4 * upper
    assert "trained a second time" in memory.held[1]
    whole = plan({**LIVE, "offload": "disk"}, unfrozen_parameters=UPPER)
    assert (whole.frozen_held_once, whole.shared_layers) == (False, 2)
    assert not plan(unfrozen_parameters=None).frozen_held_once
    for apart in ({"schedule": "precomputed"}, {"schedule": "live", "model": "other"}):
        reference = {"source": "separate_model", **apart}
        assert not plan(reference, unfrozen_parameters=UPPER).frozen_held_once, apart
    half = plan({**LIVE, "dtype": "bfloat16"}, unfrozen_parameters=UPPER, dtype="float32")
    assert not half.frozen_held_once, "it holds them otherwise"


def test_time_counts_what_is_left_to_compute() -> None:
    cfg = run(reference=LIVE, unfrozen_parameters=UPPER)
    facts = facts_for(cfg)
    layer = sum(tensor.size for name, tensor in facts.model.tensors.items() if layer_of(name) == 0)
    above = 1 - 2 * layer / facts.model.num_parameters
    trained = 2 * layer / facts.model.num_parameters
    expected = 1 + 2 * above / (2 + 2 * above + 2 * trained)
    assert relative_time(cfg, facts, plan_reference(cfg, facts)) == pytest.approx(expected)
    apart = replace(plan_reference(cfg, facts), shared_layers=0)
    assert relative_time(cfg, facts, apart) == pytest.approx(1 + 2 / (2 + 2 * above + 2 * trained))
