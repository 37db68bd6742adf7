"""Whole runs with something going wrong under them, killed or robbed of their cache: none ends otherwise."""

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from fiducial import assembly
from fiducial.errors import CacheError
from fiducial.reference.cache.folder import RecordFolder
from fiducial.train import train
from forks import fork
from run_configs import run_config

KILLS = int(os.environ.get("FIDUCIAL_TEST_KILLS", "30"))
MOVING = {"reference": {"schedule": "synced", "mixup_alpha": 0.25, "sync_steps": 2}, "save_steps": 1}
STREAMED = {"streaming": True, "max_steps": 6}
MANY_PASSES = {"micro_batch_tokens": 64, "num_epochs": 1}


def quietly(settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    train(settings, console=Console(quiet=True))


def start(settings: dict[str, Any]) -> BaseProcess:
    """A run in a process of its own, killed when the test ends."""
    return fork(quietly, settings)


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def same(first: Path, second: Path) -> bool:
    ours, theirs = weights(first), weights(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_killed_at_random_moments_a_run_whose_reference_moves_ends_with_the_same_weights(
    tmp_path: Path,
) -> None:
    settings = run_config(tmp_path, rows=12, num_epochs=2, learning_rate=1e-2, **MOVING)
    quietly(settings | {"output_dir": str(tmp_path / "whole")})
    moments, kills, ended, resumed = random.Random(0), 0, 0, 0
    out = tmp_path / "out-0"
    while kills < KILLS or ended == 0:
        options = {"output_dir": str(out), "auto_resume_from_checkpoints": True}
        resumed += bool(list(out.glob("checkpoint-*")))
        process, before = start(settings | options), lines(out)
        if kills < KILLS:
            further = moments.choice([0, 1, 1, 2])
            wait_for(lambda: lines(out) >= before + further, process)  # noqa: B023 - called at once
            time.sleep(moments.random() * 0.08)
            if process.is_alive():
                kills += 1
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert same(out, tmp_path / "whole")
            ended += 1
            out = tmp_path / f"out-{ended}"
        else:
            assert process.exitcode == -9, "a run fails for no other reason"
    assert resumed >= KILLS // 3, "most runs went on from a checkpoint"


class AtStep(TrainerCallback):
    """Does something while a run trains."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self.step, self.do = step, do

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1:
            self.do()


@pytest.mark.parametrize("data", [{"num_epochs": 2}, STREAMED], ids=["stored", "streamed"])
def test_a_cache_deleted_in_mid_run_costs_nothing(
    tmp_path: Path, reference_cache: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any]
) -> None:
    settings = run_config(tmp_path, **data, reference={"flush_seconds": 1e-6}, learning_rate=1e-2)
    quietly(settings | {"output_dir": str(tmp_path / "whole")})
    shutil.rmtree(reference_cache)
    rob = AtStep(3, lambda: shutil.rmtree(reference_cache))
    monkeypatch.setattr(assembly, "setting_callbacks", lambda cfg: [rob])
    console = Console(record=True, width=300, force_terminal=False)
    train(settings, console=console)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert ("was removed while this run used it" in console.export_text()) is ("streaming" in data)
    assert reference_cache.exists() is ("streaming" in data), "what was scored later is kept"


def refusing(monkeypatch: pytest.MonkeyPatch, code: int, below: Path, *, after: int = 0) -> Callable[[], int]:
    """Writing files of records below a folder fails after so many; the answer is how many were written."""
    write, written = RecordFolder.write, 0

    def failing(self: RecordFolder, name: str, content: bytes) -> None:
        nonlocal written
        if self.path.is_relative_to(below) and (name.endswith(".arrow") or code == errno.EROFS):
            if written >= after:
                raise OSError(code, os.strerror(code), str(self.path / name))
            written += 1
        write(self, name, content)

    monkeypatch.setattr(RecordFolder, "write", failing)
    return lambda: written


def test_a_disk_that_fills_up_while_scoring_loses_nothing_of_what_was_written(
    tmp_path: Path, reference_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_config(tmp_path, **MANY_PASSES, reference={"flush_seconds": 1e-6})
    quietly(settings | {"output_dir": str(tmp_path / "whole")})
    files = len(list(reference_cache.glob("*/*.arrow")))
    assert files > 5
    shutil.rmtree(reference_cache)
    with monkeypatch.context() as patch:
        refusing(patch, errno.ENOSPC, reference_cache, after=3)
        with pytest.raises(CacheError, match=r"No space left on device.*Make room"):
            quietly(settings)
    assert len(list(reference_cache.glob("*/*.arrow"))) == 3
    assert not list(reference_cache.glob("*/.*.part"))
    console = Console(record=True, width=300, force_terminal=False)
    train(settings, console=console)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert "24 completions scored" not in console.export_text()
    assert len(list(reference_cache.glob("*/*.arrow"))) == files, "three files' passes were not made again"


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_that_may_only_be_read_is_used_as_far_as_it_goes(
    tmp_path: Path, reference_cache: Path, monkeypatch: pytest.MonkeyPatch, filled: bool
) -> None:
    settings = run_config(tmp_path)
    quietly(settings | {"output_dir": str(tmp_path / "whole")})
    if not filled:
        for path in reference_cache.glob("*/*.arrow"):
            path.unlink()
    refusing(monkeypatch, errno.EROFS, reference_cache)
    console = Console(record=True, width=400, force_terminal=False)
    train(settings, console=console)
    own = list((tmp_path / "out" / "reference").glob("*/*.arrow"))
    assert len(own) == (0 if filled else 1)
    assert ("cannot be written" in console.export_text()) is not filled
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_of_two_runs_that_fill_one_cache_one_is_killed_and_the_other_does_not_notice(tmp_path: Path) -> None:
    cache = tmp_path / "references"
    settings = run_config(tmp_path, rows=60, **MANY_PASSES)
    shared = {"reference": {"cache": str(cache), "flush_seconds": 1e-6}}
    alone = {"reference": {"cache": str(tmp_path / "alone"), "flush_seconds": 1e-6}}
    quietly(settings | alone | {"output_dir": str(tmp_path / "whole")})
    total = len(list((tmp_path / "alone").glob("*/*.arrow")))
    for number, share in enumerate((0.1, 0.5)):
        first, second = (
            start(settings | shared | {"output_dir": str(tmp_path / f"{name}-{number}")})
            for name in ("killed", "other")
        )
        wait_for(lambda: len(list(cache.glob("*/*.arrow"))) > share * total, first)  # noqa: B023
        first.kill()
        first.join()
        second.join(300)
        assert second.exitcode == 0
        assert same(tmp_path / f"other-{number}", tmp_path / "whole")
        shutil.rmtree(cache)
