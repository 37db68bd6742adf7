"""An evaluation says the same for every loss, whatever its batches and however many processes share it."""

from pathlib import Path

import pytest
import torch

from evaluations import evaluate
from launching import two_processes
from step_gradients import groups_of_the_step, losses

SCRIPT = Path(__file__).parents[1] / "evaluations.py"
ALL = losses()
ROWS = 7
TOLD_OF_THE_WHOLE = ("whole step", "foreknown", "aot", "aot_unpaired", "beta_dpo", "sft", "kto")
"""Losses whose value is not a mean of what each group has by itself."""


def assert_same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("name", ALL)
def test_batches(tmp_path: Path, name: str) -> None:
    groups = groups_of_the_step(name)[:ROWS]
    whole, carried = evaluate(tmp_path, ALL[name], groups, ROWS)

    assert carried == ALL[name].running, "an evaluation takes no step"
    for batch_size in (1, 3):
        assert_same(evaluate(tmp_path, ALL[name], groups, batch_size)[0], whole)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    folder = tmp_path_factory.mktemp("two")
    two_processes(SCRIPT, str(folder))
    found: dict[str, dict[str, float]] = torch.load(folder / "metrics.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_two_processes(tmp_path: Path, together: dict[str, dict[str, float]], name: str) -> None:
    groups = groups_of_the_step(name)[:ROWS]
    assert_same(together[name], evaluate(tmp_path, ALL[name], groups, ROWS)[0])


@pytest.mark.parametrize("name", TOLD_OF_THE_WHOLE)
def test_a_mean_over_batches_would_differ(tmp_path: Path, name: str) -> None:
    groups = groups_of_the_step(name)[:ROWS]
    whole = evaluate(tmp_path, ALL[name], groups, ROWS)[0]["eval_loss"]
    parts = [groups[::2], groups[1::2]]
    losses_of_parts = [evaluate(tmp_path, ALL[name], part, ROWS)[0]["eval_loss"] for part in parts]

    mean = sum(len(part) * loss for part, loss in zip(parts, losses_of_parts, strict=True)) / ROWS

    assert mean != pytest.approx(whole, rel=1e-3)
