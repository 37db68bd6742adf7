"""What of a batch is chosen, and how the passes of a step become one comparison."""

from typing import Any

import jaxtyping
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from comparing import comparison
from fiducial.logps import Comparison, Completions, SequenceLogps, TokenLogps

NAN = torch.nan


def completions(group: list[int], score: list[float] | None = None) -> Completions:
    given = score if score is not None else [NAN] * len(group)
    return Completions.of(torch.tensor(group, dtype=torch.long), torch.tensor(given))


@pytest.mark.parametrize(
    ("group", "score", "chosen"),
    [
        ([0, 0, 1, 1], None, [True, False, True, False]),
        ([0, 0, 0, 1, 1], [1.0, 3.0, 2.0, 0.0, 5.0], [True, False, False, True, False]),
        ([0, 1, 2], [1.0, -1.0, 1.0], [True, False, True]),
        ([0, 1], None, [True, True]),
        ([], [], []),
    ],
)
def test_chosen(group: list[int], score: list[float] | None, chosen: list[bool]) -> None:
    assert completions(group, score).chosen.tolist() == chosen


def test_passes_are_joined_in_order_and_numbered_through() -> None:
    first = comparison(logps(-1.0, -2.0), logps(-3.0, -4.0))
    empty = comparison(logps(), logps())
    second = comparison(logps(-5.0, -6.0, -7.0, -8.0), logps(-9.0, -10.0, -11.0, -12.0))

    joined = Comparison.concatenate([first, empty, second])

    assert joined.policy.sum.tolist() == [-1, -2, -5, -6, -7, -8]
    assert joined.policy.statistics["spread"].tolist() == [2, 4, 10, 12, 14, 16]
    assert joined.reference is not None
    assert joined.reference.sum.tolist() == [-3, -4, -9, -10, -11, -12]
    assert joined.completions.group.tolist() == [0, 0, 1, 1, 2, 2]


def logps(*values: float) -> SequenceLogps:
    total = torch.tensor(values)
    return SequenceLogps(total, torch.ones(len(values), dtype=torch.long), {"spread": -2 * total})


def test_weights_scale_log_probs_and_not_statistics() -> None:
    values, sequence = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1])
    tokens = TokenLogps(values, sequence, 2, {"spread": torch.tensor([1.0, 2.0, 3.0])})

    weighted = tokens.reduce(torch.tensor([1.0, 0.5, 2.0]))

    assert weighted.sum.tolist() == [-2.0, -8.0]
    assert weighted.statistics["spread"].tolist() == [3.0, 3.0]
    assert tokens.reduce().sum.tolist() == [-3.0, -4.0]


def test_a_long_completion_s_sum_is_rounded_once() -> None:
    """A float32 sum that grows token by token loses thousandths of a nat, which no log-ratio can spare."""
    values = -10 - torch.rand(4096, generator=torch.Generator().manual_seed(0))
    total = TokenLogps(values, torch.zeros(4096, dtype=torch.long), 1).reduce().sum
    assert total.item() == values.double().sum().float().item()


def test_in_tests_a_shape_that_is_stated_is_checked() -> None:
    logps = TokenLogps(torch.zeros(3), torch.zeros(3, dtype=torch.long), 1)
    with pytest.raises(jaxtyping.TypeCheckError):
        logps.reduce(torch.ones(3, 1))
    with pytest.raises(jaxtyping.TypeCheckError):
        TokenLogps(torch.zeros(3), torch.zeros(4, dtype=torch.long), 1)


class Made(TorchDispatchMode):
    """Where and in which precision results were made."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.found.add((result.device.type, result.dtype))
        return result


def test_an_apple_gpu_is_asked_for_no_float64() -> None:
    """It has none, and sums of float32 would lose a part of every log-ratio."""
    with FakeTensorMode(), Made() as made:
        sequence = torch.zeros(6, dtype=torch.long, device="mps")
        total = TokenLogps(torch.zeros(6, device="mps"), sequence, 2).reduce().sum
    assert (total.device.type, total.dtype) == ("mps", torch.float32)
    assert ("mps", torch.float64) not in made.found
    assert ("cpu", torch.float64) in made.found
