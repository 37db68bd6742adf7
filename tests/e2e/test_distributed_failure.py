"""A run whose second process fails: both end by themselves, with the failure's exit code and words."""

import json
from pathlib import Path

import pytest

from launching import two_alone
from run_configs import run_config

WORKER = Path(__file__).parents[1] / "failing_worker.py"
NOT_A_NUMBER = "The loss is not a number at step 2, for 2 of 2 groups"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "first", "second"),
    [
        (
            "read",
            "Data error: process 1 failed: the file is not there",
            "Data error: the file is not there",
        ),
        (
            "load",
            "Model error: process 1 failed: a weights file is damaged",
            "Model error: a weights file is damaged",
        ),
        (
            "copy",
            "Model error: process 1 failed: the reference loaded here answers otherwise than in the first",
            "Model error: the reference loaded here answers otherwise than in the first process",
        ),
        (
            "nan",
            f"Training error: process 1 failed: {NOT_A_NUMBER}",
            f"Training error: {NOT_A_NUMBER}",
        ),
        (
            "memory",
            "Training error: Another process of this run ended in the middle of a step",
            "Training error: Out of memory at step 2 in process 1",
        ),
    ],
    ids=["read", "load", "copy", "nan", "memory"],
)
def test_both_processes_end_with_the_failure_of_one(
    tmp_path: Path, failure: str, first: str, second: str
) -> None:
    run = tmp_path / "run.yaml"
    config = run_config(tmp_path, rows=16, micro_batch_size=2, max_steps=3)
    if failure == "copy":
        config["reference"] = {"schedule": "live"}
    run.write_text(json.dumps(config), encoding="utf-8")
    ended = two_alone(WORKER, failure, str(run), timeout=300)
    assert [process.returncode for process in ended] == [2, 2], [process.stderr for process in ended]
    for process, words in zip(ended, (first, second), strict=True):
        assert words in process.stderr
        assert "Internal error" not in process.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_both_processes_stop_with_a_checkpoint_and_one_says_so(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    config = run_config(tmp_path, rows=16, micro_batch_size=2, max_steps=3)
    run.write_text(json.dumps(config), encoding="utf-8")
    ended = two_alone(WORKER, "stopped", str(run), timeout=300)
    assert [process.returncode for process in ended] == [130, 130], [process.stderr for process in ended]
    assert [process.stderr.count("Stopped after step 2 of 3") for process in ended] == [1, 0]
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.slow
def test_a_process_waits_for_another_no_longer_than_asked(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps(run_config(tmp_path, ddp_timeout=2)), encoding="utf-8")
    waited, _ = two_alone(WORKER, "absent", str(run), timeout=60)
    assert waited.returncode == 2
    assert "Training error: The 2 processes of this run did not find each other" in waited.stderr
    assert "Internal error" not in waited.stderr
