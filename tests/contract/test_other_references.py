"""A reference that is another policy than the start answers, live and precomputed, what that policy says.

That policy is built by hand with transformers and PEFT, and asked one sequence at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.reference.cache import LogpStore
from fiducial.reference.facts import gather_facts
from fiducial.reference.identity import identify_served
from fiducial.reference.plan import Schedule, Source, plan_reference
from fiducial.reference.served import ask_for_missing
from fiducial.reference.sources import SOURCES, Served, build_reference, build_scoring_reference
from fiducial.reference.verify import check_unmoved, prove_reference
from oracles import naive_token_logps
from reference_harness import GROUPS, answers, furthest, load_policy, reference_by_plan, train
from served_model import ModelServer, serve
from tiny import save_adapter, save_checkpoint

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 2, "lora_target_linear": True}
SAME, MOVED = 1e-4, 0.1
LIVE, PRECOMPUTED = Schedule.LIVE, Schedule.PRECOMPUTED


@dataclass(frozen=True)
class Kind:
    """How the policy trains, which reference is named for it, and the source that is expected."""

    keys: dict[str, Any]
    reference: dict[str, str]
    source: Source


KINDS: dict[str, Kind] = {
    "full, adapter": Kind({}, {"adapter": "sft"}, Source.SEPARATE_MODEL),
    "lora, adapter": Kind(LORA, {"adapter": "sft"}, Source.FROZEN_ADAPTER),
    "lora, adapter, separate": Kind(
        LORA, {"adapter": "sft", "source": "separate_model"}, Source.SEPARATE_MODEL
    ),
    "dora, adapter": Kind(LORA | {"peft_use_dora": True}, {"adapter": "sft"}, Source.FROZEN_ADAPTER),
    "trained modules, adapter": Kind(
        LORA | {"lora_modules_to_save": ["lm_head"]}, {"adapter": "sft"}, Source.SEPARATE_MODEL
    ),
    "trained token rows, adapter": Kind(
        LORA | {"peft_trainable_token_indices": list(range(0, 256, 3))},
        {"adapter": "sft"},
        Source.SEPARATE_MODEL,
    ),
    "lora, adapter with modules": Kind(LORA, {"adapter": "sft-modules"}, Source.SEPARATE_MODEL),
    "lora, pissa adapter": Kind(LORA, {"adapter": "sft-pissa"}, Source.SEPARATE_MODEL),
    "random start, adapter": Kind(
        LORA | {"peft_init_lora_weights": False}, {"adapter": "sft"}, Source.FROZEN_ADAPTER
    ),
    "pissa, adapter": Kind(
        LORA | {"peft_init_lora_weights": "pissa"}, {"adapter": "sft"}, Source.SEPARATE_MODEL
    ),
    "bias all, adapter": Kind(LORA | {"peft_bias": "all"}, {"adapter": "sft"}, Source.SEPARATE_MODEL),
    "resumed, another adapter": Kind(
        LORA | {"lora_r": None, "lora_model_dir": "other-sft"}, {"adapter": "sft"}, Source.FROZEN_ADAPTER
    ),
    "full, model": Kind({}, {"model": "other"}, Source.SEPARATE_MODEL),
    "lora, model": Kind(LORA, {"model": "other"}, Source.SEPARATE_MODEL),
    "lora, model and adapter": Kind(
        LORA, {"model": "other", "adapter": "sft-of-other"}, Source.SEPARATE_MODEL
    ),
    "full, model offloaded": Kind({}, {"model": "other", "offload": "disk"}, Source.SEPARATE_MODEL),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    save_checkpoint(folder / "base")
    save_checkpoint(folder / "other", seed=1)
    save_adapter(folder / "sft", folder / "base")
    save_adapter(folder / "sft-of-other", folder / "other")
    save_adapter(folder / "sft-modules", folder / "base", modules_to_save=["lm_head"])
    save_adapter(folder / "sft-pissa", folder / "base", init_lora_weights="pissa")
    torch.manual_seed(7)
    other = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "sft")
    with torch.no_grad():
        for name, value in other.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    other.save_pretrained(folder / "other-sft")
    return folder


def configure(folder: Path, kind: Kind, schedule: Schedule) -> RunConfig:
    places = {"model", "adapter"}
    reference = {
        key: str(folder / value) if key in places else value for key, value in kind.reference.items()
    }
    keys = {
        "base_model": str(folder / "base"),
        "rl": "dpo",
        "reference": reference | {"schedule": schedule.value},
    }
    keys |= kind.keys
    if "lora_model_dir" in keys:
        keys["lora_model_dir"] = str(folder / keys["lora_model_dir"])
    return validate_config(keys)


def by_hand(folder: Path, kind: Kind) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / kind.reference.get("model", "base"))
    if "adapter" in kind.reference:
        model = PeftModel.from_pretrained(model, folder / kind.reference["adapter"])
    with torch.no_grad():
        return naive_token_logps(model.eval(), GROUPS)


@pytest.mark.parametrize("schedule", [LIVE, PRECOMPUTED])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_reference_is_the_policy_that_was_named(
    checkpoints: Path, tmp_path: Path, kind: Kind, schedule: Schedule
) -> None:
    cfg = configure(checkpoints, kind, schedule)
    if "offload" in kind.reference and schedule is PRECOMPUTED:
        pytest.skip("its identity comes from its files: tests/unit/model/test_offload.py")
    plan = plan_reference(cfg, gather_facts(cfg))
    assert (plan.source, plan.schedule, plan.equals_starting_policy) == (kind.source, schedule, False)
    policy = load_policy(cfg)
    expected = by_hand(checkpoints, kind)

    reference = reference_by_plan(plan, cfg, policy, tmp_path)
    proof = prove_reference(policy, reference, GROUPS, expected_equal=plan.equals_starting_policy)
    before = answers(reference, policy)
    assert furthest(before, expected) < SAME
    assert proof.max_difference > MOVED, "the named policy answers as the start does: this proves nothing"

    train(policy, reference)

    assert torch.equal(answers(reference, policy), before)
    assert check_unmoved(proof, policy, reference, GROUPS) == 0
    if "adapter" in cfg.model_dump(exclude_none=True) and schedule is PRECOMPUTED:
        assert list(policy.model.peft_config) == ["default"], "what was scored is not held any longer"


@pytest.fixture(params=["vllm", "openai"])
def server(checkpoints: Path, request: pytest.FixtureRequest) -> Iterator[ModelServer]:
    with serve(AutoModelForCausalLM.from_pretrained(checkpoints / "other").eval(), request.param) as served:
        yield served


@pytest.mark.parametrize("keys", [{}, LORA], ids=["full", "lora"])
def test_a_served_reference_is_the_model_on_the_server(
    checkpoints: Path, tmp_path: Path, server: ModelServer, keys: dict[str, Any]
) -> None:
    named = {"endpoint": server.url, "model": "some/name"}
    cfg = validate_config({"base_model": str(checkpoints / "base"), "rl": "dpo", "reference": named} | keys)
    plan = plan_reference(cfg, gather_facts(cfg))
    assert (plan.source, plan.schedule, plan.equals_starting_policy) == (Source.ENDPOINT, PRECOMPUTED, False)
    policy = load_policy(cfg)
    expected = by_hand(checkpoints, KINDS["full, model"])
    asked = build_scoring_reference(plan, policy)
    assert isinstance(asked, Served)
    assert furthest(answers(asked, policy), expected) < SAME

    assert plan.checkpoint is not None
    store = LogpStore(tmp_path, identify_served(plan.checkpoint))
    assert ask_for_missing(GROUPS, asked.endpoint, store, flush_every=1) == 2 * len(GROUPS)
    reference = build_reference(plan, policy, store=store)
    assert furthest(answers(reference, policy), expected) < SAME
    train(policy, reference)
    assert furthest(answers(reference, policy), expected) < SAME


def test_every_source_that_can_be_another_policy_is_reached() -> None:
    own = {Source.NONE, Source.ADAPTER_OFF, Source.INITIAL_POLICY}
    assert {kind.source for kind in KINDS.values()} | {Source.ENDPOINT} == set(SOURCES) - own


def test_the_same_adapter_is_the_same_reference_however_it_is_held(checkpoints: Path, tmp_path: Path) -> None:
    # Beside the policy's own adapter, or resumed as the policy: one identity, so the records are shared.
    named = KINDS["lora, adapter"]
    resumed = validate_config(
        LORA
        | {"base_model": str(checkpoints / "base"), "rl": "dpo", "lora_model_dir": str(checkpoints / "sft")}
        | {"lora_r": None}
    )
    folders = []
    for cfg in (configure(checkpoints, named, PRECOMPUTED), resumed):
        plan = plan_reference(cfg, gather_facts(cfg))
        assert plan.source is Source.FROZEN_ADAPTER
        reference_by_plan(plan, cfg, load_policy(cfg), tmp_path)
        folders.append({path.name for path in tmp_path.iterdir()})
    assert folders[0] == folders[1]
