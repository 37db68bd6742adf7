"""The reference equals a truly separate copy of the starting policy, at step 0 and after three steps.

For every kind of training and both schedules, with the source the plan itself chooses. The copy is made by
`copy.deepcopy` of the whole policy before anything else is built: what all cheaper sources stand for.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.model.scoring import Scorer
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import Schedule, Source, plan_reference
from fiducial.reference.sources import SOURCES, AdapterOff, SeparateModel
from fiducial.reference.verify import check_unmoved, prove_reference, require_adapter_off
from reference_harness import GROUPS, answers, furthest, load_policy, reference_by_plan, train
from tiny import save_adapter, save_checkpoint

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
UPPER_LAYER = LORA | {
    "lora_target_linear": None,
    "lora_target_modules": ["q_proj", "down_proj"],
    "peft_layers_to_transform": [1],
}

SAME = 1e-4
"""Nats a token that the shape of the batch can change; in one shape every source is at 0."""
MOVED = 0.1

PARAMETERS = LORA | {
    "lora_target_linear": False,
    "lora_target_modules": ["q_proj", "down_proj"],
    "lora_target_parameters": ["up_proj.weight"],
}


@dataclass(frozen=True)
class Kind:
    """A way to train, and the source expected live and precomputed."""

    keys: dict[str, Any]
    live: Source
    precomputed: Source
    base: str = "llama"
    shares: int = 0
    """Layers that a live reference has computed by the policy's pass."""


KINDS: dict[str, Kind] = {
    "full": Kind({}, Source.SEPARATE_MODEL, Source.INITIAL_POLICY),
    "full, some frozen": Kind(
        {"unfrozen_parameters": [r"model\.layers\.1\."]},
        Source.SEPARATE_MODEL,
        Source.INITIAL_POLICY,
        shares=1,
    ),
    "lora": Kind(LORA, Source.ADAPTER_OFF, Source.ADAPTER_OFF),
    "lora, separate copy": Kind(
        LORA | {"rl_adapter_ref_model": True}, Source.SEPARATE_MODEL, Source.SEPARATE_MODEL
    ),
    "lora with dropout": Kind(LORA | {"lora_dropout": 0.3}, Source.ADAPTER_OFF, Source.ADAPTER_OFF),
    "lora, upper layer": Kind(UPPER_LAYER, Source.ADAPTER_OFF, Source.ADAPTER_OFF, shares=1),
    "random start, upper layer": Kind(
        UPPER_LAYER | {"peft_init_lora_weights": False},
        Source.FROZEN_ADAPTER,
        Source.INITIAL_POLICY,
        shares=1,
    ),
    "rslora": Kind(LORA | {"peft_use_rslora": True}, Source.ADAPTER_OFF, Source.ADAPTER_OFF),
    "dora": Kind(LORA | {"peft_use_dora": True}, Source.ADAPTER_OFF, Source.ADAPTER_OFF),
    "pissa": Kind(
        LORA | {"peft_init_lora_weights": "pissa"},
        Source.FROZEN_ADAPTER,
        Source.INITIAL_POLICY,
    ),
    "olora": Kind(
        LORA | {"peft_init_lora_weights": "olora"},
        Source.FROZEN_ADAPTER,
        Source.INITIAL_POLICY,
    ),
    "random start": Kind(
        LORA | {"peft_init_lora_weights": False}, Source.FROZEN_ADAPTER, Source.INITIAL_POLICY
    ),
    "parameters": Kind(PARAMETERS, Source.ADAPTER_OFF, Source.ADAPTER_OFF),
    "resumed": Kind(LORA | {"lora_model_dir": "adapter"}, Source.FROZEN_ADAPTER, Source.FROZEN_ADAPTER),
    "bias all": Kind(LORA | {"peft_bias": "all"}, Source.SEPARATE_MODEL, Source.INITIAL_POLICY, base="qwen2"),
    "trained modules": Kind(
        LORA | {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, Source.ADAPTER_OFF, Source.ADAPTER_OFF
    ),
    "trained token rows": Kind(
        LORA | {"peft_trainable_token_indices": list(range(0, 256, 3))},
        Source.ADAPTER_OFF,
        Source.ADAPTER_OFF,
    ),
}


GATHERED_ONCE = {
    *("lora", "lora with dropout", "lora, upper layer", "random start, upper layer", "rslora", "dora"),
    *("pissa", "olora", "random start", "resumed"),
}
"""Kinds whose reference has the policy's layers, with nothing trained below them."""

STANDING = (Schedule.LIVE, Schedule.PRECOMPUTED)
"""Schedules of a reference that does not move."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contract")
    save_checkpoint(folder / "llama")
    save_checkpoint(folder / "qwen2", "qwen2")
    save_adapter(folder / "adapter", folder / "llama")
    return folder


def configure(folder: Path, kind: Kind, schedule: Schedule, **more: Any) -> RunConfig:
    keys = {"base_model": str(folder / kind.base), "rl": "dpo", "reference": {"schedule": schedule.value}}
    keys |= kind.keys | more
    if "lora_model_dir" in keys:
        keys["lora_model_dir"] = str(folder / "adapter")
    return validate_config(keys)


@pytest.mark.parametrize("schedule", STANDING)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_planned_reference_is_the_starting_policy(
    checkpoints: Path, tmp_path: Path, kind: Kind, schedule: Schedule
) -> None:
    cfg = configure(checkpoints, kind, schedule)
    plan = plan_reference(cfg, gather_facts(cfg))
    assert (plan.source, plan.schedule) == (getattr(kind, schedule.value), schedule)
    assert plan.shared_layers == (kind.shares if schedule is Schedule.LIVE else 0)
    policy = load_policy(cfg)
    separate = SeparateModel(Scorer(copy.deepcopy(policy.model), layout="packed"))
    start = answers(separate, policy)

    if plan.source is Source.ADAPTER_OFF:
        require_adapter_off(policy, GROUPS)
    reference = reference_by_plan(plan, cfg, policy, tmp_path)
    proof = prove_reference(policy, reference, GROUPS, expected_equal=plan.equals_starting_policy)
    before = answers(reference, policy)
    assert furthest(before, start) <= (0 if schedule is Schedule.LIVE else SAME)

    train(policy, reference)

    assert torch.equal(answers(reference, policy), before)
    assert furthest(answers(separate, policy), start) == 0, "the separate copy itself has moved"
    assert check_unmoved(proof, policy, reference, GROUPS) == 0
    moved = SeparateModel(policy)
    assert furthest(answers(moved, policy), start) > MOVED, "training that moves nothing proves nothing"


@pytest.mark.parametrize("name", KINDS)
def test_gathering_layers_once_trains_what_two_passes_do(
    checkpoints: Path, tmp_path: Path, name: str
) -> None:
    cfg = configure(checkpoints, KINDS[name], Schedule.LIVE, fsdp_version=2)
    plan = plan_reference(cfg, gather_facts(cfg))
    assert plan.gathered_once == (name in GATHERED_ONCE)
    if not plan.gathered_once:
        return
    trained = []
    for each in (plan, replace(plan, gathered_once=False, shared_layers=0)):
        policy = load_policy(cfg)
        reference = reference_by_plan(each, cfg, policy, tmp_path)
        torch.manual_seed(0)  # of the dropout
        train(policy, reference)
        trained.append(torch.cat([value.detach().flatten() for value in policy.model.parameters()]))
    assert torch.equal(*trained)


def test_every_source_and_schedule_is_reached() -> None:
    reached = {(getattr(kind, schedule.value), schedule) for kind in KINDS.values() for schedule in STANDING}
    # A server is another policy: tests/contract/test_other_references.py.
    assert {source for source, _ in reached} == set(SOURCES) - {Source.NONE, Source.ENDPOINT}


@pytest.mark.parametrize("name", ["pissa", "olora", "random start", "resumed"])
def test_adapter_off_would_not_be_the_starting_policy(checkpoints: Path, name: str) -> None:
    cfg = configure(checkpoints, KINDS[name], Schedule.LIVE)
    policy = load_policy(cfg)
    start = answers(SeparateModel(Scorer(copy.deepcopy(policy.model), layout="packed")), policy)
    assert furthest(answers(AdapterOff(policy), policy), start) > MOVED


def test_adapter_off_would_move_where_biases_are_trained(checkpoints: Path) -> None:
    policy = load_policy(configure(checkpoints, KINDS["bias all"], Schedule.LIVE))
    reference = AdapterOff(policy)
    before = answers(reference, policy)
    train(policy, reference)
    assert furthest(answers(reference, policy), before) > MOVED


def test_the_bare_base_is_not_what_a_resumed_run_starts_from(checkpoints: Path) -> None:
    cfg = configure(checkpoints, KINDS["resumed"], Schedule.LIVE)
    policy = load_policy(cfg)
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "llama")
    start = answers(SeparateModel(policy), policy)
    assert furthest(answers(SeparateModel(Scorer(base, layout="packed")), policy), start) > MOVED


def test_live_and_precomputed_train_the_same_weights(checkpoints: Path, tmp_path: Path) -> None:
    trained = []
    for schedule in STANDING:
        cfg = configure(checkpoints, KINDS["lora"], schedule)
        plan = plan_reference(cfg, gather_facts(cfg))
        policy = load_policy(cfg)
        train(policy, reference_by_plan(plan, cfg, policy, tmp_path))
        trained.append(torch.cat([value.detach().flatten() for value in policy.model.parameters()]))
    torch.testing.assert_close(*trained, atol=1e-4, rtol=0)
