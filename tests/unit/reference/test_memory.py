"""The arithmetic of the estimate: everything that is held but activations."""

import sys
from pathlib import Path
from typing import Any

import pytest

from fiducial.config.methods import DPOConfig, KTOConfig, TPOConfig
from fiducial.config.schema import (
    AdapterConfig,
    DataConfig,
    DatasetConfig,
    DistributedConfig,
    ModelConfig,
    OptimizationConfig,
    ReferenceConfig,
    RunConfig,
)
from fiducial.reference.activations import (
    training_pass,
)
from fiducial.reference.facts import Facts, gather_facts
from fiducial.reference.memory import (
    LARGEST_BUDGET,
    MemoryEstimate,
    auto_token_budget,
    estimate_memory,
    longest_group,
)
from fiducial.reference.plan import plan_reference
from fiducial.reference.precision import held_precision
from fiducial.reference.trained import count_trained
from sized import FAMILY, SIZES, run_config
from tiny import tiny_model


def estimate(cfg: RunConfig, budget: int = 1000, *, gpu: bool = False) -> MemoryEstimate:
    facts = gather_facts(cfg)
    return estimate_memory(cfg, facts, plan_reference(cfg, facts), budget, gpu=gpu)


def part(memory: MemoryEstimate, name: str) -> int:
    return sum(item.bytes for item in memory.parts if item.name.startswith(name))


def test_full_fine_tuning_holds_weights_gradients_and_two_moments(families: dict[str, Path]) -> None:
    weights = sum(
        parameter.numel() for parameter in tiny_model("llama", **SIZES, **FAMILY["llama"]).parameters()
    )
    memory = estimate(run_config(families["llama"]))
    assert part(memory, "policy weights") == 4 * weights
    assert part(memory, "gradients") == 4 * weights
    assert part(memory, "optimizer state") == 8 * weights
    assert part(memory, "reference") == 0
    assert part(memory, "autocast copies") == 0


def test_autocast_keeps_a_copy_of_the_weights(families: dict[str, Path]) -> None:
    memory = estimate(run_config(families["llama"], autocast="bfloat16"))
    assert part(memory, "autocast copies") * 2 == part(memory, "policy weights")


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("adafactor", 0), ("lion_32bit", 4)],
)
def test_optimizer_state(optimizer: str, bytes_per_weight: int, families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"]).model_copy(
        update={"optimization": OptimizationConfig(optimizer=optimizer)}
    )
    trained = count_trained(cfg, gather_facts(cfg)).total
    assert part(estimate(cfg), "optimizer state") == bytes_per_weight * trained


@pytest.mark.parametrize("adapter", [None, AdapterConfig(kind="lora", r=8, alpha=16)], ids=["full", "lora"])
def test_offloaded_weights_are_in_the_cpus_memory_while_they_train(
    adapter: AdapterConfig | None, families: dict[str, Path]
) -> None:
    held = run_config(families["llama"], adapter=adapter)
    held = held.model_copy(update={"optimization": OptimizationConfig(gradient_accumulation_steps=1)})
    options = DistributedConfig(fsdp_version=2, fsdp_config={"offload_params": True})
    away = held.model_copy(update={"distributed": options})
    before, after = estimate(held, 1, gpu=True), estimate(away, 1, gpu=True)
    waiting = {item.name.split(" (")[0]: item.bytes for item in after.parts if item.on_cpu}
    weights = part(before, "policy weights") + part(before, "adapter weights")
    assert waiting["policy weights"] == weights
    assert waiting["gradients"] == part(before, "gradients")
    assert waiting["optimizer state"] == part(before, "optimizer state")
    # The model is loaded and proved before it is offloaded.
    assert after.at("scoring") == before.at("scoring")
    assert after.at("training") < before.at("training")
    layers = [name for name in gather_facts(held).model.tensors if ".layers." in name]
    assert layers, "the model's layers are known by their names"
    here = part(after, "policy weights of the layers at hand")
    outside = 2 * sum(
        fact.size for name, fact in gather_facts(held).model.tensors.items() if name not in layers
    )
    assert outside < here < weights
    assert estimate(away, 1, gpu=False).parts == estimate(held, 1, gpu=False).parts  # it is all the CPU's


@pytest.mark.parametrize("passes", [1, 4])
def test_gradients_of_offloaded_weights_leave_in_every_pass(passes: int, families: dict[str, Path]) -> None:
    options = DistributedConfig(fsdp_version=2, fsdp_config={"offload_params": True})
    cfg = run_config(families["llama"]).model_copy(
        update={
            "distributed": options,
            "optimization": OptimizationConfig(gradient_accumulation_steps=passes),
        }
    )
    gradients = {
        item.name: item for item in estimate(cfg, 1, gpu=True).parts if item.name.startswith("gradients")
    }
    assert gradients["gradients"].on_cpu
    here = gradients["gradients of the layer at hand"]
    assert not here.on_cpu
    assert 0 < here.bytes < gradients["gradients"].bytes


@pytest.mark.parametrize(("schedule", "when"), [("live", "throughout"), ("precomputed", "scoring")])
def test_a_second_model_is_held_as_long_as_it_is_asked(
    schedule: Any, when: str, families: dict[str, Path]
) -> None:
    reference = ReferenceConfig(source="separate_model", schedule=schedule, dtype="bfloat16")
    memory = estimate(run_config(families["llama"]).model_copy(update={"reference": reference}))
    found = [item for item in memory.parts if item.name == "reference model"]
    assert [(item.when, item.bytes) for item in found] == [(when, part(memory, "policy weights") // 2)]
    assert memory.peak == max(memory.at("training"), memory.at("scoring"))


def test_a_reference_that_moves_is_scored_in_passes_as_large_as_the_budget(
    families: dict[str, Path],
) -> None:
    def scoring(**reference: Any) -> int:
        cfg = run_config(families["llama"]).model_copy(
            update={"reference": ReferenceConfig(source="separate_model", **reference)}
        )
        return part(estimate(cfg, 4096), "activations of a scoring pass")

    assert scoring(schedule="synced") == scoring(schedule="precomputed") > 0
    assert scoring(schedule="live") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's allocator")
def test_what_the_allocator_keeps_under_lora_is_said(families: dict[str, Path]) -> None:
    lora = run_config(families["llama"], adapter=AdapterConfig(kind="lora", target_linear=True))
    assert "twice these activations" in (estimate(lora, 1000).caveat or "")
    assert estimate(run_config(families["llama"]), 1000).caveat is None
    assert estimate(lora, 1000, gpu=True).caveat is None
    data = DataConfig(datasets=(DatasetConfig(path="x"),), sequence_len=10**5)
    longer = lora.model_copy(update={"data": data})
    assert estimate(longer, 10**5).caveat is None, "large arrays are given back"


def test_a_reference_on_the_cpu_does_not_count_on_the_device(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"])
    beside, on_cpu = (
        cfg.model_copy(update={"reference": ReferenceConfig(source="separate_model", device=device)})
        for device in (None, "cpu")
    )
    weights = part(estimate(cfg), "policy weights")
    assert estimate(beside, gpu=True).peak - estimate(on_cpu, gpu=True).peak == weights
    assert estimate(beside).peak == estimate(on_cpu).peak  # a run on the CPU has one memory


def test_quantized_weights_are_small(families: dict[str, Path]) -> None:
    # What they really take: tests/unit/model/test_quantisation.py.
    cfg = run_config(families["llama"], adapter=AdapterConfig(kind="qlora"))
    tensors = gather_facts(cfg).model.tensors
    layers = [fact for name, fact in tensors.items() if ".layers." in name and len(fact.shape) == 2]
    size, rows = sum(fact.size for fact in layers), sum(fact.shape[0] for fact in layers)
    full = part(estimate(cfg), "policy weights")
    for setting, saved in (
        ({"load_in_8bit": True}, 3 * size - 4 * rows),
        ({"load_in_4bit": True}, 3.484 * size),
    ):
        held = cfg.model_copy(update={"model": cfg.model.model_copy(update=setting)})
        assert full - part(estimate(held), "policy weights") == pytest.approx(saved, abs=1)


def test_the_auto_budget_fills_memory_between_its_bounds(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"])
    facts = gather_facts(cfg)
    needed = training_pass(cfg, facts, held_precision(cfg, gpu=False))
    for_800 = needed.fixed + 800 * needed.per_token
    assert auto_token_budget(round(for_800 / 0.8) + 1, facts, cfg, gpu=False) == 800
    assert auto_token_budget(0, facts, cfg, gpu=False) == 1
    for device, most in LARGEST_BUDGET.items():
        assert auto_token_budget(1 << 50, facts, cfg, gpu=device == "gpu") == most


def test_the_longest_group_has_the_completions_that_the_loss_compares() -> None:
    data = DataConfig(datasets=(DatasetConfig(path="x"),), sequence_len=100)
    model = ModelConfig(base_model="x")
    assert longest_group(RunConfig(model=model, method=DPOConfig(), data=data)) == 200
    assert longest_group(RunConfig(model=model, method=KTOConfig(), data=data)) == 100
    assert longest_group(RunConfig(model=model, method=TPOConfig(), data=data)) == 300


def test_gradients_take_over_what_one_pass_frees(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"])  # one group a step: one pass
    facts = gather_facts(cfg)
    whole = training_pass(cfg, facts, held_precision(cfg, gpu=False)).of(4096)
    one_pass = estimate(cfg, 4096)
    head = 4 * facts.model.sizes.vocab_size * facts.model.sizes.hidden
    assert part(one_pass, "gradients") + part(one_pass, "activations of a training") == whole + head
    two_groups = cfg.model_copy(update={"optimization": OptimizationConfig(micro_batch_size=2)})
    assert part(estimate(two_groups, 4096), "activations of a training") == whole
    few_tokens = estimate_memory(cfg, facts, plan_reference(cfg, facts), 8, gpu=False, longest=8)
    assert part(few_tokens, "activations of a training") == 0  # the gradients are the larger


def test_known_data_says_how_long_a_pass_is(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"]).model_copy(
        update={"optimization": OptimizationConfig(micro_batch_size=64)}
    )
    facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    allowed, known = (
        estimate_memory(cfg, facts, plan, 1024, gpu=False, longest=longest) for longest in (None, 200)
    )
    passes = training_pass(cfg, facts, held_precision(cfg, gpu=False))
    assert part(allowed, "activations of a training") == passes.of(4096)
    assert part(known, "activations of a training") == passes.of(1024)


def test_a_pass_holds_no_more_than_a_step(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"])
    assert part(estimate(cfg, 4096), "activations of a training") == part(
        estimate(cfg, 100_000), "activations of a training"
    )
    more = cfg.model_copy(update={"optimization": OptimizationConfig(micro_batch_size=8)})
    assert part(estimate(more, 100_000), "activations of a training") > part(
        estimate(cfg, 100_000), "activations of a training"
    )


def test_auto_precision_follows_the_device(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"], dtype="auto", autocast="auto")
    facts: Facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    cpu = estimate_memory(cfg, facts, plan, 100, gpu=False)
    gpu = estimate_memory(cfg, facts, plan, 100, gpu=True)
    assert part(cpu, "policy weights") == 2 * part(gpu, "policy weights")
