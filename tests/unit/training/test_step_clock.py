"""The clock that tells training from scoring, and the table a run ends with."""

import io
import time
from typing import Any

import pytest
import torch
from rich.console import Console

from fiducial.model.scoring import Scorer
from fiducial.reference.sources import InitialPolicy, LiveReference
from fiducial.training.closing import closing_table
from fiducial.training.step_clock import StepClock, TimedReference
from tiny import random_groups, tiny_model

CPU = torch.device("cpu")


class Slow:
    def token_logps(self, batch: Any) -> None:
        time.sleep(0.02)


def test_scoring_inside_steps_is_counted_and_nothing_outside() -> None:
    timed = TimedReference(Slow(), CPU)
    clock = StepClock(timed)
    given: Any = (None, None, None)
    for _ in range(2):
        clock.on_step_begin(*given)
        timed.token_logps(None)  # type: ignore[arg-type]  # it does not look
        time.sleep(0.03)
        clock.on_step_end(*given)
        timed.token_logps(None)  # type: ignore[arg-type]  # an evaluation, between the steps
        time.sleep(0.05)
    assert clock.scoring == pytest.approx(0.04, abs=0.03)
    assert clock.seconds - clock.scoring >= 0.06
    assert clock.seconds < 0.16 + 0.04
    assert timed.seconds >= 0.08


def test_a_timed_reference_answers_as_the_one_it_holds() -> None:
    scorer = Scorer(tiny_model(), layout="padded")
    batch = scorer.pack(random_groups(2))
    timed = TimedReference(InitialPolicy(scorer), CPU)
    assert torch.equal(timed.token_logps(batch).values, InitialPolicy(scorer).token_logps(batch).values)  # type: ignore[union-attr]  # there is a reference
    assert isinstance(timed, LiveReference)


RECORD: dict[str, Any] = {
    "proof": {
        "log_ratio": {"per_token": {"min": -1e-6, "median": 0.0, "max": 2e-6}, "per_sequence": {}},
        "noise_floor": 3e-6,
        "tolerance": 1.2e-5,
        "moved_while_training": 0.0,
    },
    "predicted": {"scoring_share": 0.25, "peak_bytes": 2 * 2**30},
    "measured": {"scoring_share": 0.21, "peak_bytes": 1 * 2**30},
}


def shown(record: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(closing_table([{"loss": 0.7, "step": 1}, {"loss": 0.5, "step": 2}], record, unit="pair"))
    return " ".join(console.export_text().replace("│", " ").split())


def test_the_closing_table_says_what_was_proved_and_measured() -> None:
    text = shown(RECORD)
    assert "policy − reference before step 1, a token -1.0e-06 to 2.0e-06" in text
    assert "noise of other batch shapes 3.0e-06, equal up to 1.2e-05" in text
    assert "reference moved by itself no" in text
    assert "time that scoring takes, predicted 25% time that scoring takes, measured 21%" in text
    assert "peak memory, predicted 2.00 GiB peak memory, measured 1.00 GiB" in text


def test_a_reference_that_was_moved_or_rounds_is_told_apart() -> None:
    proof = RECORD["proof"] | {"moves": [{"step": 4}, {"step": 8}], "moved_while_training": 1e-7}
    text = shown(RECORD | {"proof": proof})
    assert "reference moved to the policy 2 times, last at step 8" in text
    assert "reference moved by itself by rounding, 1.0e-07" in text
    assert "noise" not in shown(RECORD | {"proof": {}})
