"""A merged checkpoint computes what base and adapter compute together."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiducial.config.methods import DPOConfig
from fiducial.config.schema import (
    AdapterConfig,
    ModelConfig,
    OutputConfig,
    ReferenceConfig,
    RunConfig,
)
from fiducial.errors import ConfigError, ModelError
from fiducial.finished import FinishedRun
from fiducial.merge import merge_adapter, merge_finished
from fiducial.model.loader import ModelLoader
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import plan_reference
from fiducial.reference.predicted import predict_identity
from fiducial.run_record import RunRecord
from finishing import change_one_weight
from tiny import save_checkpoint, tiny_tokenizer

IDS = torch.arange(40).view(2, 20)


def trained_run(folder: Path, **lora: object) -> RunConfig:
    """A run whose output_dir holds an adapter with weights far from their start."""
    base = save_checkpoint(folder / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **lora)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(folder / "out")
    tokenizer = tiny_tokenizer(chat_template="{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(folder / "out")
    return RunConfig(
        model=ModelConfig(base_model=str(base)),
        adapter=AdapterConfig(kind="lora", r=4),
        method=DPOConfig(),
        output=OutputConfig(output_dir=str(folder / "out")),
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_runs_folder_alone_says_what_to_merge(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    target = merge_finished(FinishedRun(run, moved, None))
    assert target == moved / "merged"
    assert (target / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_merged_logits_equal_the_adapters(tmp_path: Path, lora: dict[str, object]) -> None:
    run = trained_run(tmp_path, **lora)

    target = merge_adapter(run)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    bare = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    merged = logits(AutoModelForCausalLM.from_pretrained(target))
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=1e-5)
    assert (merged - bare).abs().max() > 1


def test_it_is_an_ordinary_checkpoint_with_the_trained_tokenizer(tmp_path: Path) -> None:
    target = merge_adapter(trained_run(tmp_path), tmp_path / "elsewhere")

    assert target == tmp_path / "elsewhere"
    assert not list(target.glob("adapter*"))
    assert not any("lora" in name for name in load_file(target / "model.safetensors"))
    assert AutoTokenizer.from_pretrained(target).chat_template == "{{ messages[0]['content'] }}"


def test_it_is_saved_in_the_bases_precision(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")

    target = merge_adapter(run)

    assert {value.dtype for value in load_file(target / "model.safetensors").values()} == {torch.bfloat16}


def test_a_run_without_adapter_has_nothing_to_merge(tmp_path: Path) -> None:
    run = trained_run(tmp_path).model_copy(update={"adapter": None})

    with pytest.raises(ConfigError, match="nothing to merge"):
        merge_adapter(run)


def test_an_untrained_run_says_to_train_first(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    (tmp_path / "out" / "adapter_config.json").unlink()

    with pytest.raises(ModelError, match="fiducial train"):
        merge_adapter(run)


@pytest.mark.parametrize("source", ["base", "out"])
def test_it_does_not_write_over_what_it_merges(tmp_path: Path, source: str) -> None:
    run = trained_run(tmp_path)

    with pytest.raises(ConfigError, match="Name another folder"):
        merge_adapter(run, tmp_path / source)


def test_a_file_is_not_taken_for_a_folder_to_write_to(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"--output: {target} is no folder"):
            merge_adapter(run, target)


def test_a_whole_model_is_not_put_beside_an_adapter(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    with pytest.raises(ConfigError, match=r"--output: .*other holds another run's adapter_config\.json"):
        merge_adapter(run, tmp_path / "other")


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    run = trained_run(tmp_path)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(ModelError, match=r"the disk that holds .*merged is full.*name another folder"):
        merge_adapter(run)


def test_an_adapter_of_an_earlier_run_in_the_folder_is_not_merged(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    RunRecord(run, None, None, None, id="later", trained_by="earlier").write(tmp_path / "out")
    with pytest.raises(ModelError, match="the weights there are an earlier run's"):
        merge_adapter(run)


def test_stacked_layers_share_weights_and_are_not_merged(tmp_path: Path) -> None:
    run = trained_run(tmp_path, layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ModelError, match="merging it would change all of them"):
        merge_adapter(run)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_what_cannot_be_merged_is_told(tmp_path: Path) -> None:
    run = trained_run(tmp_path, lora_bias=True)  # on layers without a bias to add it to
    with pytest.raises(ModelError, match=r"the adapter in .*out cannot be merged into its base: .*lora_bias"):
        merge_adapter(run)
    reference = ReferenceConfig(adapter=str(tmp_path / "out"))
    cfg = run.model_copy(update={"adapter": None, "reference": reference})
    with pytest.raises(ModelError, match=r"reference.adapter: .*out cannot be merged into its base"):
        ModelLoader(cfg, tiny_tokenizer(), reference_model=True).load()


def test_another_base_than_was_trained_on_is_not_merged_with(tmp_path: Path) -> None:
    run = trained_run(tmp_path)
    plan = plan_reference(run, gather_facts(run))
    then = predict_identity(run, plan, tiny_tokenizer())
    assert then is not None
    RunRecord(run, None, then.as_dict(), None).write(tmp_path / "out")
    assert merge_adapter(run)
    change_one_weight(tmp_path / "base" / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 of 21 weights differ .*q_proj"):
        merge_adapter(run)


@pytest.mark.parametrize("start", ["adapter", "reference"])
def test_what_the_run_began_with_beside_its_base_is_not_needed(tmp_path: Path, start: str) -> None:
    run = trained_run(tmp_path)
    gone = str(tmp_path / "gone")
    reference = ReferenceConfig(adapter=gone) if start == "reference" else ReferenceConfig()
    adapter = AdapterConfig(kind="lora", path=gone) if start == "adapter" else run.adapter
    run = run.model_copy(update={"adapter": adapter, "reference": reference})
    RunRecord(run, None, {"weights": "of the base and an adapter"}, None).write(tmp_path / "out")
    assert (merge_adapter(run) / "model.safetensors").is_file()
