"""A reference held less exactly than the policy: how far off it is, is measured before step 1."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fiducial.errors import TrainingError
from fiducial.reference.approximation import LARGEST_MEAN
from fiducial.train import train
from fiducial.verification import verify
from quantised import save_checkpoints, short_run


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("quantised"))


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize(
    ("reference", "how"),
    [
        ({"load_in_8bit": True}, "held in 8 bits"),
        ({"load_in_4bit": True}, "held in 4 bits"),
        ({"load_in_4bit": True, "schedule": "precomputed"}, "held in 4 bits"),
        ({"dtype": "bfloat16"}, "held in bfloat16"),
        ({"dtype": "bfloat16", "offload": "disk"}, "held in bfloat16"),
        ({"model": "other", "load_in_8bit": True}, "held in 8 bits"),
        ({"model": "other", "load_in_4bit": True, "schedule": "live"}, "held in 4 bits"),
    ],
    ids=str,
)
def test_an_approximation_is_measured_told_and_kept(
    tmp_path: Path, checkpoints: Path, reference: dict[str, Any], how: str
) -> None:
    if "load_in" in str(reference):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is the `quantization` extra")
    reference = dict(reference)
    named = "model" in reference
    if named:
        reference["model"] = str(checkpoints / "other")
    else:
        reference["source"] = "separate_model"
    if reference.get("schedule") == "precomputed" or (named and "schedule" not in reference):
        reference["cache"] = str(tmp_path / "cache")
    console = Console(record=True, width=300)
    result = train(short_run(tmp_path, checkpoints, {"reference": reference}), console=console)

    measured = result.record["proof"]["approximation"]
    assert measured["how"] == how == result.plan.approximate
    assert 1e-3 < measured["mean_difference"] < LARGEST_MEAN
    assert measured["mean_difference"] < measured["max_difference"]
    assert f"The reference is an approximation, {how}: on" in console.export_text()
    # A named model differs from the policy by more than by how it is held.
    difference = result.record["proof"]["max_difference"]
    assert (difference == pytest.approx(measured["max_difference"], abs=1e-5)) == (not named)


def test_verify_measures_it_before_training(tmp_path: Path, checkpoints: Path, quiet: Console) -> None:
    for schedule in ("live", "precomputed"):
        reference = {"source": "separate_model", "schedule": schedule, "dtype": "bfloat16"}
        found = verify(short_run(tmp_path, checkpoints, {"reference": reference}), console=quiet)
        assert "held in bfloat16: on" in found["approximation"]
        assert found["policy and reference"].startswith("equal but for the approximation: up to 0.")
    other = {"model": str(checkpoints / "other"), "schedule": "live", "dtype": "bfloat16"}
    found = verify(short_run(tmp_path, checkpoints, {"reference": other}), console=quiet)
    assert "held in bfloat16: on" in found["approximation"]
    assert found["policy and reference"].startswith("another policy, as asked")


def test_an_exact_reference_is_no_approximation(tmp_path: Path, checkpoints: Path, quiet: Console) -> None:
    exact = {"source": "separate_model", "dtype": "float32", "device": "cpu"}
    result = train(short_run(tmp_path, checkpoints, {"reference": exact}), console=quiet)
    assert result.plan.approximate is None
    assert result.record["proof"]["approximation"] is None


def test_another_model_is_no_approximation(
    tmp_path: Path, checkpoints: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiducial.reference.approximation.LARGEST_MEAN", 1e-6)
    named = {"source": "separate_model", "dtype": "bfloat16"}
    with pytest.raises(TrainingError, match="that is another model, no approximation"):
        train(short_run(tmp_path, checkpoints, {"reference": named}), console=quiet)
