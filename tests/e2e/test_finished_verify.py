"""Finished runs are asked whether their reference is still what it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fiducial.as_then import verify_finished
from fiducial.finished import from_folder
from fiducial.run_record import RECORD_FILE, read_record
from fiducial.train import train
from finishing import KINDS, QUIET, Finished, change_one_weight, copied, fiducial_command
from run_configs import run_config
from tiny import save_checkpoint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["out", "out/checkpoint-2"])
def test_the_reference_of_a_finished_run_is_still_what_it_was(
    kind: str,
    place: str,
    finished: Finished,
) -> None:
    folder, _ = finished(kind)
    done = fiducial_command("verify", folder / place)
    assert done.exit_code == 0, done.output
    assert "the same as when the run started" in done.output
    assert "as then: " in done.output
    assert ("moved reference" in done.output) == kind.startswith("synced")


def test_a_changed_adapter_is_named(finished: Finished, tmp_path: Path) -> None:
    folder = copied(finished("resumed adapter")[0], tmp_path / "copy")
    change_one_weight(folder / "sft" / "adapter_model.safetensors")
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "1 of " in done.output
    assert "lora_A" in done.output


def test_a_changed_config_of_the_base_is_named(finished: Finished, tmp_path: Path) -> None:
    folder = copied(finished("full")[0], tmp_path / "copy")
    config = folder / "base-llama" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "rms_norm_eps of the config: 1e-06 then, 0.5 now" in done.output


def test_a_moved_reference_that_answers_differently_is_found(finished: Finished, tmp_path: Path) -> None:
    folder = copied(finished("synced")[0], tmp_path / "copy")
    record = read_record(folder / "out")
    replace(record, moved_weights="").write(folder / "out")  # as older versions did
    change_one_weight(folder / "out" / "moved_reference" / "reference_state.safetensors")
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "answers differently" in done.output


def test_other_log_probs_from_the_same_weights_are_found(finished: Finished, tmp_path: Path) -> None:
    folder = copied(finished("lora")[0], tmp_path / "copy")
    path = folder / "out" / RECORD_FILE
    record = json.loads(path.read_text())
    record["start"]["logps"][0][0] += 0.01
    path.write_text(json.dumps(record))
    done = fiducial_command("verify", folder / "out")
    assert done.exit_code == 2
    assert "answers differently" in done.output


def test_without_its_data_the_weights_alone_are_compared(finished: Finished, tmp_path: Path) -> None:
    folder = copied(finished("full")[0], tmp_path / "copy")
    (folder / "pairs-16.jsonl").unlink()
    findings = verify_finished(from_folder(folder / "out"), console=QUIET)
    assert "the same as when the run started" in findings["weights"]
    assert "not compared" in findings["log-probs"]


def test_the_cached_records_are_looked_at(tmp_path: Path, reference_cache: Path) -> None:
    train(run_config(tmp_path, rows=8), console=QUIET)
    findings = verify_finished(from_folder(tmp_path / "out"), console=QUIET)
    assert "16; " in findings["cached records"]
    assert "scored again" in findings["cached records"]
    shutil.rmtree(reference_cache)
    assert "none" in verify_finished(from_folder(tmp_path / "out"), console=QUIET)["cached records"]


def test_verify_proves_a_run_before_it_trains(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config(tmp_path)))
    done = fiducial_command("verify", path)
    assert done.exit_code == 0, done.output
    assert "loaded bit for bit as in" in done.output
    assert "equal: at most" in done.output
    assert "median" in done.output
    assert not (tmp_path / "out").exists()
    other = save_checkpoint(tmp_path / "other", seed=1)
    done = fiducial_command("verify", path, f"reference.model={other}")
    assert done.exit_code == 0, done.output
    assert "another policy, as asked" in done.output
    done = fiducial_command("verify", path, "rl=orpo")
    assert done.exit_code == 0, done.output
    assert "nothing to prove" in done.output
    done = fiducial_command(
        "verify", path, "adapter=lora", "peft_init_lora_weights=pissa", "reference.source=adapter_off"
    )
    assert done.exit_code == 2
    assert "pissa" in done.output
