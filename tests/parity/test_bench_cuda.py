"""The GPU bench, run small on a CPU: cut off or failing, it keeps every contestant that has finished."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")

from bench import arena, cuda
from bench.arena import Contestant, FailedError
from bench.contestant import Job, Result

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 still uses the old names, whatever the user passes.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]
NAMES = ["TRL default", "TRL precomputed", "Fiducial"]
STEP = {"loss": 0.69}


def quick(output: Path, *more: str) -> int:
    return cuda.main(["--quick", "--data", "long", "--output", str(output), *more])


def held(output: Path) -> list[dict[str, Any]]:
    comparisons: list[dict[str, Any]] = json.loads(output.read_text())["comparisons"]
    return comparisons


class Contestants:
    """Stand in for the programs: each has come to its end at once, unless it is told to fail."""

    def __init__(self, **failing: BaseException) -> None:
        self.failing = {name.replace("_", " "): error for name, error in failing.items()}
        self.ran: list[str] = []

    def __call__(self, contestant: Contestant, job: Job) -> Result:
        self.ran.append(contestant.name)
        if contestant.name in self.failing:
            raise self.failing[contestant.name]
        return Result([3.0, 2.0, 1.0], 0.5, 2**20, [STEP] * 3)


def use(contestants: Contestants, monkeypatch: pytest.MonkeyPatch) -> Contestants:
    monkeypatch.setattr(arena, "_run_here", contestants)
    return contestants


def test_every_contestant_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cuda.json"
    assert quick(output) == 0
    (comparison,) = held(output)
    assert list(comparison["contestants"]) == list(comparison["raw"]) == NAMES
    assert list(comparison["micro_batch_sizes"]) == NAMES[:2]
    assert all(row["per_second"] > 0 for row in comparison["contestants"].values())
    capsys.readouterr()
    assert quick(output, "--only-missing") == 0
    assert "measured already" in capsys.readouterr().out


def test_cut_off_it_goes_on_with_those_that_had_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cuda.json"
    use(Contestants(TRL_precomputed=KeyboardInterrupt()), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quick(output)
    assert list(held(output)[0]["contestants"]) == NAMES[:1]
    rest = use(Contestants(), monkeypatch)
    assert quick(output, "--only-missing") == 0
    assert rest.ran == NAMES[1:]
    assert list(held(output)[0]["contestants"]) == NAMES
    anew = use(Contestants(), monkeypatch)
    assert quick(output) == 0
    assert anew.ran == NAMES


def test_one_that_fails_loses_nobody_and_may_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "cuda.json"
    use(Contestants(TRL_default=FailedError("TRL default failed: no such library")), monkeypatch)
    assert quick(output) == 1
    assert "no such library" in capsys.readouterr().out
    assert list(held(output)[0]["contestants"]) == NAMES[1:]
    rest = use(Contestants(), monkeypatch)
    assert quick(output, "--only-missing") == 0
    assert rest.ran == NAMES[:1]
    assert list(held(output)[0]["contestants"]) == NAMES, "ratios are to the first"


def test_what_ran_on_other_examples_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "cuda.json"
    use(Contestants(), monkeypatch)
    assert quick(output) == 0
    (comparison,) = held(output)
    comparison["examples"]["shared_tokens"] += 1
    report = json.loads(output.read_text())
    output.write_text(json.dumps(report | {"comparisons": [comparison]}))
    again = use(Contestants(), monkeypatch)
    assert quick(output, "--only-missing") == 0
    assert again.ran == NAMES


def test_micro_batches_are_halved_as_long_as_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(Contestants):
        def __call__(self, contestant: Contestant, job: Job) -> Result:
            if contestant.name.startswith("TRL") and job.micro_batch_size > 1:
                raise FailedError("torch.OutOfMemoryError: CUDA out of memory")
            return super().__call__(contestant, job)

    use(Large(), monkeypatch)
    assert quick(tmp_path / "cuda.json") == 0
    sizes = held(tmp_path / "cuda.json")[0]["micro_batch_sizes"]
    assert sizes == dict.fromkeys(NAMES[:2], 1)
