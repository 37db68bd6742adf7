"""The model card says what was trained, on what, against which reference, and how it went."""

from pathlib import Path

import pytest
import yaml

from fiducial.config.methods import DPOConfig, KTOConfig, MethodConfig, ORPOConfig, TPOConfig
from fiducial.config.schema import AdapterConfig, DataConfig, DatasetConfig, ModelConfig, RunConfig
from fiducial.model_card import write_model_card
from fiducial.reference.plan import Checkpoint, ReferencePlan, Schedule, Source

DATASETS = (
    DatasetConfig(path="owner/preferences", split="train", revision="v2"),
    DatasetConfig(path="data/pairs.jsonl"),
    DatasetConfig(path="./folder/pairs"),
)
RUN = RunConfig(
    model=ModelConfig(base_model="owner/base", revision="abc123"),
    method=DPOConfig(beta=0.25),
    data=DataConfig(datasets=DATASETS, sequence_len=512),
)
PLAN = ReferencePlan(
    Source.INITIAL_POLICY, Schedule.PRECOMPUTED, Checkpoint("owner/base", "abc123"), "Scored before step 1."
)
METRICS = {"loss": 0.4213, "eval_rewards/accuracies": 0.96875, "eval_rewards/margins": 1.25, "epoch": 2.0}


def front_matter(card: Path) -> dict[str, object]:
    _, front, _ = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_names_base_library_and_hub_datasets(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, RUN, PLAN, METRICS)

    assert card == tmp_path / "README.md"
    assert front_matter(card) == {
        "base_model": "owner/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fiducial", "preference-alignment", "dpo"],
        "datasets": ["owner/preferences"],
    }


def test_an_adapter_is_loaded_with_peft(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"adapter": AdapterConfig(kind="lora", r=4, alpha=8)})

    card = write_model_card(tmp_path, run, PLAN, METRICS)

    assert front_matter(card)["library_name"] == "peft"
    assert "lora" in front_matter(card)["tags"]
    assert "lora (rank 4, alpha 8) adapter" in card.read_text(encoding="utf-8")


def test_a_resumed_adapter_is_named(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"adapter": AdapterConfig(kind="lora", path="owner/sft-adapter")})

    card = write_model_card(tmp_path, run, PLAN, METRICS)

    assert "continued from `owner/sft-adapter`" in card.read_text(encoding="utf-8")


def test_body_tells_data_reference_proof_and_metrics(tmp_path: Path) -> None:
    proof = "Before step 1 policy and reference differed by at most 0."

    text = write_model_card(tmp_path, RUN, PLAN, METRICS, proof=proof).read_text(encoding="utf-8")

    assert "| method | dpo (beta 0.25, label_smoothing 0) |" in text
    assert "- `owner/preferences` at `v2`, split `train`" in text
    assert "**initial_policy**, precomputed. Scored before step 1." in text
    assert "Its weights: `owner/base` at `abc123`." in text
    assert proof in text
    assert "| reward accuracy | 0.9688 |" in text.partition("## On held-out pairs")[2]
    assert "| loss | 0.4213 |" in text.partition("## At the end of training")[2]
    assert "epoch |" not in text


@pytest.mark.parametrize(
    ("method", "unit"), [(DPOConfig(), "pairs"), (KTOConfig(), "completions"), (TPOConfig(), "lists")]
)
def test_it_counts_what_the_method_learns_from(tmp_path: Path, method: MethodConfig, unit: str) -> None:
    run = RUN.model_copy(update={"method": method})

    text = write_model_card(tmp_path, run, PLAN, METRICS).read_text(encoding="utf-8")

    assert f"| {unit} a step and process |" in text
    assert f"## On held-out {unit}\n" in text


def test_without_reference_or_evaluation_those_parts_are_absent(tmp_path: Path) -> None:
    run = RUN.model_copy(update={"method": ORPOConfig()})
    plan = ReferencePlan(Source.NONE, None, None, "ORPO compares with no reference.")

    text = write_model_card(tmp_path, run, plan, {}).read_text(encoding="utf-8")

    assert "**none**. ORPO compares with no reference." in text
    assert "Its weights" not in text
    assert "held-out" not in text


def test_no_path_of_the_machine_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    text = write_model_card(tmp_path, RUN, PLAN, METRICS).read_text(encoding="utf-8")

    assert str(tmp_path) not in text
    assert str(Path.home()) not in text
