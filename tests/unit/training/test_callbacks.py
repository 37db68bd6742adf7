"""The metrics file, interruption, and what a checkpoint keeps of callbacks."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from fiducial.training.callbacks import (
    Interruption,
    MetricsFile,
    RunningMetrics,
    read_metrics_lines,
    restore_callbacks,
    saved_micro_batch_tokens,
)
from fiducial.training.metrics import METRICS
from training_harness import build_trainer


def records(path: Path) -> list[dict]:
    return [record for _, record in read_metrics_lines(path)]


def test_every_log_becomes_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    build_trainer(tmp_path, callbacks=[MetricsFile(path)]).train()
    steps = [record for record in records(path) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert set(METRICS) <= set(steps[0])


def test_a_number_without_a_json_name_becomes_null(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path)
    writer = MetricsFile(tmp_path / "metrics.jsonl")
    logs = {"grad_norm": float("inf"), "loss": torch.tensor(0.5)}
    writer.on_log(trainer.args, trainer.state, trainer.control, logs=logs)
    assert json.loads(writer.path.read_text()) == {"step": 0, "grad_norm": None, "loss": 0.5}


def test_a_new_run_puts_an_older_file_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 99}\n')
    build_trainer(tmp_path, max_steps=1, callbacks=[MetricsFile(path)]).train()
    assert records(path)[0]["step"] == 1
    assert records(tmp_path / "metrics.previous.jsonl") == [{"step": 99}]


def test_a_resumed_run_drops_later_lines_summaries_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1}',
        '{"step": 2}',
        '{"step": 2, "train_runtime": 3.0}',
        '{"step": 3}',
        '{"step": 4, "lo',
    ]
    path.write_text("\n".join(lines))
    trainer = build_trainer(tmp_path)
    trainer.state.global_step = 2
    MetricsFile(path).on_train_begin(trainer.args, trainer.state, trainer.control)
    assert records(path) == [{"step": 1}, {"step": 2}]
    assert path.read_text().endswith("\n")


class SignalAt(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    interruption = Interruption()
    trainer = build_trainer(tmp_path, callbacks=[interruption, SignalAt(1, number)])
    trainer.train()
    assert interruption.stopped_at == trainer.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    interruption.release()
    assert signal.getsignal(number) is before
    told = "Stopping after this step, with a checkpoint. Ctrl-C again stops at once"
    assert capfd.readouterr().err.count(told) == 1


@pytest.fixture
def python_takes_interrupts() -> Iterator[None]:
    """As in a terminal: a shell's background jobs are started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(tmp_path: Path, python_takes_interrupts: None) -> None:
    interruption = Interruption()
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    interruption.on_train_begin(trainer.args, trainer.state, trainer.control)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.requested


def test_what_a_cluster_and_its_launcher_both_send_is_one_request(
    tmp_path: Path, python_takes_interrupts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    interruption = Interruption()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # by default it would end the tests
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    interruption.on_train_begin(trainer.args, trainer.state, trainer.control)
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        assert capfd.readouterr().err.count("Stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        interruption.release()
        assert signal.signal(signal.SIGTERM, before) is signal.default_int_handler


def test_an_uninterrupted_run_is_not_stopped_and_releases_the_signals(tmp_path: Path) -> None:
    interruption = Interruption()
    before = signal.getsignal(signal.SIGINT)
    trainer = build_trainer(tmp_path, callbacks=[interruption])
    trainer.train()
    assert interruption.stopped_at is None
    assert trainer.state.global_step == 4
    interruption.release()
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_keep_the_budget_and_what_was_not_logged_yet(tmp_path: Path) -> None:
    trainer = build_trainer(
        tmp_path, budget=77, logging_steps=3, max_steps=2, save_strategy="steps", save_steps=2
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert saved_micro_batch_tokens(checkpoint) == 77
    assert saved_micro_batch_tokens(tmp_path) is None
    restored = RunningMetrics(torch.device("cpu"), 1)
    restore_callbacks([restored], checkpoint)
    assert restored.sums.state() == trainer.running.sums.state() != {}
    assert restored.sums.num_pairs == 8
    assert restored.seconds > 0


def test_speed_is_that_since_the_last_log_be_it_before_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    running, counted = RunningMetrics(torch.device("cpu"), 1), {"loss": [1.0, 8.0], "_tokens": [40.0, 2.0]}

    running.seconds = 2.0
    running.on_train_begin(None, None, None)
    running.sums.restore(counted)
    now += 2
    first = running.take()
    running.sums.restore(counted)
    now += 8
    second = running.take()

    assert (first["pairs_per_second"], first["tokens_per_second"]) == (2, 10)
    assert (second["pairs_per_second"], second["tokens_per_second"]) == (1, 5)
