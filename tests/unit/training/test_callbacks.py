"""The metrics file, and what a checkpoint keeps of callbacks."""

import json
import time
from pathlib import Path

import pytest
import torch

from fiducial.training.callbacks import (
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
