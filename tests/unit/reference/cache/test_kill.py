"""Killed at any moment, a scoring pass goes on: no record is lost that was written, none is wrong."""

import os
import random
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.identity import Identity
from fiducial.reference.sources import InitialPolicy
from forks import fork
from tiny import random_groups, tiny_model

IDENTITY = Identity("base", "0", "float32", "None")
GROUPS = random_groups(40)
BUDGET = 150
KILLS = 30


class Logged:
    """The policy as a reference that takes its time, and writes down which completions it was asked for."""

    def __init__(self, scorer: Scorer, log: Path, seconds: float, waits_in: int) -> None:
        self.inner, self.log, self.seconds = InitialPolicy(scorer), log, seconds
        self.passes_to_waiting = waits_in

    def token_logps(self, batch):
        with self.log.open("a") as file:
            file.write(" ".join(batch.keys) + "\n")
        self.passes_to_waiting -= 1
        if self.passes_to_waiting == 0:
            wait_for(may_go_on(self.log).exists)
        time.sleep(self.seconds)
        return self.inner.token_logps(batch)


def may_go_on(log: Path) -> Path:
    """The file that a process with this log waits for."""
    return log.with_suffix(".go")


def score(folder: Path, log: Path, seconds: float = 0.0, waits_in: int = 0) -> LogpStore:
    """Score all groups; the pass number `waits_in`, if there is one, waits until it may go on."""
    torch.set_num_threads(1)
    scorer = Scorer(tiny_model(), layout="packed")
    store = LogpStore(folder, IDENTITY)
    reference = Logged(scorer, log, seconds, waits_in)
    score_reference(GROUPS, reference, scorer, store, token_budget=BUDGET, flush_every=0)
    return store


def start(folder: Path, log: Path, seconds: float = 0.0, waits_in: int = 0) -> BaseProcess:
    """A scoring process, killed when the test ends."""
    return fork(score, folder, log, seconds, waits_in)


def passes(log: Path) -> list[tuple[str, ...]]:
    return [tuple(line.split()) for line in log.read_text().splitlines()] if log.exists() else []


def wait_for(condition, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def started(process: BaseProcess, log: Path, before: int) -> bool:
    return len(passes(log)) > before or not process.is_alive()


def records(store: LogpStore) -> list[list[float]]:
    return [store.get(key).tolist() for group in GROUPS for key in group.keys]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole", tmp_path / "whole.log")
    total = len(passes(tmp_path / "whole.log"))
    folder, log, moments = tmp_path / "killed", tmp_path / "killed.log", random.Random(0)
    kills = repeated = 0
    while kills < KILLS:
        before = len(passes(log))
        process = start(folder, log, seconds=0.01)
        wait_for(partial(started, process, log, before))
        time.sleep(moments.random() * 0.04)
        if process.is_alive():
            kills += 1
        process.kill()
        process.join()
        asked = passes(log)[before:]
        store = LogpStore(folder, IDENTITY)
        lost = {key for keys in asked for key in keys if store.get(key) is None}
        assert lost <= set(asked[-1] if asked else ()), "what was written before the last pass is there"
        repeated += bool(lost)
        if len(store) == len(whole):
            for path in (folder / IDENTITY.digest).iterdir():
                path.unlink()
    resumed = score(folder, log)
    assert records(resumed) == records(whole)
    assert repeated > 3, "some kills came while a pass was scored"
    assert kills * total > len(passes(log)), "a resumed pass does not begin anew"


@pytest.mark.slow
def test_one_of_two_runs_is_killed_and_the_other_ends_with_all_of_it(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole", tmp_path / "whole.log")
    total = len(passes(tmp_path / "whole.log"))
    folder, logs = tmp_path / "shared", [tmp_path / "first.log", tmp_path / "second.log"]
    # Both wait in the middle of a pass, so that a slow machine changes nothing about who does what.
    first = start(folder, logs[0], waits_in=3)
    wait_for(lambda: len(passes(logs[0])) == 3)
    second = start(folder, logs[1], waits_in=2)
    wait_for(lambda: len(passes(logs[1])) == 2)
    first.kill()
    first.join()
    may_go_on(logs[1]).touch()
    second.join(300)
    assert second.exitcode == 0
    assert records(LogpStore(folder, IDENTITY)) == records(whole)
    assert passes(logs[1])[0] != passes(logs[0])[0], "they began at opposite ends"
    assert len(passes(logs[1])) == total - 2, "what the first has written is not scored again"


@pytest.mark.slow
def test_two_runs_that_fill_one_cache_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    runs = [start(folder, tmp_path / f"{number}.log", seconds=0.01) for number in range(2)]
    for run in runs:
        run.join(300)
        assert run.exitcode == 0
    whole = score(tmp_path / "whole", tmp_path / "whole.log")
    assert records(LogpStore(folder, IDENTITY)) == records(whole)
    for path in (folder / IDENTITY.digest).iterdir():
        assert os.path.getsize(path) > 0
        assert not path.name.endswith((".part", ".damaged"))
