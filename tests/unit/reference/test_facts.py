"""What is read from checkpoints and adapters on disk, and what is said of those that cannot be used."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from fiducial.config.methods import DPOConfig
from fiducial.config.schema import AdapterConfig, ModelConfig, ReferenceConfig, RunConfig
from fiducial.errors import ModelError
from fiducial.reference.facts import Facts, gather_facts
from tiny import FAMILIES, save_checkpoint, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "llama")


def gather(path: Path | str, *, adapter: Path | str | None = None, **settings: Any) -> Facts:
    reference = ReferenceConfig(**settings.pop("reference", {}))
    resumed = None if adapter is None else AdapterConfig(kind="lora", path=str(adapter))
    model = ModelConfig(base_model=str(path), **settings)
    return gather_facts(RunConfig(model=model, adapter=resumed, reference=reference, method=DPOConfig()))


def save_adapter(path: Path, *, family: str = "llama", name: str | None = None, **options: Any) -> Path:
    """An adapter for the tiny model of `family`, trained on a base called `name`."""
    sizes = options.pop("sizes", {})
    policy = get_peft_model(tiny_model(family, **sizes), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    policy.save_pretrained(path, save_embedding_layers=False)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": name}))
    return path


def write_checkpoint(path: Path, config: dict[str, Any], weights: bytes | None = None) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    facts = gather(save_checkpoint(tmp_path / family, family)).model
    config = model.config.get_text_config()
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.architecture == type(model).__name__
    assert facts.tied_embeddings == config.tie_word_embeddings
    assert (facts.sizes.hidden, facts.sizes.layers) == (config.hidden_size, config.num_hidden_layers)
    assert facts.sizes.kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert facts.gated == (family != "gpt_neox")
    assert facts.has_biases == (family in {"qwen2", "gpt_neox"})
    assert (facts.dtype, facts.quantized, facts.shapes_are_exact) == ("float32", False, True)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert gather(tmp_path).model.num_parameters == sum(weight.numel() for weight in model.parameters())
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of the .* weight files"):
        gather(tmp_path)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}], ids=str)
def test_without_weights_the_config_implies_them(overrides: dict[str, Any], tmp_path: Path) -> None:
    sizes = {key: value for key, value in LLAMA.items() if key not in {"architectures", "model_type"}}
    model = tiny_model(**(sizes | overrides))
    facts = gather(write_checkpoint(tmp_path / "config", LLAMA | overrides), reinit_weights=True).model
    assert not facts.shapes_are_exact
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("arcee", {}),
        ("gemma4_text", {"vocab_size_per_layer_input": 320, "global_head_dim": 8}),
        ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}),
    ],
    ids=str,
)
def test_the_names_of_families_are_known(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 8} | options
    model = tiny_model(family, **options)
    model.config.save_pretrained(tmp_path)
    facts = gather(tmp_path, reinit_weights=True).model
    real = sum(parameter.numel() for parameter in model.parameters())
    assert facts.num_parameters == pytest.approx(real, rel=0.08)


@pytest.mark.parametrize("name", ["layers_block_type", "layer_types"])
def test_layers_may_be_listed(name: str, tmp_path: Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_hidden_layers"}
    listed = write_checkpoint(tmp_path / "listed", config | {name: ["moe", "attention"]})
    assert gather(listed, reinit_weights=True).model.sizes.layers == 2


def test_experts_are_counted_with_those_that_are_active(tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = gather(write_checkpoint(tmp_path / "moe", LLAMA | experts), reinit_weights=True).model
    dense = gather(write_checkpoint(tmp_path / "dense", LLAMA), reinit_weights=True).model
    assert (model.sizes.experts, model.sizes.active_experts) == (4, 2)
    extra = 3 * LLAMA["num_hidden_layers"] * 3 * 64 * 96 + 3 * 4 * 64
    assert model.num_parameters - dense.num_parameters == extra


def test_a_tied_head_counts_once_though_it_is_stored(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    both_stored = write_checkpoint(tmp_path / "tied", config, (base / "model.safetensors").read_bytes())
    head = config["vocab_size"] * config["hidden_size"]
    assert gather(both_stored).model.num_parameters == gather(base).model.num_parameters - head


def test_config_overrides_change_the_shape(base: Path) -> None:
    assert gather(base, config_overrides={"num_hidden_layers": 1}).model.sizes.layers == 1


def test_a_named_reference_is_read_too(base: Path, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other", "qwen2")
    facts = gather(base, reference={"model": str(other)})
    assert facts.reference is not None
    assert facts.reference.model_type == "qwen2"
    with pytest.raises(ModelError, match=r"reference\.model: there is no folder"):
        gather(base, reference={"model": str(tmp_path / "missing")})


# Checkpoints that cannot be used.


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"base_model: there is no folder .*nowhere"):
        gather(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=rf"no folder \./nowhere \(looked in {Path.cwd()}\)"):
        gather("./nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ModelError, match="is a file"):
        gather(tmp_path / "weights.bin")


def test_an_unknown_name_offline_is_neither_here_nor_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match="base_model: nobody/nothing is not here and not cached, and the hub"
    ):
        gather("nobody/nothing")


def test_a_cached_hub_name_is_read_offline(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    snapshot = tmp_path / "models--team--llama" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((base / "config.json").read_text())
    refs = tmp_path / "models--team--llama" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    local = gather(base).model
    implied = gather("team/llama").model
    assert not implied.shapes_are_exact
    assert implied.num_parameters == local.num_parameters
    (snapshot / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    assert gather("team/llama").model.shapes_are_exact


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{not json", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"model_type": "llama"}', "does not give hidden_size"),
        (json.dumps(LLAMA | {"architectures": ["BertForMaskedLM"]}), "not a causal language model"),
        (
            json.dumps(LLAMA | {"architectures": ["T5ForConditionalGeneration"]}),
            "not a causal language model",
        ),
        (json.dumps(LLAMA | {"quantization_config": {"quant_method": "gptq"}}), "cannot be trained in full"),
    ],
)
def test_an_unusable_config_is_explained(config: str, message: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=f"base_model: .*{message}"):
        gather(tmp_path)


def test_a_folder_without_config_or_weights_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        gather(tmp_path)
    with pytest.raises(ModelError, match="no weights"):
        gather(write_checkpoint(tmp_path / "bare", LLAMA))


def test_pickled_weights_need_a_flag(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "pickled", LLAMA)
    (checkpoint / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(ModelError, match="allow_pickle_weights: true"):
        gather(checkpoint)
    assert not gather(checkpoint, allow_pickle_weights=True).model.shapes_are_exact


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "damaged"),
        (struct.pack("<Q", 1 << 40) + b"{}", "its header is longer than the file"),
        (struct.pack("<Q", 4) + b"nope", "its header cannot be read"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "its header cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_a_damaged_weight_file_is_named(weights: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"base_model: .*model\.safetensors.*{message}"):
        gather(write_checkpoint(tmp_path / "damaged", LLAMA, weights))


def test_a_file_cut_short_is_found_from_its_header(base: Path, tmp_path: Path) -> None:
    whole = (base / "model.safetensors").read_bytes()
    config = json.loads((base / "config.json").read_text())
    with pytest.raises(ModelError, match="bytes where its header announces"):
        gather(write_checkpoint(tmp_path / "short", config, whole[:-4]))


def test_an_adapter_given_as_base_says_how_to_write_it(tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", name="team/llama")
    with pytest.raises(ModelError, match=r"is an adapter, not a model\. Set base_model: team/llama"):
        gather(adapter)


# Adapters.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head", "down_proj"]},
        {"init_lora_weights": False, "bias": "all"},
    ],
    ids=str,
)
def test_an_adapter_is_described(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    adapter = gather(base, adapter=save_adapter(tmp_path / "adapter", **options)).adapter
    assert adapter is not None
    assert (adapter.peft_type, adapter.r) == ("LORA", 4)
    assert adapter.init_lora_weights == options.get("init_lora_weights", True)
    assert adapter.bias == options.get("bias", "none")
    assert adapter.use_dora == options.get("use_dora", False)
    assert adapter.use_rslora == options.get("use_rslora", False)
    assert adapter.modules_to_save == tuple(options.get("modules_to_save", ()))


def test_an_adapters_parameters_are_counted(base: Path, tmp_path: Path) -> None:
    adapter = gather(base, adapter=save_adapter(tmp_path / "adapter")).adapter
    assert adapter is not None
    # rank 4; two layers; q_proj is 32 x 32 and v_proj 16 x 32
    assert adapter.num_parameters == 4 * 2 * (32 + 32 + 16 + 32)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
def test_an_adapter_on_a_tied_head_fits(tmp_path: Path) -> None:
    tied = save_checkpoint(tmp_path / "gemma", "gemma2")
    adapter = save_adapter(tmp_path / "adapter", family="gemma2", target_modules=["lm_head", "q_proj"])
    assert gather(tied, adapter=adapter).adapter is not None


def test_an_adapter_on_stacked_layers_fits_the_base_they_are_made_of(base: Path, tmp_path: Path) -> None:
    stacked = gather(base, adapter=save_adapter(tmp_path / "adapter", layer_replication=[[0, 2], [1, 2]]))
    assert stacked.adapter is not None
    assert stacked.adapter.layer_replication == ((0, 2), (1, 2))
    assert any("layers.2." in name for name in stacked.adapter.tensors or {})
    wider = save_adapter(tmp_path / "wider", layer_replication=[[0, 1], [0, 2]], sizes={"hidden_size": 64})
    with pytest.raises(ModelError, match="is 64 x 64 in the adapter and 32 x 32 in the base"):
        gather(base, adapter=wider)


def test_another_name_with_fitting_shapes_is_a_note(base: Path, tmp_path: Path) -> None:
    renamed = gather(base, adapter=save_adapter(tmp_path / "renamed", name="team/llama"))
    assert "was trained on team/llama" in " ".join(renamed.notes)
    same = gather(base, adapter=save_adapter(tmp_path / "same", name=f"{base}/"))
    assert same.notes == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": {"hidden_size": 64}}, "is 64 x 64 in the adapter and 32 x 32 in the base"),
        ({"sizes": {"num_hidden_layers": 3}}, r"the base has no model\.layers\.2"),
        ({"family": "gpt_neox"}, "the base has no gpt_neox"),
    ],
    ids=str,
)
@pytest.mark.parametrize("same_name", [True, False])
def test_an_adapter_for_another_base_is_refused(
    settings: dict[str, Any], message: str, same_name: bool, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", name=str(base) if same_name else "team/other", **settings)
    with pytest.raises(ModelError, match=f"lora_model_dir: .* does not fit base_model .*{message}"):
        gather(base, adapter=adapter)


def test_an_adapter_that_waits_for_its_call_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"alora_invocation_tokens": [5, 6]}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"lora_model_dir: .* activated LoRA"):
        gather(base, adapter=adapter)
    path.write_text(json.dumps(config | {"alora_invocation_tokens": None}), encoding="utf-8")
    assert gather(base, adapter=adapter).adapter is not None


def test_a_folder_that_is_no_adapter_is_explained(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        gather(base, adapter=base)
    adapter = save_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match="allow_pickle_weights: true"):
        gather(base, adapter=adapter)
    assert gather(base, adapter=adapter, allow_pickle_weights=True).adapter is not None
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        gather(base, adapter=adapter)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"r": 99}, "lora_r: 99 has no effect: lora_model_dir goes on with the adapter in .*, with 4"),
        ({"dropout": 0.1}, "lora_dropout: 0.1 has no effect"),
        ({"use_dora": True}, "peft_use_dora: True has no effect"),
        ({"rank_pattern": {"q_proj": 3}}, "lora_rank_pattern: .* has no effect.*, with {'v_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 3}}, "lora_alpha_pattern: .* has no effect.*, with none"),
        ({"layer_replication": ((0, 2),)}, "peft_layer_replication: .* has no effect.*, with none"),
        ({"init_lora_weights": "pissa"}, "peft_init_lora_weights: pissa has no effect"),
        ({"bias": "all"}, "peft_bias: all has no effect"),
        ({"target_modules": ("q_proj",)}, "lora_target_modules: q_proj has no effect"),
        ({"modules_to_save": ("lm_head",)}, "lora_modules_to_save: lm_head has no effect.*, with none"),
    ],
)
def test_a_resumed_adapter_has_settings_of_its_own(
    base: Path, tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    path = save_adapter(tmp_path / "adapter", lora_dropout=0.5, rank_pattern={"v_proj": 2})

    def resumed(**settings: Any) -> Facts:
        adapter = AdapterConfig(kind="lora", path=str(path), **settings)
        model = ModelConfig(base_model=str(base))
        return gather_facts(RunConfig(model=model, adapter=adapter, method=DPOConfig()))

    with pytest.raises(ModelError, match=says):
        resumed(**settings)
    resumed(r=4, dropout=0.5, target_modules=("v_proj", "q_proj"))
    resumed(target_modules="all-linear")
    resumed(target_modules=("q_proj",), target_linear=True)
