"""Plans whose reference is another policy: an adapter, a checkpoint, a server."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fiducial.config.load import validate_config
from fiducial.config.methods import TDPO1Config
from fiducial.errors import ModelError, PlanError
from fiducial.reference.alternatives import alternatives
from fiducial.reference.checkpoint import TensorFact
from fiducial.reference.describe import plan_run
from fiducial.reference.facts import gather_facts
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import ReferencePlan, Schedule, Source, plan_live_reference, plan_reference
from planning import assert_names_key_and_remedy, decision, facts_of, run
from tiny import save_adapter, save_checkpoint

ADAPTER = {"adapter": "other-sft"}
SERVED = {"endpoint": "http://localhost/v1", "model": "name"}
PRE, LIVE = Schedule.PRECOMPUTED, Schedule.LIVE


def plan(reference: dict[str, Any], *, tied: bool = False, **settings: Any) -> ReferencePlan:
    cfg = run(reference=reference, **settings)
    return plan_reference(cfg, facts_of(cfg, tied=tied))


def refused(reference: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(PlanError) as error:
        plan(reference, **settings)
    assert_names_key_and_remedy(str(error.value))
    return str(error.value)


@pytest.mark.parametrize(
    ("adapter", "source"),
    [
        (None, Source.SEPARATE_MODEL),
        ({}, Source.FROZEN_ADAPTER),
        ({"path": "sft"}, Source.FROZEN_ADAPTER),
        ({"use_dora": True}, Source.FROZEN_ADAPTER),
        ({"init_lora_weights": False}, Source.FROZEN_ADAPTER),
        ({"init_lora_weights": "pissa"}, Source.SEPARATE_MODEL),
        ({"init_lora_weights": "olora"}, Source.SEPARATE_MODEL),
        ({"bias": "all"}, Source.SEPARATE_MODEL),
        ({"modules_to_save": ("lm_head",)}, Source.SEPARATE_MODEL),
        ({"trainable_token_indices": (1,)}, Source.SEPARATE_MODEL),
        ({"target_parameters": ("w",)}, Source.SEPARATE_MODEL),
    ],
)
def test_an_adapter_on_the_policys_base_is_held_beside_its_own_where_that_is_exact(
    adapter: dict[str, Any] | None, source: Source
) -> None:
    result = plan(ADAPTER, adapter=adapter)
    assert decision(result) == (source, PRE)
    assert not result.equals_starting_policy
    assert result.checkpoint is not None
    assert (result.checkpoint.path, result.checkpoint.adapter) == ("base", "other-sft")
    assert "base with the adapter other-sft" in result.why
    assert decision(plan(ADAPTER | {"schedule": "live"}, adapter=adapter)) == (source, LIVE)


@pytest.mark.parametrize("whose", ["adapter", "reference_adapter"])
@pytest.mark.parametrize(
    ("more", "source"),
    [
        ({}, Source.FROZEN_ADAPTER),
        ({"modules_to_save": ("lm_head",)}, Source.SEPARATE_MODEL),
        ({"target_parameters": ("w",)}, Source.SEPARATE_MODEL),
        ({"layer_replication": ((0, 2), (0, 2))}, None),
        ({"bias": "all"}, Source.SEPARATE_MODEL),
        ({"init_lora_weights": "pissa"}, Source.SEPARATE_MODEL),
        ({"tensors": {"base_model.model.lm_head.weight": TensorFact("F32", (4, 4))}}, Source.SEPARATE_MODEL),
    ],
    ids=str,
)
def test_what_an_adapter_on_disk_holds_decides_whether_two_stand_side_by_side(
    whose: str, more: dict[str, Any], source: Source | None
) -> None:
    cfg = run(reference=ADAPTER, adapter={"path": "sft"})
    facts = facts_of(cfg)
    facts = replace(facts, **{whose: replace(getattr(facts, whose), **more)})
    if source is None and whose == "reference_adapter":  # such a one cannot be merged either
        with pytest.raises(PlanError, match="stacks layers"):
            plan_reference(cfg, facts)
    else:
        assert plan_reference(cfg, facts).source is (source or Source.SEPARATE_MODEL)


def test_stacked_layers_are_no_place_for_the_references_adapter() -> None:
    assert plan(ADAPTER, adapter={"layer_replication": ((0, 2),)}).source is Source.SEPARATE_MODEL


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "loftq"])
def test_a_named_adapter_that_rewrites_the_base_is_not_put_under_the_policy(
    tmp_path: Path, init: str
) -> None:
    base = save_checkpoint(tmp_path / "base")
    sft = save_adapter(tmp_path / "sft", base)
    config = sft / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    keys = {"base_model": str(base), "rl": "dpo", "adapter": "lora", "reference": {"adapter": str(sft)}}
    cfg = validate_config(keys)
    assert plan_reference(cfg, gather_facts(cfg)).source is Source.SEPARATE_MODEL
    asked = validate_config(keys | {"reference": {"adapter": str(sft), "source": "frozen_adapter"}})
    with pytest.raises(
        PlanError, match=rf"the reference's adapter \({init}\) rewrites the base weights below"
    ):
        plan_reference(asked, gather_facts(asked))


@pytest.mark.parametrize("key", ["lora_model_dir", "reference.adapter"])
def test_an_adapter_whose_base_is_split_otherwise_each_time_is_refused(tmp_path: Path, key: str) -> None:
    base = save_checkpoint(tmp_path / "base")
    sft = str(save_adapter(tmp_path / "sft", base, init_lora_weights="pissa_niter_4"))
    named: dict[str, Any] = {"reference": {"adapter": sft}} if "." in key else {key: sft}
    cfg = validate_config({"base_model": str(base), "rl": "dpo", "adapter": "lora"} | named)
    with pytest.raises(ModelError, match=rf"{key}: .*pissa_niter_4, which splits .*Name the merged model"):
        gather_facts(cfg)
    begun = run(adapter={"init_lora_weights": "pissa_niter_4"})
    assert any(
        "Use what fiducial merge makes" in note for note in plan_reference(begun, facts_of(begun)).notes
    )
    plain = run(adapter={"init_lora_weights": "pissa"})
    assert not any("fiducial merge" in note for note in plan_reference(plain, facts_of(plain)).notes)


def test_the_adapter_the_run_resumes_is_the_start() -> None:
    result = plan({"adapter": "sft"}, adapter={"path": "sft"})
    assert result.equals_starting_policy
    assert result == plan({}, adapter={"path": "sft"})


def test_quantised_bases_share_their_weights_but_are_not_merged_into() -> None:
    quantised: dict[str, Any] = {"adapter": {"kind": "qlora"}, "load_in_4bit": True}
    assert plan(ADAPTER, **quantised).source is Source.FROZEN_ADAPTER
    message = refused(ADAPTER | {"source": "separate_model"}, **quantised)
    assert "merging other-sft into quantized weights would round them again" in message
    assert "which picks frozen_adapter here" in message


def test_what_is_stored_in_few_bits_cannot_be_merged_into() -> None:
    cfg = run(reference=ADAPTER | {"model": "other"})
    facts = facts_of(cfg)
    assert facts.reference is not None
    assert plan_reference(cfg, facts).source is Source.SEPARATE_MODEL
    with pytest.raises(PlanError, match="merging other-sft into quantized weights"):
        plan_reference(cfg, replace(facts, reference=replace(facts.reference, quantized=True)))


def test_what_is_kept_elsewhere_cannot_be_merged_into() -> None:
    assert "cannot be merged into weights that are kept elsewhere" in refused(ADAPTER | {"offload": "disk"})


def test_what_is_held_in_few_bits_cannot_be_merged_into() -> None:
    message = refused(ADAPTER | {"load_in_8bit": True})
    assert "merging other-sft into quantized weights" in message
    assert "Write reference.model: with that adapter merged into its base" in message


@pytest.mark.parametrize("key", ["load_in_8bit", "load_in_4bit", "offload"])
def test_how_a_second_model_is_held_is_idle_without_one(key: str) -> None:
    value: Any = "disk" if key == "offload" else True
    assert f"reference.{key}: {value} cannot have an effect" in refused({key: value})
    assert f"reference.{key}: {value} cannot have an effect" in refused(ADAPTER | {key: value}, adapter={})
    drawn = refused({"source": "separate_model", key: value}, reinit_weights=True)
    assert f"reference.{key}: {value} cannot have an effect with reinit_weights" in drawn


@pytest.mark.parametrize("gpu", [True, False])
def test_a_reference_on_the_cpu_of_a_machine_without_a_gpu_is_noted(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("reasons", "precision"):
        monkeypatch.setattr(f"fiducial.reference.{module}.sees_gpu", lambda: gpu)
    result = plan({"source": "separate_model", "device": "cpu"})
    assert any("reference.device: cpu is so already" in note for note in result.notes) == (not gpu)
    assert result.approximate == ("computed on the CPU" if gpu else None)
    assert not plan({"source": "separate_model"}).notes


def test_what_is_held_otherwise_is_a_stated_approximation() -> None:
    separate = {"source": "separate_model"}
    assert plan(separate).approximate is None
    assert plan(separate | {"dtype": "float32"}).approximate is None
    assert plan(separate | {"offload": "disk"}).approximate is None
    for held, how in (
        ({"load_in_8bit": True}, "held in 8 bits"),
        ({"load_in_4bit": True, "dtype": "bfloat16"}, "held in 4 bits and held in bfloat16"),
        ({"dtype": "bfloat16"}, "held in bfloat16"),
    ):
        result = plan(separate | held)
        assert result.approximate == how
        assert result.equals_starting_policy
        assert any(how in note and "measured before step 1" in note for note in result.notes)


def test_a_policy_in_four_bits_has_an_exact_second_model_in_four_bits() -> None:
    quantised: dict[str, Any] = {"adapter": {"kind": "qlora"}, "load_in_4bit": True}
    assert plan({"source": "separate_model"}, **quantised).approximate is None
    assert (
        plan({"source": "separate_model", "load_in_8bit": True}, **quantised).approximate == "held in 8 bits"
    )


def test_another_adapter_than_lora_is_refused() -> None:
    cfg = run(reference=ADAPTER, adapter={})
    facts = facts_of(cfg)
    assert facts.reference_adapter is not None
    object.__setattr__(facts.reference_adapter, "peft_type", "PREFIX_TUNING")
    with pytest.raises(PlanError, match=r"reference.adapter: other-sft holds a PREFIX_TUNING adapter"):
        plan_reference(cfg, facts)


def test_a_server_is_another_policy_whatever_it_calls_its_model() -> None:
    result = plan(SERVED | {"model": "base"})
    assert decision(result) == (Source.ENDPOINT, PRE)
    assert not result.equals_starting_policy


def test_a_server_is_asked_once() -> None:
    result = plan(SERVED)
    assert decision(result) == (Source.ENDPOINT, PRE)
    assert not result.equals_starting_policy
    assert "name, served by http://localhost/v1" in result.why
    assert "asked for the log-probs of the data once" in result.why
    cfg = run(reference=SERVED)
    assert plan_live_reference(cfg, facts_of(cfg)).schedule is PRE
    assert "asked once, before step 1, and not at every step" in refused(SERVED | {"schedule": "live"})
    assert "Write streaming: false" in refused(SERVED, streaming=True)
    assert "the reference's probability of every token" in refused(
        SERVED | {"schedule": "precomputed"}, method=TDPO1Config()
    )
    refused(SERVED | {"schedule": "synced"})
    assert "the reference is name behind http://localhost/v1" in refused(
        SERVED | {"source": "initial_policy"}
    )
    assert "no server was named" in refused({"source": "endpoint"})


def test_a_server_costs_no_memory_and_no_time_here() -> None:
    cfg = run(reference=SERVED)
    facts = facts_of(cfg)
    result = plan_reference(cfg, facts)
    memory = estimate_memory(cfg, facts, result, 64)
    assert not [part for part in memory.parts if "reference" in part.name or part.when == "scoring"]
    assert "reference: no weights here; a server holds them" in memory.held
    assert [each.relative_time for each in alternatives(cfg, facts, result, 64)] == [1.0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named")
    save_checkpoint(folder / "base")
    save_checkpoint(folder / "narrow", hidden_size=16)
    save_checkpoint(folder / "other", seed=1)
    for name in ("base", "narrow", "other"):
        save_adapter(folder / f"sft-{name}", folder / name)
    shutil.copytree(folder / "base", folder / "moved")
    return folder


def configure(folder: Path, adapter: str, *, base: str = "base", model: str | None = None) -> Any:
    named = {"adapter": str(folder / adapter)} | ({"model": str(folder / model)} if model else {})
    return validate_config(
        {"base_model": str(folder / base), "rl": "dpo", "adapter": "lora", "reference": named}
    )


def test_an_adapter_belongs_to_its_base(checkpoints: Path) -> None:
    gather_facts(configure(checkpoints, "sft-base"))
    gather_facts(configure(checkpoints, "sft-other", model="other"))
    with pytest.raises(
        ModelError, match=r"reference.adapter: .*sft-narrow does not fit .* Set reference.model to"
    ):
        gather_facts(configure(checkpoints, "sft-narrow"))
    with pytest.raises(ModelError, match=r"sft-base does not fit"):
        gather_facts(configure(checkpoints, "sft-base", model="narrow"))


def test_a_base_of_the_same_shape_is_told_apart_by_its_weights(checkpoints: Path) -> None:
    with pytest.raises(
        ModelError, match=r"reference.adapter: .*sft-other was trained on .* another base: .* differs"
    ):
        gather_facts(configure(checkpoints, "sft-other"))
    with pytest.raises(ModelError, match="another base"):
        gather_facts(configure(checkpoints, "sft-base", model="other"))
    assert gather_facts(configure(checkpoints, "sft-base", base="moved")).notes  # the same weights elsewhere


def test_one_other_weight_is_enough(checkpoints: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(checkpoints / "base", tmp_path / "tuned"))
    weights = load_file(tuned / "model.safetensors")
    save_file(
        {name: value * 1.001 for name, value in weights.items()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    cfg = configure(checkpoints, "sft-base", model=None)
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"base_model": str(tuned)})})
    with pytest.raises(ModelError, match="another base"):
        gather_facts(cfg)


def test_a_base_that_is_not_here_is_only_noted(checkpoints: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(checkpoints / "sft-base", tmp_path / "sft"))
    config = (moved / "adapter_config.json").read_text(encoding="utf-8")
    (moved / "adapter_config.json").write_text(config.replace(str(checkpoints / "base"), "someone/base"))
    notes = gather_facts(configure(checkpoints, str(moved))).notes
    assert any("reference.adapter: the adapter was trained on someone/base" in note for note in notes)


def test_the_report_tells_all_of_it(checkpoints: Path) -> None:
    report = plan_run(configure(checkpoints, "sft-base"))
    assert report["reference"]["checkpoint"]["adapter"] == str(checkpoints / "sft-base")
    assert report["reference"]["equals_starting_policy"] is False
    parts = {part["name"]: part for part in report["memory"]["parts"]}
    held = sum(
        value.numel() for value in load_file(checkpoints / "sft-base" / "adapter_model.safetensors").values()
    )
    assert parts["reference adapter"]["bytes"] == 4 * held
    assert parts["reference adapter"]["when"] == "scoring"
    sources = {(each["source"], each["schedule"]) for each in report["alternatives"]}
    assert sources == {
        (source, schedule)
        for source in ("frozen_adapter", "separate_model")
        for schedule in ("live", "precomputed")
    }
