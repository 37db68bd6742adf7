"""What fails in one process ends all of them, with its words."""

import json
from pathlib import Path

import pytest

from fiducial.agreement import all_or_none
from launching import two_processes

WORKER = Path(__file__).parents[1] / "agreement_worker.py"


def test_one_process_fails_as_it_would_anyway() -> None:
    with pytest.raises(KeyError, match="gone"), all_or_none():
        raise KeyError("gone")
    with all_or_none():
        pass


@pytest.mark.slow
def test_every_process_ends_with_the_failure_of_one(tmp_path: Path) -> None:
    two_processes(WORKER, str(tmp_path), timeout=120)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["nobody"] is second["nobody"] is None
    assert first["user"] == ["TrainingError", "process 1 failed: log-probs are not finite"]
    assert second["user"] == ["TrainingError", "log-probs are not finite"]
    assert first["disk"][0] == "RuntimeError"
    assert "No space left on device" in first["disk"][1]
    assert second["disk"] == ["OSError", "[Errno 28] No space left on device"]
    assert first["memory"] == [
        "TrainingError",
        "process 1 failed: out of memory; what it printed says what to do.",
    ]
    assert second["memory"] == ["OutOfMemoryError", "CUDA out of memory. Tried to allocate 1 GiB"]
    assert (first["both"][1], second["both"][1]) == ("first", "second")
    assert first["first"] == second["first"] == "there is nowhere to write"
    assert first["scored"] == second["scored"] == 12
    assert [first["disks"][0], second["disks"][0]] == ["CacheError", "CacheError"]
    assert f"{tmp_path / 'disk-1'}/" in second["disks"][1]
    assert first["disks"][1] == f"process 1 failed: {second['disks'][1]}"
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("mark-")]
    assert "are not finite" in second["scoring"]
    assert first["scoring"] == f"process 1 failed: {second['scoring']}"
    assert "the reference has moved while training" in second["moved"]
    assert first["moved"] == f"process 1 failed: {second['moved']}"
