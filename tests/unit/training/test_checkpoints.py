"""Which checkpoint is resumed, and what a full disk is told apart by."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fiducial.errors import ConfigError, TrainingError
from fiducial.training.checkpoints import (
    Launch,
    full_disk_explained,
    last_complete,
    missing_from,
    to_resume,
)


def write_checkpoint(folder: Path, step: int, *, without: str = "", processes: int = 1) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("scheduler.pt", "optimizer.pt", *states):
        if name != without:
            torch.save({"step": step}, path / name)
    if without != "model.safetensors":
        save_file({"weight": torch.ones(3)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    if without != "trainer_state.json":
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


@pytest.mark.parametrize(
    "missing", ["trainer_state.json", "rng_state.pth", "scheduler.pt", "optimizer.pt", "model.safetensors"]
)
def test_a_checkpoint_cut_off_while_written_is_passed_over(tmp_path: Path, missing: str) -> None:
    good = write_checkpoint(tmp_path, 9)
    write_checkpoint(tmp_path, 10, without=missing)
    assert last_complete(tmp_path) == good
    assert to_resume(None, auto=True, output_dir=tmp_path) == good


def test_a_torn_state_file_counts_as_missing(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 5)
    (path / "trainer_state.json").write_text('{"global_step": 5, "log_his')
    assert missing_from(path) == ["trainer_state.json"]


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "config.json"]
)
@pytest.mark.parametrize("left", [0, -1])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(tmp_path: Path, name: str, left: int) -> None:
    good = write_checkpoint(tmp_path, 9)
    file = write_checkpoint(tmp_path, 10) / name
    file.write_bytes(file.read_bytes()[:left])
    assert to_resume(None, auto=True, output_dir=tmp_path) == good
    whole = "whole weights" if name == "model.safetensors" else f"a whole {name}"
    with pytest.raises(ConfigError, match=rf"it lacks {whole}\. Use resume_from_checkpoint: .*checkpoint-9"):
        to_resume(str(file.parent), auto=False, output_dir=tmp_path)


def test_steps_are_compared_as_numbers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 10)
    assert last_complete(tmp_path) == newest


def test_a_checkpoint_of_an_earlier_run_in_the_same_folder_is_passed_over(tmp_path: Path) -> None:
    own, left_over = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 9)
    for folder, run in {tmp_path: "new", own: "new", left_over: "old"}.items():
        (folder / "run.json").write_text(json.dumps({"id": run}))
    assert last_complete(tmp_path) == own
    assert to_resume(str(left_over), auto=False, output_dir=tmp_path) == left_over  # who names it means it
    (left_over / "run.json").unlink()  # an older version wrote none, or none with an id
    assert last_complete(tmp_path) == left_over


def test_nothing_to_resume(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3)
    assert to_resume(None, auto=False, output_dir=tmp_path) is None
    assert to_resume(None, auto=True, output_dir=tmp_path / "empty") is None


def test_naming_an_incomplete_checkpoint_says_what_it_lacks_and_which_is_good(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 2)
    bad = write_checkpoint(tmp_path, 4, without="rng_state.pth")
    with pytest.raises(ConfigError, match=r"lacks rng_state.pth.*checkpoint-2"):
        to_resume(str(bad), auto=False, output_dir=tmp_path)
    assert to_resume(str(good), auto=False, output_dir=tmp_path) == good


def test_nobody_begins_anew_over_checkpoints_of_another_launch(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, processes=2)
    (path / "rng_state.pth").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=r"auto_resume_from_checkpoints: .*checkpoint-2.*Remove the key"):
        to_resume(None, auto=True, output_dir=tmp_path)
    assert to_resume(None, auto=False, output_dir=tmp_path) is None
    (path / "trainer_state.json").unlink()  # cut off while it was written
    assert to_resume(None, auto=True, output_dir=tmp_path) is None


def test_naming_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere cannot be resumed exactly by 1 process\(es\): it is not there"
    ):
        to_resume(str(tmp_path / "nowhere"), auto=False, output_dir=tmp_path)


def test_another_number_of_processes_is_not_an_exact_resume(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, processes=2)
    assert to_resume(str(path), auto=False, output_dir=tmp_path, launch=Launch(2)) == path
    with pytest.raises(ConfigError, match=r"1 process\(es\)"):
        to_resume(str(path), auto=False, output_dir=tmp_path)


def test_fewer_processes_do_not_go_on_from_the_states_of_more(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, 2, processes=3)
    callbacks = {"RunningMetrics": {"args": {"num_processes": 3}}}
    (path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": callbacks}))
    with pytest.raises(ConfigError, match=r"saved by 2 process\(es\) and has those of 3"):
        to_resume(None, auto=True, output_dir=tmp_path, launch=Launch(2))
    assert last_complete(tmp_path, Launch(3)) == path
    callbacks["RunningMetrics"]["args"]["num_processes"] = 2  # written over what three had left
    (path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": callbacks}))
    assert to_resume(None, auto=True, output_dir=tmp_path, launch=Launch(2)) == path


@pytest.mark.parametrize("weights", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"])
def test_only_a_sharded_run_resumes_from_shards(tmp_path: Path, weights: str) -> None:
    path = write_checkpoint(tmp_path, 2, processes=2)
    with pytest.raises(ConfigError, match="lacks weights saved with fsdp_version"):
        to_resume(str(path), auto=False, output_dir=tmp_path, launch=Launch(2, sharded=True))
    (path / weights).write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"lacks optimizer\.bin"):
        to_resume(str(path), auto=False, output_dir=tmp_path, launch=Launch(2, sharded=True))
    (path / "optimizer_0").mkdir()
    assert last_complete(tmp_path, Launch(2, sharded=True)) == path
    with pytest.raises(ConfigError, match="lacks weights saved without fsdp_version"):
        to_resume(str(path), auto=False, output_dir=tmp_path, launch=Launch(2))


def raised_while_handling(error: Exception) -> Exception:
    another = RuntimeError("the file could not be closed")
    another.__context__ = error
    return another


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        raised_while_handling(OSError(errno.ENOSPC, "No space left on device")),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(
            "[enforce fail at inline_container.cc:659] PytorchStreamWriter failed writing file data/0"
        ),
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    good = write_checkpoint(tmp_path, 2)
    with (
        pytest.raises(TrainingError, match=r"is full.*save_total_limit") as caught,
        full_disk_explained(tmp_path),
    ):
        raise error
    assert str(good) in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_full_disk_names_what_as_many_processes_can_resume(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 2, processes=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(TrainingError, match="checkpoint-2"), full_disk_explained(tmp_path, Launch(2)):
        raise full


def test_any_other_error_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), full_disk_explained(tmp_path):
        raise RuntimeError("shape mismatch")
