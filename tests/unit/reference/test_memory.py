"""The estimate against what autograd really stores, and the arithmetic of the other parts."""

import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from fiducial.config.methods import DPOConfig, KTOConfig, TDPO2Config, TPOConfig
from fiducial.config.schema import (
    AdapterConfig,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizationConfig,
    ReferenceConfig,
    RunConfig,
)
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import KL
from fiducial.model import head
from fiducial.model.loader import unfreeze
from fiducial.model.scoring import Scorer
from fiducial.reference.activations import (
    HEAD_CHUNK_LOGITS,
    HEAD_KEPT_BYTES,
    HEAD_SMALLEST_CHUNK,
    stored_bytes_per_token,
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
from fiducial.reference.sources import SeparateModel
from fiducial.reference.trained import USUAL_TARGETS, count_trained
from tiny import random_groups, save_checkpoint, tiny_model

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 4},
    "qwen3": {"num_key_value_heads": 4, "head_dim": 32},
    "phi3": {"num_key_value_heads": 4},
    "olmo2": {"num_key_value_heads": 4},
    "gpt_neox": {},
}
TOKENS = 512


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(root / name, name, **SIZES, **extra) for name, extra in FAMILY.items()}


def run_config(path: Path, *, adapter: AdapterConfig | None = None, **model: Any) -> RunConfig:
    model_config = ModelConfig(base_model=str(path), **({"autocast": None} | model))
    return RunConfig(model=model_config, adapter=adapter, method=DPOConfig())


def estimate(cfg: RunConfig, budget: int = 1000, *, gpu: bool = False) -> MemoryEstimate:
    facts = gather_facts(cfg)
    return estimate_memory(cfg, facts, plan_reference(cfg, facts), budget, gpu=gpu)


def part(memory: MemoryEstimate, name: str) -> int:
    return sum(item.bytes for item in memory.parts if item.name.startswith(name))


def stored_per_token(model: torch.nn.Module, *, autocast: bool = False) -> float:
    """Bytes of every tensor autograd saves, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    stored: dict[int, int] = {}
    kept = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast_weight = tuple(tensor.shape) in shapes or tuple(tensor.mT.shape) in shapes
        if storage.data_ptr() not in weights and not (tensor.dim() == 2 and cast_weight):
            stored[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # alive, so that no address is used twice
        return tensor

    ids = torch.randint(0, 256, (1, TOKENS))
    backbone = model.get_decoder() if hasattr(model, "get_decoder") else model
    with (
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        backbone(input_ids=ids, use_cache=False)
    return sum(stored.values()) / TOKENS


@pytest.mark.parametrize("family", FAMILY)
def test_the_activation_formula_is_what_autograd_stores(family: str, checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints[family])
    expected = stored_per_token(tiny_model(family, **SIZES, **FAMILY[family]))
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


def test_the_formula_holds_under_autocast(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"], autocast="bfloat16")
    expected = stored_per_token(tiny_model("llama", **SIZES, **FAMILY["llama"]), autocast=True)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_the_formula_holds_for_lora(targets: Any, checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"], adapter=AdapterConfig(kind="lora", target_modules=targets))
    names = targets if isinstance(targets, str) else list(targets)
    policy = get_peft_model(
        tiny_model("llama", **SIZES, **FAMILY["llama"]),
        LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM"),
    )
    policy.enable_input_require_grads()
    expected = stored_per_token(policy.base_model.model)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


def test_the_formula_holds_with_gradient_checkpointing(checkpoints: dict[str, Path]) -> None:
    model = tiny_model("llama", **SIZES, **FAMILY["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers >= 5.20 has another name for it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cfg = run_config(checkpoints["llama"], gradient_checkpointing=True)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(stored_per_token(model.train()), rel=0.1)


def test_layers_below_what_trains_keep_nothing(checkpoints: dict[str, Path]) -> None:
    patterns = (r"model\.layers\.1\.",)
    model = tiny_model("llama", **SIZES, **FAMILY["llama"])
    unfreeze(model, patterns, torch.float32)
    cfg = run_config(checkpoints["llama"], unfrozen_parameters=patterns)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    # The lowest trained layer keeps less of its inputs than the others, and here it is the only one.
    assert stored_per_token(model) <= formula <= 1.4 * stored_per_token(model)


def peak(policy: Any, groups: list[TokenizedGroup], against: SeparateModel | None = None) -> tuple[int, int]:
    """Tokens, and most bytes at once of a forward and backward pass."""
    scorer = Scorer(policy, layout="packed")
    batch = scorer.pack(groups)

    def forward_and_backward() -> None:
        if against is None:
            scorer(batch).values.sum().backward()
            return
        scored = scorer(batch, (), against.distribution(batch)[1])
        (scored.values.sum() + scored.statistics[KL].sum()).backward()

    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    forward_and_backward()  # what is measured once at the start
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        forward_and_backward()
    events = profile.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return batch.input_ids.numel(), max(accumulate(changes))


BOTH = pytest.mark.parametrize(
    "adapter", [None, AdapterConfig(kind="lora", target_linear=True)], ids=["full", "lora"]
)


def tiny_policy(adapter: AdapterConfig | None, **overrides: Any) -> Any:
    policy = tiny_model("llama", **SIZES, **FAMILY["llama"], **overrides)
    if adapter is None:
        return policy
    return get_peft_model(policy, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


@pytest.mark.slow
@BOTH
def test_a_pass_peaks_where_the_formula_says(
    adapter: AdapterConfig | None, checkpoints: dict[str, Path]
) -> None:
    tokens, measured = peak(tiny_policy(adapter), random_groups(20, longest=60))
    cfg = run_config(checkpoints["llama"], adapter=adapter)
    formula = training_pass(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula.of(tokens) == pytest.approx(measured, rel=0.3)


@pytest.mark.slow
@BOTH
def test_a_second_head_beside_it_takes_what_the_formula_says(
    adapter: AdapterConfig | None, tmp_path: Path
) -> None:
    vocabulary = {"vocab_size": 8192}
    policy, groups = tiny_policy(adapter, **vocabulary), random_groups(10, longest=60)
    second = Scorer(tiny_model("llama", seed=1, **SIZES, **FAMILY["llama"], **vocabulary), layout="packed")
    checkpoint = save_checkpoint(tmp_path / "wide", "llama", **SIZES, **FAMILY["llama"], **vocabulary)
    cfg = run_config(checkpoint, adapter=adapter)
    facts, precision = gather_facts(cfg), held_precision(cfg, gpu=False)
    tokens, alone = peak(policy, groups)
    _, beside = peak(policy, groups, SeparateModel(second))

    comparing = cfg.model_copy(update={"method": TDPO2Config()})
    one, two = (training_pass(each, facts, precision).of(tokens) for each in (cfg, comparing))

    assert two == pytest.approx(beside, rel=0.3)
    assert beside - alone < two - one < 3 * (beside - alone)


def test_full_fine_tuning_holds_weights_gradients_and_two_moments(checkpoints: dict[str, Path]) -> None:
    weights = sum(
        parameter.numel() for parameter in tiny_model("llama", **SIZES, **FAMILY["llama"]).parameters()
    )
    memory = estimate(run_config(checkpoints["llama"]))
    assert part(memory, "policy weights") == 4 * weights
    assert part(memory, "gradients") == 4 * weights
    assert part(memory, "optimizer state") == 8 * weights
    assert part(memory, "reference") == 0
    assert part(memory, "autocast copies") == 0


def test_autocast_keeps_a_copy_of_the_weights(checkpoints: dict[str, Path]) -> None:
    memory = estimate(run_config(checkpoints["llama"], autocast="bfloat16"))
    assert part(memory, "autocast copies") * 2 == part(memory, "policy weights")


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("adafactor", 0), ("lion_32bit", 4)],
)
def test_optimizer_state(optimizer: str, bytes_per_weight: int, checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"]).model_copy(
        update={"optimization": OptimizationConfig(optimizer=optimizer)}
    )
    trained = count_trained(cfg, gather_facts(cfg)).total
    assert part(estimate(cfg), "optimizer state") == bytes_per_weight * trained


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ("q_proj", "down_proj")},
        {"target_linear": True},
        {"use_dora": True, "r": 4},
        {"modules_to_save": ("lm_head",)},
        {"rank_pattern": {"v_proj": 2}},
        {"layers_to_transform": (1,)},
        {"trainable_token_indices": (1, 2, 3)},
    ],
)
def test_trained_weights_are_those_peft_trains(options: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    adapter = AdapterConfig(kind="lora", **options)
    cfg = run_config(checkpoints["llama"], adapter=adapter)
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    targets = {"target_modules": "all-linear"} if given.pop("target_linear", False) else {}
    policy = get_peft_model(
        tiny_model("llama", **SIZES, **FAMILY["llama"]), LoraConfig(task_type="CAUSAL_LM", **given, **targets)
    )
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert count_trained(cfg, gather_facts(cfg)).total == trained


def test_the_bias_setting_counts_the_biases_it_trains(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["gpt_neox"], adapter=AdapterConfig(kind="lora", bias="all"))
    policy = get_peft_model(
        tiny_model("gpt_neox", **SIZES, **FAMILY["gpt_neox"]), LoraConfig(task_type="CAUSAL_LM", bias="all")
    )
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    assert count_trained(cfg, gather_facts(cfg)).total == trained


def test_unfrozen_parameters_are_counted_by_name(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"], unfrozen_parameters=(r"model\.norm",))
    assert count_trained(cfg, gather_facts(cfg)).total == SIZES["hidden_size"]


def test_the_usual_targets_are_pefts() -> None:
    theirs = {name: TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[name] for name in USUAL_TARGETS}
    assert {name: list(targets) for name, targets in USUAL_TARGETS.items()} == theirs


@pytest.mark.parametrize(("schedule", "when"), [("live", "throughout"), ("precomputed", "scoring")])
def test_a_second_model_is_held_as_long_as_it_is_asked(
    schedule: Any, when: str, checkpoints: dict[str, Path]
) -> None:
    reference = ReferenceConfig(source="separate_model", schedule=schedule, dtype="bfloat16")
    memory = estimate(run_config(checkpoints["llama"]).model_copy(update={"reference": reference}))
    found = [item for item in memory.parts if item.name == "reference model"]
    assert [(item.when, item.bytes) for item in found] == [(when, part(memory, "policy weights") // 2)]
    assert memory.peak == max(memory.at("training"), memory.at("scoring"))


def test_a_reference_on_the_cpu_does_not_count_on_the_device(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"])
    beside, on_cpu = (
        cfg.model_copy(update={"reference": ReferenceConfig(source="separate_model", device=device)})
        for device in (None, "cpu")
    )
    weights = part(estimate(cfg), "policy weights")
    assert estimate(beside, gpu=True).peak - estimate(on_cpu, gpu=True).peak == weights
    assert estimate(beside).peak == estimate(on_cpu).peak  # a run on the CPU has one memory


def test_quantized_weights_are_small(checkpoints: dict[str, Path]) -> None:
    # What they really take: tests/unit/model/test_quantisation.py.
    cfg = run_config(checkpoints["llama"], adapter=AdapterConfig(kind="qlora"))
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


def test_the_auto_budget_fills_memory_between_its_bounds(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"])
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


def test_gradients_take_over_what_one_pass_frees(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"])  # one group a step: one pass
    facts = gather_facts(cfg)
    whole = training_pass(cfg, facts, held_precision(cfg, gpu=False)).of(4096)
    one_pass = estimate(cfg, 4096)
    head = 4 * facts.model.sizes.vocab_size * facts.model.sizes.hidden
    assert part(one_pass, "gradients") + part(one_pass, "activations of a training") == whole + head
    two_groups = cfg.model_copy(update={"optimization": OptimizationConfig(micro_batch_size=2)})
    assert part(estimate(two_groups, 4096), "activations of a training") == whole
    few_tokens = estimate_memory(cfg, facts, plan_reference(cfg, facts), 8, gpu=False, longest=8)
    assert part(few_tokens, "activations of a training") == 0  # the gradients are the larger


def test_known_data_says_how_long_a_pass_is(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"]).model_copy(
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


def test_a_pass_holds_no_more_than_a_step(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"])
    assert part(estimate(cfg, 4096), "activations of a training") == part(
        estimate(cfg, 100_000), "activations of a training"
    )
    more = cfg.model_copy(update={"optimization": OptimizationConfig(micro_batch_size=8)})
    assert part(estimate(more, 100_000), "activations of a training") > part(
        estimate(cfg, 100_000), "activations of a training"
    )


def test_auto_precision_follows_the_device(checkpoints: dict[str, Path]) -> None:
    cfg = run_config(checkpoints["llama"], dtype="auto", autocast="auto")
    facts: Facts = gather_facts(cfg)
    plan = plan_reference(cfg, facts)
    cpu = estimate_memory(cfg, facts, plan, 100, gpu=False)
    gpu = estimate_memory(cfg, facts, plan, 100, gpu=True)
    assert part(cpu, "policy weights") == 2 * part(gpu, "policy weights")


def test_the_heads_numbers_are_the_heads() -> None:
    assert head.KEPT_BYTES == HEAD_KEPT_BYTES
    assert head._SMALLEST_CHUNK == HEAD_SMALLEST_CHUNK
    assert {"cpu": HEAD_CHUNK_LOGITS["cpu"], "cuda": HEAD_CHUNK_LOGITS["gpu"]} == head._CHUNK_ELEMENTS
