import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from fiducial.config.schema import AdapterConfig, RunConfig
from fiducial.errors import ModelError
from fiducial.model.adapters import (
    REFERENCE_ADAPTER,
    active_adapter,
    adapters_off,
    freeze_copy,
    lora_config,
    new_adapter,
    resume_adapter,
)
from fiducial.model.loader import ModelLoader
from fiducial.model.tokenizer import load_tokenizer
from tiny import save_checkpoint, tiny_model

Switch = Callable[[nn.Module], AbstractContextManager[None]]
IDS = torch.arange(5, 60)[None]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "random": {"init_lora_weights": False},
    "modules_to_save": {"modules_to_save": ("lm_head", "embed_tokens")},
    "tokens": {"trainable_token_indices": (1, 2, 40)},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "replicated": {"layer_replication": ((0, 2), (0, 2))},
}


SMALL: dict[str, dict[str, Any]] = {
    "phimoe": {"num_key_value_heads": 2},
    "mamba": {"state_size": 4},
    "falcon_h1": {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 4},
}


def adapted(**options: Any) -> PeftModel:
    return new_adapter(tiny_model(), AdapterConfig(kind="lora", r=4, **options), float32=True)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model.eval()(IDS).logits
    return answer


def train_steps(model: PeftModel, steps: int = 3) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def differ(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_copy_is_the_adapter_and_stays_it(kind: str) -> None:
    model = adapted(**KINDS[kind])
    train_steps(model)
    before, trained, state = logits(model), flags(model), torch.get_rng_state()

    freeze_copy(model)

    assert torch.equal(logits(model), before), "adding the copy moved the policy"
    assert torch.equal(torch.get_rng_state(), state)
    now = flags(model)
    assert {name: now[name] for name in trained} == trained
    assert not any(value for name, value in now.items() if name not in trained)
    with active_adapter(model, REFERENCE_ADAPTER):
        assert torch.equal(logits(model), before)
    train_steps(model)
    assert differ(logits(model), before) > 0.1
    with active_adapter(model, REFERENCE_ADAPTER):
        assert torch.equal(logits(model), before)


def test_a_frozen_copy_neither_thaws_nor_freezes() -> None:
    model = adapted()
    next(value for value in model.parameters() if value.requires_grad).requires_grad_(False)
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    before = flags(model)
    freeze_copy(model)
    after = flags(model)
    assert {name: after[name] for name in before} == before


def test_loading_a_second_pissa_the_ordinary_way_moves_the_policy(tmp_path: Path) -> None:
    # The negative control: this is why freeze_copy does not use load_adapter.
    model = adapted(**KINDS["pissa"])
    before = logits(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
        model.load_adapter(str(tmp_path), REFERENCE_ADAPTER)
    assert differ(logits(model), before) > 0.1


def test_an_adapter_that_trains_biases_cannot_be_copied() -> None:
    model = new_adapter(tiny_model("qwen2"), AdapterConfig(kind="lora", r=4, bias="lora_only"), float32=True)
    with pytest.raises(ModelError, match="bias"):
        freeze_copy(model)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "replicated"])
def test_our_switch_equals_pefts_and_leaves_requires_grad_alone(kind: str) -> None:
    model = adapted(**KINDS[kind])
    train_steps(model)
    on = logits(model)
    with model.disable_adapter():
        theirs = logits(model)
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen.requires_grad_(False)
    before = flags(model)
    with adapters_off(model):
        assert torch.equal(logits(model), theirs)
        assert flags(model) == before
    assert flags(model) == before
    assert torch.equal(logits(model), on)
    with model.disable_adapter():
        pass
    assert flags(model) != before, "PEFT's own context leaves requires_grad alone now; ours may go"


@pytest.mark.parametrize("switch", [adapters_off, lambda model: active_adapter(model, "reference")])
def test_switches_are_undone_after_an_error(switch: Switch) -> None:
    model = adapted(init_lora_weights=False)
    freeze_copy(model)
    before = logits(model)
    with pytest.raises(RuntimeError, match="half way"), switch(model):
        raise RuntimeError("half way")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_over_a_half_base(held: torch.dtype) -> None:
    base = tiny_model().to(held)
    options = AdapterConfig(kind="lora", r=4, modules_to_save=("lm_head",))
    model = new_adapter(base, options, float32=True)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert any("modules_to_save" in name for name in trained)
    assert base.model.layers[0].mlp.up_proj.weight.dtype == held


def test_default_targets_are_pefts_and_unknown_models_get_all_linear() -> None:
    model = tiny_model()
    assert lora_config(AdapterConfig(kind="lora"), model).target_modules is None
    model.config.model_type = "homemade"
    assert lora_config(AdapterConfig(kind="lora"), model).target_modules == "all-linear"
    assert lora_config(AdapterConfig(kind="lora", target_linear=True), model).target_modules == "all-linear"
    named = AdapterConfig(kind="lora", target_modules=("q_proj",))
    assert lora_config(named, model).target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("named", "further"), [(("q_proj", "down_proj"), set()), (("q_proj", "embed_tokens"), {"embed_tokens"})]
)
def test_targets_beside_all_linear_layers_are_added(named: tuple[str, ...], further: set[str]) -> None:
    def layers(**options: Any) -> set[str]:
        names = (name for name, _ in adapted(**options).named_modules() if ".lora_" in name)
        return {re.sub(r"\.lora_.*", "", name).removeprefix("base_model.model.") for name in names}

    added = layers(target_linear=True, target_modules=named) - layers(target_linear=True)
    assert added == {f"model.{name}" for name in further}


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
@pytest.mark.parametrize(
    "targets",
    [
        {"target_linear": True},
        {"target_modules": "all-linear"},
        {},
    ],
    ids=str,
)
def test_all_linear_layers_may_be_those_of_some_layers(model_type: str, targets: dict[str, Any]) -> None:
    cfg = AdapterConfig(kind="lora", r=2, layers_to_transform=(1,), **targets)
    names = [name for name, _ in new_adapter(tiny_model(model_type), cfg, float32=True).named_parameters()]
    adapted = [name for name in names if "lora_A" in name]
    assert adapted
    assert all(".layers.1." in name for name in adapted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_experts_of_a_mixture_are_linear_layers(family: str) -> None:
    cfg = AdapterConfig(kind="lora", r=2, target_linear=True)
    policy = new_adapter(tiny_model(family, num_key_value_heads=2), cfg, float32=True)
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    assert any(".experts." in name for name in trained)


@pytest.mark.parametrize("layers", [(), (1,)])
@pytest.mark.parametrize(
    ("family", "left_out"), [("phimoe", "router"), ("mamba", "out_proj"), ("falcon_h1", "mamba.out_proj")]
)
def test_linear_layers_that_cannot_be_adapted_are_left_out(
    family: str, left_out: str, layers: tuple[int, ...]
) -> None:
    cfg = AdapterConfig(kind="lora", r=2, target_linear=True, layers_to_transform=layers)
    policy = new_adapter(tiny_model(family, **SMALL.get(family, {})), cfg, float32=True)
    adapted = [name for name, _ in policy.named_parameters() if ".lora_A." in name]
    assert adapted
    assert not any(f".{left_out}." in name for name in adapted)
    assert logits(policy).isfinite().all()


def test_a_pattern_may_be_of_a_stacked_parameter() -> None:
    options = {"target_parameters": ("experts.down_proj",), "rank_pattern": {"experts.down_proj": 3}}
    model = tiny_model("mixtral", num_key_value_heads=2, num_local_experts=2)
    policy = new_adapter(model, AdapterConfig(kind="lora", r=4, **options), float32=True)
    ranks = {len(value) for name, value in policy.named_parameters() if ".lora_A." in name}
    assert ranks == {2 * 3}, "each expert has factors of its own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("nothing",)}, "does not fit"),
        ({"init_lora_weights": "eva"}, "peft_init_lora_weights: eva"),
        ({"init_lora_weights": "nonsense"}, "nonsense"),
        ({"target_linear": True, "target_modules": ".*q_proj"}, "lora_target_linear"),
        (
            {"target_linear": True, "target_modules": ("embed_tokens",), "layers_to_transform": (1,)},
            "embed_tokens: the adapter finds nothing",
        ),
        ({"target_modules": ("q_proj", "vv_proj")}, "lora_target_modules: vv_proj: .*called .*v_proj"),
        (
            {"target_linear": True, "target_modules": ("vv_proj",)},
            "vv_proj: .* called down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up",
        ),
        ({"target_parameters": ("q_proj.weight", "q_proj.wait")}, "lora_target_parameters: q_proj.wait: "),
        ({"modules_to_save": ("lm_haed",)}, "lora_modules_to_save: lm_haed"),
        ({"rank_pattern": {"q_prj": 2}}, "lora_rank_pattern: q_prj"),
        ({"alpha_pattern": {"q_prj": 2}}, "lora_alpha_pattern: q_prj"),
        ({"layers_to_transform": (1, 7)}, "peft_layers_to_transform: 7"),
    ],
)
def test_a_wrong_adapter_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapted(**options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter trained on it."""
    folder = tmp_path_factory.mktemp("adapters")
    save_checkpoint(folder / "base")
    model = adapted(modules_to_save=("lm_head",))
    train_steps(model)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def run(base: Path, adapter: Path) -> RunConfig:
    return RunConfig.model_validate(
        {"model": {"base_model": str(base)}, "adapter": {"kind": "lora", "path": str(adapter)}}
    )


def test_a_resumed_policy_and_its_merged_reference_are_equal(saved: tuple[Path, Path]) -> None:
    cfg = run(*saved)
    policy, peft_config = ModelLoader(cfg, load_tokenizer(cfg)).load()
    reference, none = ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()
    assert peft_config is not None
    assert none is None
    assert any(parameter.requires_grad for parameter in policy.parameters())
    assert not isinstance(reference, PeftModel)
    assert not any("lora" in name for name, _ in reference.named_modules())
    assert differ(logits(policy), logits(reference)) < 1e-4
    assert differ(logits(policy), logits(tiny_model())) > 0.1


def test_the_adapters_start_is_drawn_from_the_runs_seed(saved: tuple[Path, Path]) -> None:
    starts = []
    for seed in (1, 1, 2):
        cfg = run(*saved).model_copy(update={"adapter": AdapterConfig(kind="lora")})
        cfg = cfg.model_copy(update={"optimization": cfg.optimization.model_copy(update={"seed": seed})})
        policy, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()
        starts.append(next(value for name, value in policy.named_parameters() if "lora_A" in name))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    "shape", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"vocab_size": 400}]
)
def test_an_adapter_of_another_base_is_refused(saved: tuple[Path, Path], shape: dict[str, int]) -> None:
    with pytest.raises(ModelError, match="another"):
        resume_adapter(tiny_model(**shape), str(saved[1]), trainable=True, float32=True, pickle=False)


def break_remove_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def break_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def break_truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def break_kind(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NONSENSE"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_remove_config, "no adapter_config.json"),
        (break_pickle, "allow_pickle_weights"),
        (break_truncate, "does not fit"),
        (break_kind, "does not fit"),
    ],
)
def test_a_damaged_adapter_is_refused(
    saved: tuple[Path, Path], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(saved[1], tmp_path / "adapter"))
    damage(folder)
    with pytest.raises(ModelError, match=message):
        resume_adapter(tiny_model(), str(folder), trainable=True, float32=True, pickle=False)


def test_base_weights_unfrozen_by_hand_train_beside_the_adapter(saved: tuple[Path, Path]) -> None:
    cfg = RunConfig.model_validate(
        {
            "model": {"base_model": str(saved[0]), "unfrozen_parameters": (r"model\.norm\.",)},
            "adapter": {"kind": "lora"},
        }
    )
    policy, _ = ModelLoader(cfg, load_tokenizer(cfg)).load()
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    assert [name for name in trained if "lora" not in name] == ["base_model.model.model.norm.weight"]
    assert any("lora" in name for name in trained)
