"""A model whose layers wait on disk answers exactly what the whole model answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fiducial.config.load import validate_config
from fiducial.errors import ModelError, PlanError
from fiducial.model.loader import ModelLoader
from fiducial.model.offload import is_offloaded
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.reference.facts import gather_facts
from fiducial.reference.fingerprint import identify
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import plan_reference
from fiducial.reference.predicted import identify_loaded
from fiducial.train import train
from run_configs import run_config
from tiny import FAMILIES, random_groups, save_adapter, save_checkpoint

GROUPS = random_groups(4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offload")
    for family in FAMILIES:
        save_checkpoint(folder / family, family)
    save_adapter(folder / "sft", folder / "llama")
    return folder


def config(folder: Path, family: str = "llama", *, offload: str | None = "disk", **reference: Any) -> Any:
    named = {"source": "separate_model", "offload": offload} | reference
    given = {key: value for key, value in named.items() if value is not None}
    return validate_config({"base_model": str(folder / family), "rl": "dpo", "reference": given})


def load(cfg: Any) -> Any:
    return ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()[0]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_whole_model_to_the_last_bit(checkpoints: Path, family: str, layout: Any) -> None:
    whole = Scorer(load(config(checkpoints, family, offload=None)), layout=layout)
    waiting = Scorer(load(config(checkpoints, family)), layout=layout)
    assert is_offloaded(waiting.model)
    assert not is_offloaded(whole.model)
    with torch.no_grad():
        values = [scorer(scorer.pack(GROUPS)).values for scorer in (whole, waiting)]
    assert torch.equal(*values)


def test_no_weight_of_a_layer_stays_in_memory(checkpoints: Path) -> None:
    model = load(config(checkpoints))
    for name, parameter in model.named_parameters():
        assert (parameter.device.type == "meta") == (".layers." in name), name


def test_another_dtype_than_the_stored_one_is_what_is_computed_in(checkpoints: Path) -> None:
    scorers = [
        Scorer(load(config(checkpoints, dtype="bfloat16", offload=offload)), layout="packed")
        for offload in (None, "disk")
    ]
    with torch.no_grad():
        values = [scorer(scorer.pack(GROUPS)).values for scorer in scorers]
    assert torch.equal(*values)


def test_its_records_are_those_of_the_whole_model(checkpoints: Path) -> None:
    digests = []
    for offload in (None, "disk"):
        cfg = config(checkpoints, offload=offload, schedule="precomputed")
        plan = plan_reference(cfg, gather_facts(cfg))
        scorer = Scorer(load(cfg), layout="packed")
        digests.append(identify_loaded(cfg, plan, load_tokenizer(cfg), scorer).digest)
    assert (
        digests[0]
        == digests[1]
        == identify(plan, Scorer(load(config(checkpoints, offload=None)), layout="packed")).digest
    )


def test_weights_that_are_not_the_files_cannot_be_identified(checkpoints: Path) -> None:
    cfg = config(checkpoints, schedule="precomputed")
    grown = cfg.model_copy(update={"tokenizer": cfg.tokenizer.model_copy(update={"tokens": ("<a>",)})})
    plan = plan_reference(grown, gather_facts(grown))
    scorer = Scorer(load(cfg), layout="packed")
    with pytest.raises(
        ModelError, match=r"reference.offload: disk needs a reference that is loaded as it is"
    ):
        identify_loaded(grown, plan, load_tokenizer(grown), scorer)


def test_the_plan_counts_one_layer(checkpoints: Path) -> None:
    held = {}
    for offload in (None, "disk"):
        cfg = config(checkpoints, offload=offload)
        facts = gather_facts(cfg)
        memory = estimate_memory(cfg, facts, plan_reference(cfg, facts), 64)
        held[offload] = sum(part.bytes for part in memory.parts if part.name.startswith("reference"))
    weights = {name: fact.size * 4 for name, fact in facts.model.tensors.items()}
    layers = sum(size for name, size in weights.items() if ".layers." in name)
    assert held[None] == sum(weights.values())
    assert held["disk"] == sum(weights.values()) - layers // 2


def test_waiting_layers_are_in_the_cpus_memory_where_they_are_kept_there(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fiducial.reference.idle.sees_gpu", lambda: True)
    cfg = config(checkpoints, offload="cpu")
    facts = gather_facts(cfg)
    memory = estimate_memory(cfg, facts, plan_reference(cfg, facts), 64, gpu=True)
    parts = {part.name: part for part in memory.parts if part.name.startswith("reference")}
    assert parts["reference layers that wait"].on_cpu
    assert not parts["reference model (one layer at a time)"].on_cpu


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"offload": "cpu"}, "reference.offload: cpu cannot have an effect: this machine has no GPU"),
        ({"adapter": "sft"}, "cannot be merged into weights that are kept elsewhere"),
        ({"schedule": "synced", "sync_steps": 2}, "kept elsewhere until they compute, cannot move"),
        (
            {"source": "auto", "schedule": "precomputed"},
            "cannot have an effect: the reference is initial_policy",
        ),
    ],
)
def test_what_cannot_be_is_refused(checkpoints: Path, reference: dict[str, Any], message: str) -> None:
    if "adapter" in reference:
        reference = reference | {"adapter": str(checkpoints / "sft")}
    cfg = config(checkpoints, **({"offload": "disk"} | reference))
    with pytest.raises(PlanError, match=message):
        plan_reference(cfg, gather_facts(cfg))


@pytest.mark.parametrize("schedule", ["live", "precomputed"])
def test_a_run_trains_against_it_as_against_the_whole(tmp_path: Path, schedule: str) -> None:
    losses = []
    for offload in ({}, {"offload": "disk"}):
        named = {"source": "separate_model", "schedule": schedule} | offload
        if schedule == "precomputed":
            named |= {"cache": str(tmp_path / f"cache{len(losses)}")}
        result = train(
            run_config(tmp_path, rows=6, reference=named, max_steps=2), console=Console(quiet=True)
        )
        assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"]
        losses.append(result.metrics["loss"])
    assert losses[0] == losses[1]


def test_weights_that_are_converted_while_loading_cannot_stay_on_disk(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mixtral", "mixtral", num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(ModelError, match=r"converted while it is loaded.* remove `reference.offload`"):
        load(config(tmp_path, "mixtral"))
