from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from peft import PeftModel

from fiducial.config.schema import AdapterConfig, ScheduleChoice, SourceChoice
from fiducial.data.batch import pack
from fiducial.errors import CacheError
from fiducial.model.adapters import freeze_copy, new_adapter
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore
from fiducial.reference.identity import Identity
from fiducial.reference.plan import VALID, Checkpoint, ReferencePlan, Schedule, Source
from fiducial.reference.sources import (
    SOURCES,
    AdapterOff,
    FrozenAdapter,
    InitialPolicy,
    NoReference,
    Precomputed,
    SeparateModel,
    build_reference,
    build_scoring_reference,
)
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)


def adapted(**options: object) -> PeftModel:
    cfg = AdapterConfig.model_validate({"kind": "lora", "r": 4, "init_lora_weights": False, **options})
    return new_adapter(tiny_model(), cfg, float32=True)


def scorer(model: torch.nn.Module) -> Scorer:
    return Scorer(model, layout="padded")  # type: ignore[arg-type]  # a PeftModel is called like its base


def plan(source: Source, schedule: Schedule | None) -> ReferencePlan:
    return ReferencePlan(source, schedule, Checkpoint("base"), "a test")


@pytest.fixture
def store(tmp_path: Path) -> LogpStore:
    return LogpStore(tmp_path, Identity("base", "0", "float32", "None"))


def test_every_source_of_the_plan_has_a_builder() -> None:
    assert set(SOURCES) == set(Source) == set(VALID)


def test_a_run_may_name_every_source_and_schedule() -> None:
    assert set(get_args(SourceChoice)) == {"auto", *Source}
    assert set(get_args(ScheduleChoice)) == {"auto", *Schedule}


@pytest.mark.parametrize(("source", "kind"), [
    (Source.NONE, NoReference),
    (Source.ADAPTER_OFF, AdapterOff),
    (Source.FROZEN_ADAPTER, FrozenAdapter),
    (Source.SEPARATE_MODEL, SeparateModel),
])  # fmt: skip
def test_live_plans_are_built_from_the_table(source: Source, kind: type) -> None:
    schedule = None if source is Source.NONE else Schedule.LIVE
    reference = build_reference(plan(source, schedule), scorer(adapted()), scorer(tiny_model()))
    assert isinstance(reference, kind)


def test_a_precomputed_frozen_adapter_keeps_no_copy(store: LogpStore) -> None:
    policy = scorer(adapted())
    decision = plan(Source.FROZEN_ADAPTER, Schedule.PRECOMPUTED)
    assert isinstance(build_scoring_reference(decision, policy), InitialPolicy)
    assert isinstance(build_reference(decision, policy, store=store), Precomputed)
    assert list(policy.model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", [InitialPolicy, AdapterOff, FrozenAdapter, SeparateModel])
def test_scoring_leaves_everything_as_it_was(kind: type) -> None:
    model = adapted(dropout=0.5)
    freeze_copy(model)
    model.train()
    model.base_model.model.model.norm.eval()
    frozen = next(value for value in model.parameters() if value.requires_grad)
    frozen.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    flags = [value.requires_grad for value in model.parameters()]
    policy = scorer(model)
    batch = policy.pack(GROUPS)

    first, second = kind(policy).token_logps(batch), kind(policy).token_logps(batch)

    assert torch.equal(first.values, second.values), "dropout was on"
    assert not first.values.requires_grad
    assert torch.equal(first.sequence, batch.sequence)
    assert [module.training for module in model.modules()] == modes
    assert [value.requires_grad for value in model.parameters()] == flags


def test_scoring_between_forward_and_backward_leaves_the_gradient_alone() -> None:
    gradients = []
    for between in (False, True):
        torch.manual_seed(0)
        model = adapted()
        freeze_copy(model)
        policy = scorer(model.train())
        batch = policy.pack(GROUPS)
        total = policy(batch).values.sum()
        if between:
            AdapterOff(policy).token_logps(batch)
            FrozenAdapter(policy).token_logps(batch)
        total.backward()
        gradients.append(torch.cat([v.grad.flatten() for v in model.parameters() if v.grad is not None]))
    assert torch.equal(*gradients)


def test_no_reference_answers_nothing() -> None:
    assert NoReference().token_logps(pack(GROUPS, layout="padded")) is None


def test_a_second_model_reads_its_own_layout() -> None:
    second = SeparateModel(scorer(tiny_model()))
    packed, padded = pack(GROUPS, layout="packed"), pack(GROUPS, layout="padded")
    from_packed, from_padded = second.token_logps(packed), second.token_logps(padded)
    assert torch.equal(from_packed.values, from_padded.values)
    assert torch.equal(from_packed.sequence, packed.sequence)


def test_precomputed_answers_in_the_batchs_order(store: LogpStore) -> None:
    rng = np.random.default_rng(0)
    for group in GROUPS:
        for key, completion in zip(group.keys, group.completions, strict=True):
            store.put(key, rng.normal(size=len(completion)).astype(np.float32))
    batch = pack(GROUPS[::-1], layout="padded")
    answer = Precomputed(store).token_logps(batch)
    for number, key in enumerate(batch.keys):
        assert answer.values[batch.sequence == number].tolist() == store.get(key).tolist()
    assert answer.num_sequences == 6
    assert len(Precomputed(store).token_logps(pack([], layout="padded")).values) == 0


def test_a_missing_record_is_named_and_never_zero(store: LogpStore) -> None:
    batch = pack(GROUPS[:1], layout="padded")
    with pytest.raises(CacheError, match=GROUPS[0].keys[0]):
        Precomputed(store).token_logps(batch)


def test_a_record_of_another_length_is_named(store: LogpStore) -> None:
    group = GROUPS[0]
    for key in group.keys:
        store.put(key, np.zeros(99, np.float32))
    with pytest.raises(CacheError, match="damaged"):
        Precomputed(store).token_logps(pack([group], layout="padded"))
