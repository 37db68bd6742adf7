"""Each logger by its usual key: it logs without a network, and what it logged is what the run measured."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import wandb_file
from fiducial import train as train_module
from fiducial.config.load import validate_config
from fiducial.errors import ConfigError, TrainingError
from fiducial.training import loggers
from fiducial.training.callbacks import read_metrics_lines
from run_configs import run_config

Losses = dict[int, float]


def fiducial_train(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The command, started in `folder`: three steps, and held-out pairs that are judged at the end."""
    run = run_config(folder, rows=13, val_set_size=2, eval_strategy="no", max_steps=3, **settings)
    (folder / "run.yaml").write_text(json.dumps(run), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    return subprocess.run(
        [sys.executable, "-m", "fiducial", "train", "run.yaml"],
        cwd=folder,
        env=environment | {"TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def wandb_losses(folder: Path, name: str) -> Losses:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return {log["train/global_step"]: log[name] for log in wandb_file.history(file) if name in log}


def mlflow_losses(folder: Path, name: str) -> Losses:
    store = sqlite3.connect(folder / "out" / "mlflow.db")
    assert store.execute("SELECT name, status FROM runs").fetchall() == [("first", "FINISHED")]
    key = name.removeprefix("train/").replace("eval/", "eval_")
    rows = store.execute("SELECT step, value FROM metrics WHERE key = ?", (key,)).fetchall()
    store.close()
    return dict(rows)


def trackio_losses(folder: Path, name: str) -> Losses:
    store = sqlite3.connect(folder / "trackio" / "align.db")
    rows = store.execute("SELECT run_name, metrics FROM metrics").fetchall()
    store.close()
    assert {run for run, _ in rows} == {"first"}
    logs = [json.loads(metrics) for _, metrics in rows]
    return {log["train/global_step"]: log[name] for log in logs if name in log}


def tensorboard_losses(folder: Path, name: str) -> Losses:
    (file,) = folder.glob("out/runs/*/events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "settings", "losses"),
    [
        ("wandb", {"use_wandb": True, "wandb_mode": "offline", "wandb_name": "first"}, wandb_losses),
        ("mlflow", {"use_mlflow": True, "mlflow_run_name": "first"}, mlflow_losses),
        ("trackio", {"trackio_project_name": "align", "trackio_run_name": "first"}, trackio_losses),
        ("tensorboard", {"use_tensorboard": True}, tensorboard_losses),
    ],
)
def test_a_logger_keeps_what_was_measured(
    tmp_path: Path, package: str, settings: dict[str, Any], losses: Callable[[Path, str], Losses]
) -> None:
    pytest.importorskip(package)
    done = fiducial_train(tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    logs = [record for _, record in read_metrics_lines(tmp_path / "out" / "metrics.jsonl")]
    for name, key in {"train/loss": "loss", "eval/loss": "eval_loss"}.items():
        measured = {log["step"]: log[key] for log in logs if key in log}
        assert len(measured) == (3 if key == "loss" else 1)
        assert losses(tmp_path, name) == pytest.approx(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "settings", "words"),
    [
        ("mlflow", {"mlflow_tracking_uri": "file:./runs", "use_mlflow": True}, "sqlite:///mlflow.db"),
        ("wandb", {"use_wandb": True}, "wandb_mode: offline"),
    ],
)
def test_what_a_logger_refuses_is_told_plainly(
    tmp_path: Path, package: str, settings: dict[str, Any], words: str
) -> None:
    pytest.importorskip(package)
    done = fiducial_train(tmp_path, **settings)
    assert done.returncode == 2
    assert f"use_{package}: " in done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_set_up_names_its_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "logs"))
    with pytest.raises(TrainingError, match=r"use_tensorboard: tensorboard stopped with NotADirectoryError"):
        train_module.train(run_config(tmp_path, max_steps=1, use_tensorboard=True))


def test_what_no_logger_raised_passes_unchanged() -> None:
    output = validate_config({"base_model": "m", "use_tensorboard": True}).output
    with pytest.raises(KeyError, match="ours"), loggers.reporting(output):
        raise KeyError("ours")


def test_a_missing_package_is_found_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "read_run", lambda *_: pytest.fail("data was read"))
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    settings = run_config(tmp_path, use_comet=True, use_wandb=True)
    with pytest.raises(
        ConfigError, match=r"use_wandb, use_comet: not installed.*pip install wandb comet-ml, or"
    ):
        train_module.train(settings)


def test_mlflow_keeps_its_runs_in_the_output_folder_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = {"base_model": "m", "use_mlflow": True, "output_dir": str(tmp_path / "out")}
    where = "MLFLOW_TRACKING_URI"
    with loggers.reporting(validate_config(run).output):
        assert os.environ[where] == f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}"
    assert where not in os.environ
    told = validate_config(run | {"mlflow_tracking_uri": "http://localhost:5000"}).output
    assert loggers.environment(told)[where] == "http://localhost:5000"
    monkeypatch.setenv(where, "http://elsewhere")
    assert where not in loggers.environment(validate_config(run).output)
