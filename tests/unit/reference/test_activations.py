"""The formula of activations against what autograd really stores."""

import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fiducial.config.methods import TDPO2Config
from fiducial.config.schema import AdapterConfig
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
from fiducial.reference.facts import gather_facts
from fiducial.reference.precision import held_precision
from fiducial.reference.sources import SeparateModel
from sized import FAMILY, SIZES, TOKENS, run_config
from tiny import random_groups, save_checkpoint, tiny_model


def stored_per_token(model: torch.nn.Module, *, autocast: bool = False) -> float:
    """Bytes of every tensor autograd saves, weights left out, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    stored: dict[int, int] = {}
    kept = []

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cast_weight = tensor.dim() == 2 and bool({tuple(tensor.shape), tuple(tensor.T.shape)} & shapes)
        if storage.data_ptr() not in weights and not cast_weight:
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
def test_the_activation_formula_is_what_autograd_stores(family: str, families: dict[str, Path]) -> None:
    cfg = run_config(families[family])
    expected = stored_per_token(tiny_model(family, **SIZES, **FAMILY[family]))
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


def test_the_formula_holds_under_autocast(families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"], autocast="bfloat16")
    expected = stored_per_token(tiny_model("llama", **SIZES, **FAMILY["llama"]), autocast=True)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_the_formula_holds_for_lora(targets: Any, families: dict[str, Path]) -> None:
    cfg = run_config(families["llama"], adapter=AdapterConfig(kind="lora", target_modules=targets))
    names = targets if isinstance(targets, str) else list(targets)
    policy = get_peft_model(
        tiny_model("llama", **SIZES, **FAMILY["llama"]),
        LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM"),
    )
    policy.enable_input_require_grads()
    expected = stored_per_token(policy.base_model.model)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(expected, rel=0.1)


def test_the_formula_holds_with_gradient_checkpointing(families: dict[str, Path]) -> None:
    model = tiny_model("llama", **SIZES, **FAMILY["llama"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers >= 5.20 has another name for it
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cfg = run_config(families["llama"], gradient_checkpointing=True)
    formula = stored_bytes_per_token(cfg, gather_facts(cfg), held_precision(cfg, gpu=False))
    assert formula == pytest.approx(stored_per_token(model.train()), rel=0.1)


def test_layers_below_what_trains_keep_nothing(families: dict[str, Path]) -> None:
    patterns = (r"model\.layers\.1\.",)
    model = tiny_model("llama", **SIZES, **FAMILY["llama"])
    unfreeze(model, patterns, torch.float32)
    cfg = run_config(families["llama"], unfrozen_parameters=patterns)
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
    adapter: AdapterConfig | None, families: dict[str, Path]
) -> None:
    tokens, measured = peak(tiny_policy(adapter), random_groups(20, longest=60))
    cfg = run_config(families["llama"], adapter=adapter)
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


def test_the_heads_numbers_are_the_heads() -> None:
    assert {"cpu": HEAD_KEPT_BYTES["cpu"], "cuda": HEAD_KEPT_BYTES["gpu"]} == head.KEPT_BYTES
    assert head._SMALLEST_CHUNK == HEAD_SMALLEST_CHUNK
    assert {"cpu": HEAD_CHUNK_LOGITS["cpu"], "cuda": HEAD_CHUNK_LOGITS["gpu"]} == head._CHUNK_ELEMENTS
