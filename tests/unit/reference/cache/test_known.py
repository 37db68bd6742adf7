"""A plan says which records a run will find, once a run has known its reference; and never a wrong one's."""

from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

from fiducial.config.load import validate_config
from fiducial.reference.describe import plan_run
from fiducial.train import preprocess
from run_configs import run_config
from tiny import save_adapter


def told(settings) -> int | None:
    found: int | None = plan_run(validate_config(settings))["reference"]["cached_records"]
    return found


def test_a_plan_counts_the_records_of_its_reference(tmp_path: Path) -> None:
    settings = run_config(tmp_path)
    assert told(settings) is None
    preprocess(settings, console=Console(quiet=True))
    assert told(settings) == 24
    assert told(settings | {"learning_rate": 1e-5, "seed": 5, "rl": "ipo"}) == 24
    assert told(settings | {"bf16": "full"}) is None
    assert told(settings | {"reference": {"schedule": "live"}}) is None
    for another in (
        {"special_tokens": {"pad_token": "<fill>"}},
        {"tokens": ["<new>"]},
        {"reinit_weights": True},
    ):
        assert told(settings | another) is None, another
    path = Path(settings["base_model"]) / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 1
    save_file(weights, path, {"format": "pt"})
    assert told(settings) is None, "the file has changed"


def test_a_resumed_adapter_is_part_of_what_is_known(tmp_path: Path) -> None:
    settings = run_config(tmp_path, adapter="lora", lora_model_dir=str(tmp_path / "adapter"))
    path = save_adapter(tmp_path / "adapter", settings["base_model"]) / "adapter_model.safetensors"
    preprocess(settings, console=Console(quiet=True))
    assert told(settings) == 24
    assert told(settings | {"reference": {"schedule": "live"}}) is None
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    assert told(settings) is None, "the adapter's file has changed"
