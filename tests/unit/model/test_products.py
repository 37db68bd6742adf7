"""oneDNN's products are torch's, in value and gradient, and are used where they are meant to be."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fiducial import compat
from fiducial.model import products
from fiducial.model.scoring import Scorer
from tiny import random_groups, tiny_model

pytestmark = pytest.mark.skipif(not compat.has_onednn_product(), reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every product goes to oneDNN, on any processor and of any size; the shapes it was given."""
    seen: list[tuple[int, ...]] = []
    original = compat.onednn_product

    def spy(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*left.shape, len(right)))
        return original(left, right, bias)

    monkeypatch.setattr(products, "torch_is_slow", lambda: True)
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    monkeypatch.setattr(compat, "onednn_product", spy)
    return seen


def strided(*shape: int) -> Tensor:
    """A matrix with gaps between its rows, as one attention head has in a row of all heads."""
    return torch.randn(*shape[:-1], 3 * shape[-1])[..., : shape[-1]]


LAYOUTS = {
    "rows": torch.randn,
    "columns": lambda m, n: torch.randn(n, m).t(),
    "gaps": strided,
    "columns with gaps": lambda m, n: strided(n, m).t(),
    "one number": lambda m, n: torch.randn(1, 1).expand(m, n),
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_product_in_every_layout(calls: list[tuple[int, ...]], left: str, right: str) -> None:
    a, b = LAYOUTS[left](33, 20), LAYOUTS[right](20, 47)
    expected = a.double() @ b.double()
    torch.testing.assert_close(products.product(a, b).double(), expected, rtol=1e-5, atol=1e-5)
    total, out = torch.ones(33, 47), torch.empty(33, 47)
    products.add_product(total, a, b)
    products.write_product(out, a, b)
    torch.testing.assert_close(total.double(), expected + 1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert calls == [(33, 20, 47)] * 3


def test_onednn_never_sees_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are where it is a thousand times slower."""
    for layout in LAYOUTS.values():
        dense = compat._dense(layout(7, 5))
        assert dense.is_contiguous() or dense.t().is_contiguous()
    assert not strided(7, 5).is_contiguous(), "the layouts have no gaps to begin with"


def test_memory_does_not_grow_with_every_new_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for each number of rows that ever was would fill a machine in a day."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", bounds := {})
        compat.bound_onednn_caches()
    script = f"""
import os, psutil, torch  # nothing of ours, which takes seconds to import
os.environ.update({bounds})
weight = torch.randn(128, 128)
def grown(start):
    before = psutil.Process().memory_info().rss
    for rows in range(start, start + 200):
        torch.ops.mkldnn._linear_pointwise(torch.ones(rows, 128), weight, None, "none", [], "")
    return (psutil.Process().memory_info().rss - before) / 2**20
grown(300)
print(grown(500))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 25


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9, 16), (2, 9, 16), (1, 1, 16), (16,)])
def test_linear_layers_in_value_and_gradient(
    calls: list[tuple[int, ...]], bias: bool, shape: tuple[int, ...]
) -> None:
    layer, inputs = nn.Linear(16, 24, bias=bias), torch.randn(shape)

    def run(layer: nn.Module, inputs: Tensor) -> list[Tensor]:
        inputs = inputs.clone().requires_grad_()
        out = layer(inputs)
        return [out, *torch.autograd.grad(out.square().sum(), [inputs, *layer.parameters()])]

    with products.fast_products("cpu"):
        fast = run(layer, inputs)
    assert len(calls) == 3, "forward, gradient of the inputs, gradient of the weight"
    exact = run(layer.double(), inputs.double())
    for one, other in zip(fast, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert len(calls) == 3, "outside, torch multiplies"


def test_a_gradient_is_made_only_where_it_is_wanted(calls: list[tuple[int, ...]]) -> None:
    frozen, inputs = nn.Linear(16, 24).requires_grad_(False), torch.randn(5, 16, requires_grad=True)
    kept: list[Tensor] = []
    with (
        products.fast_products("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        frozen(inputs).sum().backward()
    assert [tuple(each.shape) for each in kept] == [(24, 16)], "a frozen layer keeps no activations"
    assert len(calls) == 2


@pytest.mark.parametrize("given", ["float64", "bfloat16", "autocast", "disabled", "too small", "subclass"])
def test_what_stays_with_torch(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    layer, inputs = nn.Linear(16, 24), torch.randn(5, 16)
    if given in ("float64", "bfloat16"):
        layer, inputs = layer.to(getattr(torch, given)), inputs.to(getattr(torch, given))
    if given == "too small":
        monkeypatch.setattr(products, "_LEAST_WORK", 5 * 16 * 24 + 1)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", given != "disabled")
    if given == "subclass":
        inputs = inputs.as_subclass(type("Sharded", (Tensor,), {}))
    with (
        products.fast_products("cpu"),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=given == "autocast"),
    ):
        layer(inputs)
    assert calls == []


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(("device", "watched"), [("cpu", True), ("cuda", False)])
def test_only_a_cpus_calls_are_looked_at(device: str, watched: bool) -> None:
    assert isinstance(products.fast_products(device), products._FastLinear) == watched


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_recomputed_stay_with_torch(
    calls: list[tuple[int, ...]], checkpointing: bool
) -> None:
    """Their backward pass runs them again outside the Scorer, and must keep the same tensors there."""
    model, groups = tiny_model().train(), random_groups(2)
    if checkpointing:
        compat.enable_gradient_checkpointing(model, {"use_reentrant": False})
    scorer = Scorer(model, layout="packed")
    with torch.no_grad():
        scorer(scorer.pack(groups))
    calls.clear()
    scorer(scorer.pack(groups)).values.sum().backward()
    linear = [shape for shape in calls if shape[-1] == model.config.intermediate_size]
    assert bool(linear) != checkpointing


def test_a_whole_model(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed scoring multiplies this way in linear layers and head, and for their gradients."""
    model = tiny_model()
    scorer, groups = Scorer(model, layout="packed"), random_groups(2)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        scorer(scorer.pack(groups)).values.sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    fast = gradients()
    layers = sum(isinstance(module, nn.Linear) for module in model.modules()) - 1
    assert len(calls) > 3 * layers, "the head counts too"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    exact = gradients()
    for one, other in zip(fast, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_hands_over_its_sums_unrounded(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        there = torch.empty(3, 3, dtype=dtype, device="cuda")
        assert products.unrounded_product(there, there).dtype == torch.float32
        assert products.unrounded_product(there.double(), there.double()).dtype == torch.float64
    here = torch.ones(3, 3, dtype=dtype)
    assert products.unrounded_product(here, here).dtype == dtype
