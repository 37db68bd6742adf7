import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model.loader import ModelLoader, resolve_precision
from fiducial.model.tokenizer import load_tokenizer
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import plan_reference
from tiny import save_checkpoint, tiny_model


def run(base: Path, sections: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    return RunConfig.model_validate({"model": {"base_model": str(base), **model}, **(sections or {})})


def load(cfg: RunConfig, *, reference_model: bool = False) -> Any:
    return ModelLoader(cfg, load_tokenizer(cfg), reference_model=reference_model).load()[0]


def assert_equal_weights(first: PreTrainedModel, second: PreTrainedModel) -> None:
    theirs = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("loader") / "base")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_the_policy_is_the_checkpoint(base: Path) -> None:
    policy = load(run(base))
    assert policy.dtype == torch.float32
    assert_equal_weights(policy, tiny_model())


def test_a_mapping_is_validated_and_means_the_same(base: Path) -> None:
    tokenizer = load_tokenizer(run(base))
    policy, peft_config = ModelLoader({"base_model": str(base), "rl": "dpo"}, tokenizer).load()
    assert peft_config is None
    assert_equal_weights(policy, tiny_model())


@pytest.mark.parametrize("spelled", ["{0}/", "{0}/../base"])
def test_the_starting_checkpoint_is_the_same_one_however_it_is_spelled(base: Path, spelled: str) -> None:
    settings = {"base_model": str(base), "rl": "dpo", "model_config": {"rms_norm_eps": 0.1}}
    settings["reference"] = {"model": spelled.format(base), "source": "separate_model", "schedule": "live"}
    cfg = validate_config(settings)
    plan = plan_reference(cfg, gather_facts(cfg))
    assert plan.equals_starting_policy
    assert load(cfg, reference_model=True).config.rms_norm_eps == load(cfg).config.rms_norm_eps == 0.1


def test_the_reference_is_equal_frozen_and_silent(base: Path) -> None:
    reference = load(run(base), reference_model=True)
    assert not reference.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert_equal_weights(reference, load(run(base)))


def test_the_reference_may_be_another_checkpoint_in_another_dtype(base: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", seed=1)
    cfg = run(base, {"reference": {"model": str(other), "dtype": "bfloat16"}})
    reference = load(cfg, reference_model=True)
    assert reference.dtype == torch.bfloat16
    assert_equal_weights(reference, tiny_model(seed=1).bfloat16())


def test_what_is_drawn_is_drawn_once(base: Path) -> None:
    cfg = run(base, {"tokenizer": {"tokens": [f"<{n}>" for n in range(70)]}})
    torch.manual_seed(1)
    policy = load(cfg)
    torch.manual_seed(2)
    reference = load(cfg, reference_model=True)
    assert policy.get_input_embeddings().num_embeddings == 261 + 70
    assert_equal_weights(policy, reference)


def test_the_seed_draws_the_new_rows_and_spares_the_global_state(base: Path) -> None:
    sections = {"tokenizer": {"tokens": [f"<{n}>" for n in range(70)], "mean_resizing_embeddings": False}}
    state = torch.get_rng_state()
    first = load(run(base, sections))
    assert torch.equal(torch.get_rng_state(), state)
    second = load(run(base, sections | {"optimization": {"seed": 7}}))
    rows = [model.get_input_embeddings().weight for model in (first, second)]
    assert torch.equal(rows[0][:320], rows[1][:320])
    assert not torch.equal(rows[0][320:], rows[1][320:])


@pytest.mark.parametrize(("tokens", "to_32", "rows"), [(0, False, 320), (60, False, 321), (60, True, 352)])
def test_embeddings_grow_only_when_they_must(base: Path, tokens: int, to_32: bool, rows: int) -> None:
    names = [f"<{n}>" for n in range(tokens)]
    policy = load(run(base, {"tokenizer": {"tokens": names, "resize_embeddings_to_32x": to_32}}))
    assert policy.get_input_embeddings().num_embeddings == rows
    assert policy.get_output_embeddings().out_features == rows


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    policy = load(run(tmp_path, {"tokenizer": {"tokens": [f"<{n}>" for n in range(70)]}}))
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def test_reinitialised_weights_are_the_same_in_both(base: Path) -> None:
    policy = load(run(base, reinit_weights=True))
    reference = load(run(base, reinit_weights=True), reference_model=True)
    assert_equal_weights(policy, reference)
    assert not reference.training
    assert not torch.equal(policy.lm_head.weight, tiny_model().lm_head.weight)


def test_dropout_is_off(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    policy = load(run(tmp_path)).train()
    ids = torch.arange(9)[None]
    assert policy.config.attn_pdrop == 0.0
    assert torch.equal(policy(ids).logits, policy(ids).logits)


def test_noise_is_off(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "mixtral", "mixtral", num_key_value_heads=2, router_jitter_noise=0.1)
    policy = load(run(tmp_path / "mixtral")).train()
    ids = torch.arange(9)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    save_checkpoint(tmp_path / "phimoe", "phimoe", num_key_value_heads=2, input_jitter_noise=0.1)
    config = load(run(tmp_path / "phimoe")).config
    assert (config.input_jitter_noise, config.router_jitter_noise) == (0, 0.01), "the second is no noise"


def test_overrides_reach_the_config_and_unknown_ones_are_named(base: Path) -> None:
    assert load(run(base, config_overrides={"rms_norm_eps": 0.5})).config.rms_norm_eps == 0.5
    with pytest.raises(ModelError, match=r"model_config: rms_norm_epz: .*no such field"):
        load(run(base, config_overrides={"rms_norm_epz": 0.5}))


def test_overrides_that_could_not_be_saved_are_refused_before_training(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "qwen2", "qwen2")  # its config lists the type of each layer
    with pytest.raises(ModelError, match=r"model_config: .*'num_hidden_layers': 1.*`layer_types` \(2\)"):
        load(run(base, config_overrides={"num_hidden_layers": 1}))


def test_rotary_settings_without_their_base_are_refused(base: Path) -> None:
    ropes = {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(ModelError, match="have no rope_theta"):
        load(run(base, config_overrides={"rope_parameters": ropes}))
    load(run(base, config_overrides={"rope_parameters": ropes | {"rope_theta": 10000.0}}))


def test_router_logits_that_no_loss_reads_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral", num_key_value_heads=2)
    with pytest.raises(ModelError, match="output_router_logits: nothing is done with them"):
        load(run(tmp_path, config_overrides={"output_router_logits": True}))
    load(run(tmp_path, config_overrides={"output_router_logits": False}))


def test_unfrozen_parameters_freeze_the_rest(base: Path) -> None:
    policy = load(run(base, unfrozen_parameters=(r"model\.layers\.1\.", "lm_head")))
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name in dict(policy.named_parameters()) if "layers.1." in name or "head" in name
    }


@pytest.mark.parametrize("pattern", ["layers", "model.layrs", "("])
def test_a_pattern_that_matches_nothing_is_an_error(base: Path, pattern: str) -> None:
    with pytest.raises(ModelError, match="unfrozen_parameters"):
        load(run(base, unfrozen_parameters=("lm_head", pattern)))


def test_gradient_checkpointing_is_not_reentrant(base: Path) -> None:
    policy = load(run(base, gradient_checkpointing=True))
    assert policy.is_gradient_checkpointing
    assert policy.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is False


def test_a_model_that_cannot_recompute_its_layers_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "ctrl")

    with pytest.raises(ModelError, match="gradient_checkpointing: CTRLLMHeadModel cannot"):
        load(run(tmp_path, gradient_checkpointing=True))


def damage_truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000])


def damage_drop_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_pickle(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def damage_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["q_proj"]}
        )
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "damaged"),
        (damage_drop_head, r"lacks 1 weights.*lm_head\.weight"),
        (damage_shape, r"model\.norm\.weight is \(5,\) in the weights and \(32,\) by config"),
        (damage_pickle, "allow_pickle_weights: true"),
        (damage_kind, r"no causal language model \(T5Config\)"),
        (damage_config, "cannot be loaded"),
        (damage_adapter, "adapter"),
    ],
)
def test_a_bad_checkpoint_is_refused_with_its_reason(copy: Path, damage: Any, message: str) -> None:
    cfg = run(copy)
    tokenizer = load_tokenizer(cfg)
    damage(copy)
    with pytest.raises(ModelError, match=message):
        ModelLoader(cfg, tokenizer).load()


def test_pickle_opens_when_asked(copy: Path) -> None:
    damage_pickle(copy)
    assert_equal_weights(load(run(copy, allow_pickle_weights=True)), tiny_model())


def test_a_missing_folder_is_named(base: Path, tmp_path: Path) -> None:
    cfg = run(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=f"There is no folder {tmp_path / 'nowhere'}"):
        ModelLoader(cfg, load_tokenizer(run(base))).load()


def test_a_backbone_without_a_head_is_incomplete(base: Path, tmp_path: Path) -> None:
    AutoModel.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="language-model head"):
        ModelLoader(run(tmp_path), load_tokenizer(run(base))).load()


def test_each_process_of_an_fsdp_launch_reads_the_weights(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, read = [], AutoModelForCausalLM.from_pretrained

    def reading(*arguments: Any, **options: Any) -> Any:
        asked.append(os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING"))
        return read(*arguments, **options)

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reading)
    load(run(base))
    assert asked == [None]
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


def test_attention_names_what_is_missing(base: Path) -> None:
    with pytest.raises(ModelError, match=r"attn_implementation: .*or flash_attention: true\)"):
        load(run(base, attn_implementation="flash_attention_2"))


def test_quantisation_names_what_is_missing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"fiducial\[quantization\]"):
        load(run(base, load_in_4bit=True))


def test_quantisation_needs_a_bitsandbytes_that_computes_right(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.47.0")
    with pytest.raises(ModelError, match=r"bitsandbytes 0\.48 or newer, and 0\.47\.0 is installed"):
        load(run(base, load_in_8bit=True))


def test_remote_code_stays_off(copy: Path) -> None:
    cfg = run(copy)
    tokenizer = load_tokenizer(cfg)
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "model_type": "homemade",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match="trust_remote_code: true"):
        ModelLoader(cfg, tokenizer).load()


@pytest.mark.parametrize(
    ("model", "weights", "autocast"),
    [
        ({}, torch.float32, None),
        ({"dtype": "auto"}, torch.float32, None),
        ({"dtype": "bfloat16", "autocast": None}, torch.bfloat16, None),
        ({"dtype": "float32", "autocast": "bfloat16"}, torch.float32, torch.bfloat16),
    ],
)
def test_precision_on_the_cpu(
    model: dict[str, Any], weights: torch.dtype, autocast: torch.dtype | None
) -> None:
    precision = resolve_precision(run(Path("x"), **model), "cpu")
    assert (precision.weights, precision.autocast) == (weights, autocast)


def test_auto_is_bfloat16_where_the_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in {True: torch.bfloat16, False: None}.items():
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda able=able, **_: able)
        assert resolve_precision(run(Path("x")), "cuda").autocast == expected
