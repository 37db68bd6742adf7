"""Policies in 8 and 4 bits from the first step to the merged model."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from fiducial.config.load import validate_config
from fiducial.errors import FiducialError, ModelError
from fiducial.merge import merge_adapter
from fiducial.model.loader import ModelLoader
from fiducial.model.quantisation import is_quantised
from fiducial.model.tokenizer import load_tokenizer
from fiducial.train import train
from quantised import HELD, LORA, save_checkpoints, short_run

pytest.importorskip("bitsandbytes", reason="bitsandbytes is the `quantization` extra")

held = pytest.mark.parametrize("keys", HELD.values(), ids=HELD)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoints(tmp_path_factory.mktemp("quantised"))
    for bits in (4, 8):
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        stored = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=config, device_map={"": "cpu"}
        )
        stored.save_pretrained(folder / f"stored-{bits}")
        AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / f"stored-{bits}")
    return folder


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)


@pytest.mark.parametrize("schedule", ["live", "precomputed"])
@held
def test_a_run_starts_at_its_reference_and_learns(
    tmp_path: Path, checkpoints: Path, quiet: Console, keys: dict[str, Any], schedule: str
) -> None:
    reference = {"schedule": schedule}
    if schedule == "precomputed":
        reference["cache"] = str(tmp_path / "cache")
    result = train(short_run(tmp_path, checkpoints, keys | {"reference": reference}), console=quiet)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in lines if "loss" in line)
    assert '"loss": 0.6931' in first
    assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"] <= 1e-3
    assert result.record["proof"]["moved_while_training"] == 0
    assert result.metrics["loss"] < 0.69
    assert result.record["layout"]["layout"] == "packed"


@pytest.mark.parametrize(
    "extra",
    [
        {"rl_adapter_ref_model": True},
        {"lora_model_dir": "sft", "reference": {"schedule": "live"}},
        {"reference": {"adapter": "sft"}},
        {"lora_modules_to_save": ["lm_head"], "reference": {"schedule": "live"}},
        {"gradient_checkpointing": True},
        {"bf16": True, "reference": {"schedule": "live"}},
        {"reference": {"schedule": "synced", "sync_steps": 1, "mixup_alpha": 1}},
    ],
    ids=" ".join,
)
@held
def test_every_source_is_proved(
    tmp_path: Path, checkpoints: Path, quiet: Console, keys: dict[str, Any], extra: dict[str, Any]
) -> None:
    extra = dict(extra)
    if "lora_model_dir" in extra:
        extra["lora_model_dir"] = str(checkpoints / "sft")
    another = "adapter" in extra.get("reference", {})
    if another:
        extra["reference"] = {"adapter": str(checkpoints / "sft")}
    result = train(short_run(tmp_path, checkpoints, keys | extra), console=quiet)
    proof = result.record["proof"]
    assert (proof["max_difference"] <= proof["tolerance"]) == (not another)
    assert proof["moved_while_training"] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_is_stored_quantised_is_held_as_it_is(
    tmp_path: Path, checkpoints: Path, quiet: Console, bits: int
) -> None:
    stored = {"base_model": str(checkpoints / f"stored-{bits}"), "adapter": "lora"}
    cfg = short_run(tmp_path, checkpoints, LORA | stored | {"reference": {"schedule": "live"}})
    result = train(cfg, console=quiet)
    assert is_quantised(ModelLoader(cfg, load_tokenizer(validate_config(cfg))).load()[0])
    assert result.record["proof"]["max_difference"] == 0
    with pytest.raises(ModelError, match="holds quantised weights, and merging would round them again"):
        merge_adapter(validate_config(cfg))


@held
def test_the_adapter_is_saved_and_merged_into_the_base_in_full(
    tmp_path: Path, checkpoints: Path, quiet: Console, keys: dict[str, Any]
) -> None:
    cfg = short_run(tmp_path, checkpoints, keys)
    train(cfg, console=quiet)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(validate_config(cfg)))
    base = AutoModelForCausalLM.from_pretrained(checkpoints / "base")
    moved = (merged.model.layers[0].mlp.up_proj.weight - base.model.layers[0].mlp.up_proj.weight).abs().max()
    assert not is_quantised(merged)
    assert 0 < moved < 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (HELD["8-bit"] | {"peft_use_dora": True}, "peft_use_dora: does not work on 8-bit weights on a CPU"),
        (HELD["4-bit"] | {"peft_init_lora_weights": "pissa"}, "decomposes base weights, which are quantised"),
        ({"load_in_4bit": True}, "quantised weights cannot be trained"),
        (HELD["4-bit"] | {"reinit_weights": True}, "contradicts load_in_4bit|contradicts reinit_weights"),
        (
            HELD["4-bit"] | {"lora_model_dir": "sft", "reference": {"source": "separate_model"}},
            "into quantized weights would round them again",
        ),
        (
            HELD["4-bit"] | {"reference": {"source": "separate_model", "load_in_4bit": True}},
            "reference.load_in_4bit: True cannot have an effect",
        ),
        (
            HELD["4-bit"] | {"reference": {"source": "separate_model", "offload": "disk"}},
            "reference.offload: disk cannot have an effect",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, checkpoints: Path, quiet: Console, keys: dict[str, Any], message: str
) -> None:
    if "lora_model_dir" in keys:
        keys = keys | {"lora_model_dir": str(checkpoints / "sft")}
    with pytest.raises(FiducialError, match=message):
        train(short_run(tmp_path, checkpoints, keys), console=quiet)
