"""Whether there is a GPU, as far as can be told without torch."""

from pathlib import Path

import pytest

from fiducial.reference.precision import sees_gpu


@pytest.mark.parametrize(
    ("names", "seen"),
    [
        (["nvidia0", "nvidiactl"], True),
        (["nvidia3", "nvidiactl"], True),
        (["nvidiactl", "nvidia-uvm"], False),
        ([], False),
    ],
)
def test_a_gpu_of_any_number_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], seen: bool
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in names:
        (tmp_path / name).touch()
    assert sees_gpu(tmp_path) == seen


@pytest.mark.parametrize(("visible", "seen"), [("", False), ("-1", False), ("0", True), ("GPU-1f3a", True)])
def test_one_that_is_hidden_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, seen: bool
) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert sees_gpu(tmp_path) == seen
