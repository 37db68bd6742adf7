"""The page that `fiducial plan` prints, and that it takes no torch and under a second to make."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rich.console import Console

from fiducial.config.methods import DPOConfig, KTOConfig, MethodConfig, ORPOConfig, PlackettLuceConfig
from fiducial.config.schema import (
    AdapterConfig,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizationConfig,
    ReferenceConfig,
    RunConfig,
    TokenizerConfig,
)
from fiducial.errors import ConfigError
from fiducial.reference.describe import plan_run, render_plan
from tiny import save_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 100)
    return file


def run(base: Path, pairs: Path | str, **settings: Any) -> RunConfig:
    data = DataConfig(datasets=(DatasetConfig(path=str(pairs)),), val_set_size=0.1, sequence_len=128)
    return RunConfig(
        **({"model": ModelConfig(base_model=str(base)), "method": DPOConfig(), "data": data} | settings)
    )


def page(report: dict[str, Any], width: int = 80) -> str:
    output = io.StringIO()
    render_plan(report, Console(width=width, file=output))
    return output.getvalue()


LISTS = [
    {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1.0, 2.0, 3.0]},
    {"prompt": "a", "completions": ["b", "c", "d", "e", "e"], "scores": [1.0, 2.0, 3.0, 0.0, 0.0]},
    {"prompt": "a", "completions": ["b"], "scores": [1.0]},
]


@pytest.mark.parametrize(
    ("name", "completions"),
    [("lists.jsonl", 4), ("lists.json", 4), ("lists.parquet", 4), ("saved", 4), ("pairs", 2), ("hub", None)],
)
def test_lists_are_counted_as_long_as_the_first_rows_have_them(
    base: Path, pairs: Path, tmp_path: Path, name: str, completions: int | None
) -> None:
    file, rows = tmp_path / name, Dataset.from_list(LISTS)
    match name:
        case "lists.jsonl":
            file.write_text("\n".join(map(json.dumps, LISTS)))
        case "lists.json":
            file.write_text(json.dumps(LISTS))
        case "lists.parquet":
            rows.to_parquet(file)
        case "saved":
            rows.save_to_disk(file)
    place = {"pairs": pairs, "hub": "someone/lists"}.get(name, file)
    optimization = OptimizationConfig(micro_batch_size=1, gradient_accumulation_steps=1)
    plan = plan_run(run(base, place, method=PlackettLuceConfig(), optimization=optimization))
    of_pairs = plan_run(run(base, pairs, optimization=optimization))
    assert activations(plan) / activations(of_pairs) == pytest.approx((completions or 2) / 2, rel=0.05)
    said = f"Counted with {completions} completions a list, the most in the data's first rows."
    if completions is None:
        said = "Counted with 2 completions a list: how many there are is known when the data is loaded."
    assert plan["memory"]["assumes"] == said
    assert " ".join(said.split()) in " ".join(page(plan).split())
    plan["memory"]["caveat"] = "And one thing more."
    assert " ".join(said.split()) + " And one thing more." in " ".join(page(plan).split())
    assert of_pairs["memory"]["assumes"] is None


def activations(report: dict[str, Any]) -> int:
    (size,) = (part["bytes"] for part in report["memory"]["parts"] if "a training pass" in part["name"])
    return int(size)


def test_the_report_holds_the_decision_and_its_numbers(base: Path, pairs: Path) -> None:
    optimization = OptimizationConfig(micro_batch_size=2, gradient_accumulation_steps=8, num_epochs=2)
    report = plan_run(run(base, pairs, optimization=optimization))
    assert report["reference"]["source"] == "initial_policy"
    assert report["reference"]["schedule"] == "precomputed"
    assert report["reference"]["checkpoint"]["path"] == str(base)
    assert report["method"]["hyperparameters"] == DPOConfig().hyperparameters
    assert (report["data"]["rows"], report["data"]["held_out"]) == (100, 10)
    assert report["batch"] == {
        "unit": "pair",
        "groups_per_step": 16,
        "processes": 1,
        "steps_per_epoch": 6,
        "epochs": 2,
        "steps": 12,
    }
    parts = report["memory"]["parts"]
    training = sum(part["bytes"] for part in parts if part["when"] in {"throughout", "training"})
    assert report["memory"]["training_bytes"] == training
    assert report["memory"]["peak_bytes"] >= training


@pytest.mark.parametrize(
    ("method", "steps", "words"),
    [
        (KTOConfig(), 23, ("8 completions per optimizer step", "taken apart: 200 completions of all rows")),
        (DPOConfig(), 12, ("8 pairs per optimizer step",)),
        (PlackettLuceConfig(), 12, ("8 lists per optimizer step",)),
    ],
    ids=lambda value: value.title if isinstance(value, MethodConfig) else None,
)
def test_a_step_is_counted_in_what_the_method_learns_from(
    base: Path, pairs: Path, method: MethodConfig, steps: int, words: tuple[str, ...]
) -> None:
    report = plan_run(run(base, pairs, method=method, optimization=OptimizationConfig(micro_batch_size=8)))

    assert report["batch"]["steps_per_epoch"] == steps
    assert all(each in page(report) for each in words)
    assert ("taken apart" in page(report)) == (not method.paired)


def test_a_template_that_is_not_there_is_told_by_the_plan(base: Path, pairs: Path) -> None:
    with pytest.raises(ConfigError, match="'gone' is neither a template's text nor a file"):
        plan_run(run(base, pairs, tokenizer=TokenizerConfig(chat_template_jinja="gone")))


def test_the_report_is_json(base: Path, pairs: Path) -> None:
    for adapter in (None, AdapterConfig(kind="lora")):
        report = plan_run(run(base, pairs, adapter=adapter))
        assert json.loads(json.dumps(report)) == report


def test_a_fixed_budget_is_kept_and_an_auto_one_is_bounded(base: Path, pairs: Path) -> None:
    fixed = plan_run(run(base, pairs, optimization=OptimizationConfig(micro_batch_tokens=777)))["memory"]
    assert (fixed["token_budget"], fixed["token_budget_is_auto"]) == (777, False)
    auto = plan_run(run(base, pairs))["memory"]
    assert auto["token_budget_is_auto"]
    assert 2 * 128 <= auto["token_budget"] <= 16_384


def test_the_page_says_what_why_and_how_much(base: Path, pairs: Path) -> None:
    report = plan_run(run(base, pairs, adapter=AdapterConfig(kind="lora")))
    text = " ".join(page(report).replace("│", " ").split())
    for part in (
        "Reference: adapter_off, precomputed",
        report["reference"]["why"],
        "Policy: 36 k weights once, in float32, and an adapter of 1.79 k; 1.79 k are trained.",
        "Reference: no weights of its own.",
        "dpo (beta 0.1, label_smoothing 0.0)",
        "100 rows",
        "about 90 steps per epoch",
        "optimizer state (adamw_torch_fused)",
        "peak",
    ):
        assert part in text


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": ORPOConfig()},
        {"method": None},
        {"data": None},
        {"adapter": AdapterConfig(kind="lora", init_lora_weights="pissa")},
        {"reference": ReferenceConfig(source="separate_model", dtype="bfloat16", device="cpu")},
    ],
    ids=str,
)
def test_the_page_fits_its_width(settings: dict[str, Any], width: int, base: Path, pairs: Path) -> None:
    text = page(plan_run(run(base, pairs, **settings)), width)
    assert max(len(line) for line in text.splitlines()) <= width


def test_notes_and_uncounted_data_are_shown(base: Path, pairs: Path) -> None:
    settings = {"adapter": AdapterConfig(kind="lora", init_lora_weights="pissa")}
    report = plan_run(run(base, "team/pairs[bold]", **settings))
    assert report["batch"]["steps_per_epoch"] is None
    text = page(report, 100)
    assert "team/pairs[bold]: counted when loaded" in text  # brackets are text, not markup
    assert "./nowhere.jsonl: not there" in page(plan_run(run(base, "./nowhere.jsonl")), 100)
    assert "Note: Handed to a trainer that only switches adapters off" in text


def test_a_type_that_is_none_is_told_without_any_data(base: Path) -> None:
    data = DataConfig(datasets=(DatasetConfig(path="team/pairs", type="chatml.intell"),))
    with pytest.raises(
        ConfigError, match=r"datasets\.0\.type: 'chatml.intell' .*Did you mean 'chatml.intel'"
    ):
        plan_run(run(base, "unused", data=data))


def test_planning_imports_no_torch(base: Path, pairs: Path) -> None:
    program = f"""
import sys
from fiducial.config.methods import DPOConfig
from fiducial.config.schema import DataConfig, DatasetConfig, ModelConfig, RunConfig
import fiducial.reference.plan, fiducial.reference.facts, fiducial.reference.memory
from fiducial.reference.describe import plan_run, render_plan
from rich.console import Console
data = DataConfig(datasets=(DatasetConfig(path={str(pairs)!r}),))
cfg = RunConfig(model=ModelConfig(base_model={str(base)!r}), method=DPOConfig(), data=data)
render_plan(plan_run(cfg), Console())
heavy = {{"torch", "transformers", "peft", "datasets", "numpy", "huggingface_hub"}} & set(sys.modules)
sys.exit(f"imported {{sorted(heavy)}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_hub_client_brings_no_torch() -> None:
    program = """
import sys
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
