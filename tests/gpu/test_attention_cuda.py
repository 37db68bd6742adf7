"""Packed attention on a GPU: variable-length kernels against plain matrix products."""

import pytest
import torch
from torch import Tensor

from fiducial.data.batch import pack
from fiducial.model.attention_blocks import ScoreRule, block_attention
from fiducial.model.attention_plan import Visibility, plan_attention
from fiducial.model.attention_varlen import can_run, variable_length_attention
from fiducial.model.head import token_logps
from fiducial.model.scoring import Scorer
from oracles import naive_token_logps
from tiny import random_groups, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _inputs(length: int, dtype: torch.dtype, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, length, 64), (kv_heads, length, 64), (kv_heads, length, 64)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]


def _gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_variable_length_kernel_equals_blocks(window: int | None, kv_heads: int) -> None:
    segments = pack(random_groups(4, longest=400, completions=3), layout="packed").segments
    assert segments is not None
    plan = plan_attention(segments, torch.device("cuda"))
    rule = ScoreRule(0.125, Visibility(window))
    half = _inputs(segments[-1].stop, torch.bfloat16, kv_heads)
    assert plan.variable_length is not None
    assert can_run(half[0], half[2], rule, None)
    ours = _gradients(variable_length_attention(*half, plan.variable_length, rule), half)
    wide = [tensor.detach().float().requires_grad_() for tensor in half]
    exact = _gradients(block_attention(*wide, plan, rule), wide)
    for left, right in zip(ours, exact, strict=True):
        assert (left.float() - right).norm() <= 8e-3 * right.norm()
    unseen = _gradients(block_attention(*wide, plan, ScoreRule(0.125, Visibility(3))), wide)
    assert (ours[0].float() - unseen[0]).norm() > 0.1 * unseen[0].norm()


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_float32_scores_equal_each_sequence_alone(family: str) -> None:
    groups = random_groups(3, seed=1)
    naive = naive_token_logps(tiny_model(family), groups)
    scorer = Scorer(tiny_model(family).cuda(), layout="packed")
    values = scorer(scorer.pack(groups)).values
    assert (values.cpu() - naive).abs().max() <= 1e-4
    values.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_head_sums_in_float32(frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).cuda()
    weight = (torch.randn(5000, 64, generator=generator) / 8).cuda()
    targets = torch.randint(5000, (300,), generator=generator).cuda()

    def run(dtype: torch.dtype) -> list[Tensor]:
        inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(not frozen)]
        logps = token_logps(*inputs, targets, chunk=1024)
        return [logps, *torch.autograd.grad(logps.sum(), inputs[: 1 if frozen else 2])]

    for left, right in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (left.double() - right).norm() <= 1e-2 * right.norm()
