"""A pass is launched as a whole: nothing on its way asks for a number or a size that only a GPU knows.

Fake tensors have neither, and raise where one is asked for.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fiducial.config.methods import DPOConfig, MethodConfig, MixtureConfig, ORPOConfig, SFTConfig
from fiducial.data.batch import pack
from fiducial.data.tokenize import TokenizedGroup
from fiducial.losses import LOSSES, build_loss
from fiducial.model.attention_plan import plan_attention
from fiducial.model.logit_rule import LogitRule
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import NoReference
from fiducial.training.metrics import MetricSums
from fiducial.training.objective import Objective
from fiducial.training.trainer import _count
from tiny import random_groups, tiny_model
from training_harness import StoredReference

GROUPS = random_groups(3)
CPU = torch.device("cpu")
METHODS: list[MethodConfig] = [
    *(config() for config in LOSSES if not build_loss(config()).running),  # which is told once a step
    DPOConfig(ld_alpha=0.5),
    DPOConfig(rpo_alpha=0.5, use_weighting=True, f_divergence_type="js_divergence"),
    MixtureConfig(losses=(DPOConfig(), SFTConfig()), weights=(1.0, 1.0)),
]


def groups_for(method: MethodConfig) -> list[TokenizedGroup]:
    """Three, with what `method` reads: the first label of single completions is undesirable."""
    count = method.num_completions or 3 if method.paired else 1 + method.mismatched
    drawn = random_groups(3, completions=max(count, 2))
    return [
        TokenizedGroup(
            group.prompt,
            group.completions[:count],
            (2.0, 1.0, 0.0)[:count] if method.paired else (1.0 if number else -1.0, math.nan)[:count],
        )
        for number, group in enumerate(drawn)
    ]


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = mode.from_tensor(parameter.detach())
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, mode.from_tensor(buffer))


@pytest.mark.parametrize(
    ("method", "frozen_head"),
    [*((method, False) for method in METHODS), (DPOConfig(), True), (ORPOConfig(), True)],
    ids=lambda given: given.title if isinstance(given, MethodConfig) else given,
)
def test_a_step_waits_for_nothing(method: MethodConfig, frozen_head: bool) -> None:
    model = tiny_model(num_hidden_layers=1)
    model.get_output_embeddings().weight.requires_grad_(not frozen_head)
    scorer = Scorer(model, layout="packed")
    objective = Objective(scorer, NoReference(), build_loss(method))
    trained, ahead = objective.parts(groups_for(method))
    if method.needs_reference:
        objective.reference = StoredReference(scorer, [*trained, *ahead])
    scorer(scorer.pack(trained))  # a first pass also measures the head
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        make_fake(model.train(), mode)
        scored, sums = objective.step([trained], [ahead] if ahead else [])(0), MetricSums(CPU)
        scored.output.loss.sum().backward()
        _count(sums, scored, trained)
    assert ("rewards/margins" if method.paired else "rewards/rejected") in sums.totals
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


def test_a_size_that_depends_on_numbers_is_seen() -> None:
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        torch.bincount(torch.zeros(3, dtype=torch.long))


class Operations(TorchDispatchMode):
    """The names of what a device is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_number_is_made_where_it_is_needed() -> None:
    logits = torch.empty(3, device="meta")
    with Operations() as operations:
        LogitRule(2.0).slope(logits)
    assert operations.names == ["aten.new_full.default"], "it would be sent there, and waited for"


class Copies(TorchDispatchMode):
    """Whether each copy to another device may still be under way when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead: list[bool] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten._to_copy.default:
            return function(*args, **(kwargs or {}))
        self.ahead.append(kwargs.get("non_blocking", False))
        return torch.zeros(args[0].shape, dtype=args[0].dtype)


def test_a_batch_that_comes_to_the_cpu_is_waited_for() -> None:
    batch = pack(GROUPS, layout="packed").to("meta")
    with Copies() as copies:
        batch.to("cpu")
    assert len(copies.ahead) > 3
    assert not any(copies.ahead), "a reference on the CPU would read what a GPU has yet to write"


class Pinned(TorchFunctionMode):
    """In place of a GPU: whether what is sent there comes from pinned memory, and is not waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.Tensor] = []
        self.sent: list[bool] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.pin_memory:
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        if function is torch.Tensor.to and torch.device(args[1]).type == "cuda":
            is_pinned = any(args[0] is each for each in self.pinned)
            self.sent.append(is_pinned and kwargs == {"non_blocking": True})
            return args[0]
        return function(*args, **(kwargs or {}))


def test_what_goes_to_a_gpu_comes_from_pinned_memory() -> None:
    batch = pack(GROUPS, layout="packed")
    with Pinned() as copies:
        there = batch.to("cuda")
        plan = plan_attention(batch.segments, torch.device("cuda"))
    assert len(copies.sent) >= 8, "the batch and what attention reads"
    assert all(copies.sent), "a copy from elsewhere waits until the GPU has nothing left to do"
    assert torch.equal(there.target, batch.target)
    assert plan.variable_length is not None
    assert plan.variable_length.key_offsets.dtype == torch.int32


def test_nothing_is_sent_in_another_way() -> None:
    package = Path(__file__).parents[3] / "src" / "fiducial"
    assert [p.name for p in package.rglob("*.py") if "non_blocking" in p.read_text()] == ["sending.py"]
