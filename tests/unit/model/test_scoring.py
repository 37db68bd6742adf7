"""A Scorer against the stock model on each sequence alone: every family, layout, wrapper and precision."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from fiducial.compat import enable_gradient_checkpointing
from fiducial.data.batch import Layout, Segment
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.model import attention_plan, head
from fiducial.model.attention import PACKED
from fiducial.model.attention_plan import Visibility
from fiducial.model.logit_rule import LogitRule
from fiducial.model.scoring import Scorer
from oracles import naive_token_logps
from tiny import FAMILIES, random_groups, tiny_model

_GROUPED = {"num_key_value_heads": 2}
SPECIAL: dict[str, dict[str, Any]] = {
    # sinks, and attention that transformers has no fused kernel for
    "gpt_oss": _GROUPED
    | {"head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    # attention in chunks
    "llama4_text": _GROUPED
    | {
        "head_dim": 8,
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    # layers that drop keyword arguments
    "stablelm": _GROUPED,
    # values of another size than keys
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    # masks cut to some queries; keys and values of other layers; an embedding of its own for each layer
    "gemma4_text": _GROUPED
    | {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 8,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 8,
    },
    # logits divided; logits multiplied; a head with bias
    "granite": _GROUPED | {"logits_scaling": 3.0},
    "cohere": _GROUPED | {"logit_scale": 0.5},
    "phi": {},
}
CASES = [*((family, {}) for family in FAMILIES), *SPECIAL.items()]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


def _gradients(values: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, len(values))
    total = (values * weights).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return [values.detach(), *gradients]


def _trained(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _ours(model: PreTrainedModel, groups: list[TokenizedGroup], **scorer: Any) -> list[Tensor]:
    scorer_ = Scorer(model, **({"layout": "packed"} | scorer))
    return _gradients(scorer_(scorer_.pack(groups)).values, _trained(model))


def _naive(model: PreTrainedModel, groups: list[TokenizedGroup]) -> list[Tensor]:
    return _gradients(naive_token_logps(model, groups), _trained(model))


def _assert_equal(ours: list[Tensor], naive: list[Tensor], tolerance: float = 1e-5) -> None:
    assert (ours[0] - naive[0]).abs().max() <= tolerance
    largest = max(gradient.abs().max() for gradient in naive[1:])
    for left, right in zip(ours[1:], naive[1:], strict=True):
        assert (left - right).abs().max() <= tolerance * largest


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("family", "config"), CASES, ids=[family for family, _ in CASES])
def test_equals_each_sequence_alone(family: str, config: dict[str, Any], layout: Layout) -> None:
    model = tiny_model(family, **config)
    stock = model.config._attn_implementation
    groups = random_groups(3, seed=1)
    naive = _naive(model, groups)
    _assert_equal(_ours(model, groups, layout=layout), naive)
    assert model.config._attn_implementation == stock
    assert all(gradient.any() for gradient in naive[1:2])


@pytest.mark.parametrize("completions", [1, 2, 3])
def test_any_number_of_completions(completions: int) -> None:
    model, groups = tiny_model(), random_groups(3, seed=2, completions=completions)
    _assert_equal(_ours(model, groups), _naive(model, groups))


def _leak(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Every later completion sees the earlier ones too."""
    return tuple(
        replace(segment, prefix_stop=segment.start) if segment.prefix_stop > segment.prefix_start else segment
        for segment in segments
    )


def test_a_leak_between_completions_would_show() -> None:
    model, groups = tiny_model(), random_groups(3, seed=1)
    scorer = Scorer(model, layout="packed")
    batch = scorer.pack(groups)
    assert batch.segments is not None
    leaking = scorer(replace(batch, segments=_leak(batch.segments))).values
    assert (leaking - naive_token_logps(model, groups)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_an_ignored_window_would_show(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = tiny_model(family), random_groups(3, seed=1)
    monkeypatch.setattr(attention_plan, "_interpret", lambda *_: Visibility())
    assert (_ours(model, groups)[0] - naive_token_logps(model, groups)).abs().max() > 0.1


def test_nothing_to_score_still_reaches_every_parameter() -> None:
    model = tiny_model()
    values, *gradients = _ours(model, [])
    assert values.shape == (0,)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["body", "adapter on the head", "trained copy of the head"],
)
def test_adapters(options: dict[str, Any], layout: Layout) -> None:
    model: Any = get_peft_model(tiny_model(), LoraConfig(**(LORA | options)))
    groups = random_groups(3, seed=1)
    naive = _naive(model, groups)
    scorer = Scorer(model, layout=layout)
    _assert_equal(_gradients(scorer(scorer.pack(groups)).values, _trained(model)), naive)
    with model.disable_adapter(), torch.no_grad():
        off = scorer(scorer.pack(groups)).values
    base = naive_token_logps(tiny_model(), groups)
    assert (off - base).abs().max() <= 1e-5
    assert (off - naive[0]).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_see_the_same_segments(family: str, reentrant: bool) -> None:
    model, groups = tiny_model(family), random_groups(3, seed=1)
    kept = _ours(model, groups)
    model.train()
    enable_gradient_checkpointing(model, {"use_reentrant": reentrant})
    model.enable_input_require_grads()
    scorer = Scorer(model, layout="packed")
    values = scorer(scorer.pack(groups)).values
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    gradients = [parameter.grad for parameter in _trained(model)]
    assert torch.equal(values, kept[0])
    assert all(torch.equal(left, right) for left, right in zip(gradients, kept[1:], strict=True))
    assert model.config._attn_implementation == PACKED
    scorer.restore_attention()
    assert model.config._attn_implementation != PACKED


def test_a_pass_without_gradient_leaves_what_another_awaits_in_backward() -> None:
    model, groups = tiny_model(), random_groups(3, seed=1)
    kept = _ours(model, groups)
    enable_gradient_checkpointing(model.train(), {"use_reentrant": False})
    scorer = Scorer(model, layout="packed")
    values = scorer(scorer.pack(groups)).values
    with torch.no_grad():
        scorer(scorer.pack(groups))
    (values * torch.linspace(-1, 1, len(values))).sum().backward()
    gradients = [parameter.grad for parameter in _trained(model)]
    assert all(torch.equal(left, right) for left, right in zip(gradients, kept[1:], strict=True))


def test_layers_below_what_trains_are_not_run_again() -> None:
    model = tiny_model(num_hidden_layers=3)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    counted = []
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, at=number: counted.append(at))
    enable_gradient_checkpointing(model.train(), {"use_reentrant": False})
    scorer = Scorer(model, layout="padded")
    scorer(scorer.pack(random_groups(1)))  # measures the head
    counted.clear()
    scorer(scorer.pack(random_groups(1))).values.sum().backward()
    assert sorted(counted) == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_errs_no_more_than_the_stock_model(family: str) -> None:
    model, groups = tiny_model(family), random_groups(6, seed=1)
    exact = _naive(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        stock = _naive(model, groups)
    ours = _ours(model, groups, autocast=torch.bfloat16)
    assert ours[0].dtype == torch.float32
    for left, rounded, right in zip(ours[:1], stock[:1], exact[:1], strict=True):
        assert (left - right).abs().mean() <= 1.25 * (rounded - right).abs().mean()
    error = [_flat_error(gradients[1:], exact[1:]) for gradients in (ours, stock)]
    assert error[0] <= 1.25 * error[1]
    assert (ours[0] - exact[0]).abs().mean() > 1e-4  # it did run in bfloat16


def _flat_error(gradients: list[Tensor], exact: list[Tensor]) -> Tensor:
    flat, right = (torch.cat([part.flatten() for part in parts]) for parts in (gradients, exact))
    return (flat - right).norm()


@pytest.mark.parametrize(
    ("family", "config", "rule"),
    [
        ("llama", {}, LogitRule()),
        ("gemma2", {}, LogitRule(softcap=30.0)),
        ("granite", SPECIAL["granite"], LogitRule(scale=1 / 3.0)),
        ("cohere", SPECIAL["cohere"], LogitRule(scale=0.5)),
    ],
)
def test_the_head_rule_is_measured(family: str, config: dict[str, Any], rule: LogitRule) -> None:
    scorer = Scorer(tiny_model(family, **config), layout="packed")
    scorer(scorer.pack(random_groups(1)))
    assert scorer._rule == rule


def test_a_head_that_is_no_plain_layer_is_left_to_the_model() -> None:
    model = tiny_model()
    plain = type(model.lm_head)

    class Doubled(plain):  # type: ignore[misc, valid-type]  # the class is only known at run time
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    model.lm_head.__class__ = Doubled
    groups = random_groups(3, seed=1)
    scorer = Scorer(model, layout="packed")
    assert (scorer(scorer.pack(groups)).values - naive_token_logps(model, groups)).abs().max() <= 1e-5
    assert scorer._rule is None


class _Wrapper(nn.Module):
    """Stands for DDP: acts on calls of the whole model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.module(**inputs)


def test_everything_runs_inside_the_wrappers_call() -> None:
    model, groups = tiny_model(), random_groups(2)
    scorer = Scorer(model, layout="packed")
    wrapper = scorer.module = _Wrapper(model)
    outside: list[str] = []
    inside = False

    def watch(name: str) -> Callable[..., None]:
        return lambda *_: None if inside else outside.append(name)

    def enter(*_: object) -> None:
        nonlocal inside
        inside = not inside

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(enter)
    model.model.register_forward_pre_hook(watch("body"))
    model.lm_head.register_forward_pre_hook(watch("head"))
    scorer(scorer.pack(groups))
    assert wrapper.calls == 2  # the head is measured once
    assert outside == []


def test_an_instances_own_forward_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    own = model.forward = partial(model.forward)
    scorer = Scorer(model, layout="packed")
    scorer(scorer.pack(random_groups(1)))
    assert model.forward is own
    monkeypatch.setattr(model.model, "forward", _fail)
    with pytest.raises(ZeroDivisionError):
        scorer(scorer.pack(random_groups(1)))
    assert model.forward is own
    assert model.config._attn_implementation != PACKED


def _fail(**_: Any) -> None:
    raise ZeroDivisionError


def test_attention_dropout_is_refused_with_its_name() -> None:
    model = tiny_model(attention_dropout=0.25).train()
    scorer = Scorer(model, layout="packed")
    with pytest.raises(ModelError, match=r"dropout 0\.25"):
        scorer(scorer.pack(random_groups(1)))


class _Sizes(TorchDispatchMode):
    """Shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.shapes.add(tuple(value.shape))
        return out

    def quadratic(self, tokens: int) -> bool:
        return any(sum(size >= tokens for size in shape) >= 2 for shape in self.shapes)

    def whole_vocabulary(self, scored: int, vocab: int) -> bool:
        return any(vocab in shape and scored in shape for shape in self.shapes)


@pytest.mark.parametrize("frozen", [False, True])
def test_nothing_quadratic_and_no_whole_logits(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_SMALLEST_CHUNK", 64)
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 64, "cuda": 64})
    model = tiny_model("qwen2", vocab_size=700)
    model.lm_head.weight.requires_grad_(not frozen)
    scorer = Scorer(model, layout="packed")
    batch = scorer.pack(random_groups(14, seed=5))
    tokens, scored = batch.input_ids.shape[1], len(batch.source)
    scorer(batch)
    with _Sizes() as sizes:
        scorer(batch).values.sum().backward()
    assert not sizes.quadratic(tokens)
    assert not sizes.whole_vocabulary(scored, 700)
    scorer._rule = None
    with _Sizes() as naive:
        scorer(batch).values.sum().backward()
    assert naive.whole_vocabulary(scored, 700)
    with _Sizes() as stock:
        model(batch.input_ids, position_ids=batch.position_ids)
    assert stock.quadratic(tokens)


def test_kernels_for_new_shapes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"LRU_CACHE_CAPACITY": "7"})
    Scorer(tiny_model("llama"), layout="packed")
    assert os.environ == {"LRU_CACHE_CAPACITY": "7", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


def test_weights_may_be_elsewhere_between_calls() -> None:
    """As FSDP2 offloads them: they are where the model computes only while it is called."""
    groups = random_groups(3)
    expected = Scorer(tiny_model(), layout="packed")
    scorer = Scorer(model := tiny_model(), layout="packed")
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]

    def put(where: str) -> None:
        for module, name, parameter in held:
            setattr(module, name, nn.Parameter(parameter.detach().to(where)))

    model.register_forward_pre_hook(lambda *_: put("cpu"))
    model.register_forward_hook(lambda *_: put("meta"))
    put("meta")
    values = scorer(scorer.pack(groups)).values
    assert model.device.type == "meta"
    assert torch.equal(values, expected(expected.pack(groups)).values)
