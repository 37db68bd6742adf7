"""Finished runs: what commands say where a part of one was changed, damaged or never there; their record."""

from pathlib import Path

import pytest
from rich.console import Console

from fiducial.config.load import validate_config
from fiducial.evaluate import evaluate
from fiducial.run_record import RECORD_FILE, read_record
from fiducial.train import train
from finishing import KINDS, QUIET, Finished, change_one_weight, copied, fiducial_command, settings_of
from run_configs import run_config
from tiny import save_checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_base_is_named_by_verify_and_refused_by_evaluate(
    kind: str,
    finished: Finished,
    tmp_path: Path,
) -> None:
    folder = copied(finished(kind)[0], tmp_path / "copy")
    change_one_weight(folder / "base-llama" / "model.safetensors")
    for command in ("verify", "evaluate"):
        done = fiducial_command(command, folder / "out")
        assert done.exit_code == 2
        assert "is not the reference this run was started with" in done.output
        assert "1 of " in done.output
        assert "q_proj" in done.output


@pytest.mark.parametrize("kind", ["synced", "synced lora"])
@pytest.mark.parametrize("command", ["verify", "evaluate"])
@pytest.mark.parametrize("place", ["moved_reference", "checkpoint-2"])
def test_another_moved_reference_is_found(
    kind: str,
    command: str,
    place: str,
    finished: Finished,
    tmp_path: Path,
) -> None:
    folder = copied(finished(kind)[0], tmp_path / "copy")
    (folder / "pairs-16.jsonl").rename(folder / "other.jsonl")  # rows are not needed to see it
    change_one_weight(folder / "out" / place / "reference_state.safetensors")
    of = folder / "out" if place == "moved_reference" else folder / "out" / place
    rows = [f"datasets.0.path={folder / 'other.jsonl'}"] if command == "evaluate" else []
    done = fiducial_command(command, of, *rows)
    assert done.exit_code == 2
    assert f"{place} is not the one this run had moved to" in done.output


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_what_is_no_run_is_said_to_be_none(
    command: str,
    finished: Finished,
    tmp_path: Path,
) -> None:
    folder = finished("full")[0]
    (tmp_path / "empty").mkdir()
    cases = {
        tmp_path / "empty": "holds no run.json",
        tmp_path / "nowhere": "does not exist",
        folder: "holds out; name one of those",
        folder / "base-llama": "holds no run.json",
    }
    for target, words in cases.items():
        done = fiducial_command(command, target)
        assert done.exit_code == 2, target
        assert words in done.output
        assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_a_half_written_checkpoint_is_told(
    command: str,
    finished: Finished,
    tmp_path: Path,
) -> None:
    checkpoint = copied(finished("full")[0], tmp_path / "copy") / "out" / "checkpoint-2"
    weights = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = fiducial_command(command, checkpoint)
    assert done.exit_code == 2
    assert "is damaged: it has" in done.output
    (checkpoint / "trainer_state.json").unlink()
    done = fiducial_command(command, checkpoint)
    assert "was cut off while it was written" in done.output
    (checkpoint / "model.safetensors").unlink()
    done = fiducial_command(command, checkpoint)
    assert "holds no trained model" in done.output
    (checkpoint / RECORD_FILE).write_text("{")
    done = fiducial_command(command, checkpoint)
    assert "is damaged or was not written by Fiducial" in done.output


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_base_is_refused(
    kind: str,
    finished: Finished,
    tmp_path: Path,
) -> None:
    folder = finished(kind)[0]
    wider = save_checkpoint(tmp_path / "wider", hidden_size=64)
    for command in ("verify", "evaluate"):
        done = fiducial_command(command, folder / "out", f"base_model={wider}")
        assert done.exit_code == 2
        assert "does not fit base_model" in done.output or "was not trained from base_model" in done.output


def test_a_resumed_run_refuses_another_base(tmp_path: Path) -> None:
    settings = run_config(tmp_path, save_steps=1, max_steps=2)
    train(settings, console=QUIET)
    change_one_weight(tmp_path / "base-llama" / "model.safetensors")
    resumed = settings | {"max_steps": 3, "auto_resume_from_checkpoints": True}
    with pytest.raises(Exception, match="is not the reference this run was started with"):
        train(resumed, console=QUIET)


def test_without_its_record_a_run_is_said_to_be_compared_with_nothing_that_is_known(tmp_path: Path) -> None:
    settings = run_config(tmp_path, val_set_size=2, save_steps=1, max_steps=2)
    train(settings, console=QUIET)
    for record in (tmp_path / "out").rglob(RECORD_FILE):
        record.unlink()
    console = Console(record=True, width=400, force_terminal=False)
    evaluate(settings, console=console)
    assert f"{tmp_path / 'out'} has no run.json: whether the reference" in console.export_text()
    train(settings | {"max_steps": 3, "auto_resume_from_checkpoints": True}, console=console)
    assert f"{tmp_path / 'out' / 'checkpoint-2'} has no run.json: whether" in console.export_text()


def test_the_record_says_what_was_run_and_gives_no_rows_away(
    finished: Finished,
) -> None:
    folder, _ = finished("full")
    record = read_record(folder / "out" / "checkpoint-2")
    assert record.settings == settings_of(folder, "full")
    assert record.run.model.dtype == "float32"
    assert record.run.model.autocast is None
    assert record.run.method == validate_config(settings_of(folder, "full")).method
    assert "Question" not in (folder / "out" / RECORD_FILE).read_text()


def test_a_record_of_python_takes_no_overrides(tmp_path: Path) -> None:
    train(validate_config(run_config(tmp_path, rows=8)), console=QUIET)
    done = fiducial_command("verify", tmp_path / "out", "seed=2")
    assert done.exit_code == 2
    assert "started from Python with a RunConfig" in done.output
    assert fiducial_command("verify", tmp_path / "out").exit_code == 0
