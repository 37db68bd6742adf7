"""Keys that mean something together: each row is what a user may write and what the run becomes."""

from typing import Any

import pytest

from fiducial.config.load import load_run, validate_config
from fiducial.config.methods import MixtureConfig
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError

DATA = {"datasets": [{"path": "a"}], "val_set_size": 0.1}
LORA = {"adapter": "lora"}


def run(**settings: Any) -> RunConfig:
    return validate_config({"base_model": "m", "rl": "dpo", **settings})


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        run(**settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "full", "adapter"),
    [
        ({}, ("float32", "auto"), ("auto", "auto")),
        ({"bf16": "auto", "fp16": False}, ("float32", "auto"), ("auto", "auto")),
        ({"bf16": True}, ("float32", "bfloat16"), ("bfloat16", "bfloat16")),
        ({"bf16": "full"}, ("bfloat16", None), ("bfloat16", None)),
        ({"bfloat16": True}, ("bfloat16", None), ("bfloat16", None)),
        ({"bf16": False}, ("float32", None), ("float32", None)),
        ({"bf16": False, "fp16": True}, ("float32", "float16"), ("float16", "float16")),
        ({"float32": True}, ("float32", None), ("float32", None)),
        ({"fp16": False, "float16": False}, ("float32", "auto"), ("auto", "auto")),
    ],
)
def test_precision(settings: dict[str, Any], full: tuple[str, str], adapter: tuple[str, str]) -> None:
    assert (run(**settings).model.dtype, run(**settings).model.autocast) == full
    assert (run(**settings, **LORA).model.dtype, run(**settings, **LORA).model.autocast) == adapter


def test_precision_refusals() -> None:
    assert "fp16: True — contradicts bf16; keep one of them" in refusal(bf16=True, fp16=True)
    assert "contradicts bf16" in refusal(bf16="auto", float32=True)
    assert "bf16: half — must be true, false, auto or full" in refusal(bf16="half")
    assert "fp16: auto — must be true or false" in refusal(fp16="auto")
    assert "bf16: true — must be true, false, auto or full, without quotes" in refusal(bf16="true")
    assert "float16 weights lose small updates; write fp16: true" in refusal(float16=True)
    assert run(float16=True, **LORA).model.dtype == "float16"


def test_tf32() -> None:
    assert run(tf32=True).model.tf32
    assert not run(tf32="auto").model.tf32
    assert "tf32: often — must be true or false" in refusal(tf32="often")


@pytest.mark.parametrize(
    ("settings", "implementation"),
    [
        ({}, None),
        ({"attn_implementation": "eager"}, "eager"),
        ({"attn_implementation": "xformers"}, "sdpa"),
        ({"flash_attention": True}, "flash_attention_2"),
        ({"flash_attention": True, "attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"flash_attention": False, "sdp_attention": True}, "sdpa"),
        ({"xformers_attention": True}, "sdpa"),
        ({"flex_attention": True}, "flex_attention"),
        ({"eager_attention": True}, "eager"),
    ],
)
def test_attention(settings: dict[str, Any], implementation: str | None) -> None:
    assert run(**settings).model.attn_implementation == implementation


def test_attention_refusals() -> None:
    assert "contradicts flash_attention_2" in refusal(flash_attention=True, sdp_attention=True)
    assert "contradicts eager" in refusal(flash_attention=True, attn_implementation="eager")
    assert "must be true or false" in refusal(flash_attention="yes, please")
    assert "not exact" in refusal(attn_implementation="sage")


def test_packing_is_measured_unless_it_is_demanded() -> None:
    assert run().model.packing is None
    assert run(sample_packing=False).model.packing is None
    assert run(sample_packing=True).model.packing is True
    assert "sample_packing: sometimes — must be true or false" in refusal(sample_packing="sometimes")


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"rl": "dpo"}, {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}),
        (
            {"rl": "dpo", "rl_beta": 0, "dpo_label_smoothing": 0.1},
            {"name": "dpo", "beta": 0, "label_smoothing": 0.1},
        ),
        ({"rl": "dpo", "trl": {"beta": 0.2}}, {"name": "dpo", "beta": 0.2, "label_smoothing": 0.0}),
        (
            {"rl": "dpo", "dpo_beta": 0.2, "rl_beta": 0.2},
            {"name": "dpo", "beta": 0.2, "label_smoothing": 0.0},
        ),
        (
            {"rl": "dpo", "trl": {"beta": 0.2}, "rl_beta": "2e-1"},
            {"name": "dpo", "beta": 0.2, "label_smoothing": 0.0},
        ),
        ({"rl": "dpo", "dpo_loss_type": ["sigmoid"]}, {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0}),
        ({"rl": "dpo", "dpo_loss_type": ["ipo"]}, {"name": "ipo", "beta": 0.1}),
        ({"rl": "ipo", "dpo_beta": 0.3}, {"name": "ipo", "beta": 0.3}),
        ({"dpo_loss_type": "hinge"}, {"name": "hinge", "beta": 0.1}),
        ({"dpo_loss_type": "sft"}, {"name": "sft"}),
        (
            {"dpo_loss_type": "robust", "dpo_label_smoothing": 0.2, "ld_alpha": 0.5, "rpo_alpha": 1},
            {"name": "robust", "ld_alpha": 0.5, "rpo_alpha": 1.0, "beta": 0.01, "label_smoothing": 0.2},
        ),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            {
                "name": "dpo",
                "f_divergence_type": "alpha_divergence",
                "f_alpha_divergence_coef": 0.3,
                "beta": 0.1,
                "label_smoothing": 0.0,
            },
        ),
        (
            {"dpo_loss_type": "bco_pair", "bco_running_delta": False},
            {"name": "bco_pair", "beta": 0.01, "running_delta": False},
        ),
        (
            {"rl": "tpo", "tpo_loss_type": "tpo-l", "tpo_gamma": 3},
            {"name": "tpo_l", "beta": 2.0, "target_margin": 3.0, "gold_weight": 0.05},
        ),
        ({"rl": "cpo", "cpo_loss_type": "hinge"}, {"name": "cpo_hinge", "beta": 0.1, "cpo_alpha": 1.0}),
        (
            {"rl": "cpo", "cpo_loss_type": "alphapo", "alphapo_alpha": -0.1, "simpo_gamma": 1},
            {"name": "alphapo", "beta": 2.5, "gamma": 1.0, "reward_alpha": -0.1, "cpo_alpha": 0.0},
        ),
        (
            {"rl": "kto", "kto_desirable_weight": 0, "kto_undesirable_weight": 1.5},
            {"name": "kto", "beta": 0.1, "desirable_weight": 0.0, "undesirable_weight": 1.5},
        ),
        ({"rl": "orpo", "orpo_alpha": 0.05}, {"name": "orpo", "beta": 0.05}),
        ({"rl": "simpo"}, {"name": "simpo", "beta": 2.0, "gamma": 0.5, "cpo_alpha": 0.0}),
        (
            {"rl": "simpo", "simpo_gamma": 1.2, "rl_beta": 2.5},
            {"name": "simpo", "beta": 2.5, "gamma": 1.2, "cpo_alpha": 0.0},
        ),
        (
            {"rl": "cpo", "cpo_alpha": 0.5},
            {"name": "cpo", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 0.5},
        ),
    ],
)
def test_method(settings: dict[str, Any], method: dict[str, Any]) -> None:
    chosen = run(**settings).method
    assert chosen is not None
    assert {"name": chosen.name} | chosen.hyperparameters == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl_beta": 0.1, "trl": {"beta": 0.2}}, "trl.beta: 0.2 — contradicts rl_beta: 0.1; both mean beta"),
        ({"rl_beta": 0.1, "dpo_beta": 0.2}, "dpo_beta: 0.2 — contradicts rl_beta: 0.1"),
        ({"rl": "orpo", "rl_beta": 0.1, "orpo_alpha": 0.2}, "orpo_alpha: 0.2 — contradicts rl_beta: 0.1"),
        ({"orpo_alpha": 0.1}, "orpo_alpha: 0.1 — has no effect with dpo; it belongs to rl: orpo"),
        ({"rl": "SLiC"}, "write rl: cpo and cpo_loss_type: hinge"),
        ({"rl": "ld-dpo"}, "write rl: dpo and ld_alpha"),
        ({"rl": "tpo", "tpo_gamma": 1}, "it belongs to tpo_loss_type: tpo-l"),
        ({"simpo_gamma": 0.5}, "it belongs to rl: simpo or cpo_loss_type: alphapo"),
        ({"cpo_alpha": 0.5}, "it belongs to rl: simpo or rl: cpo"),
        ({"kto_desirable_weight": 2}, "it belongs to rl: kto"),
        ({"rl": "kto", "dpo_label_smoothing": 0.1}, "it belongs to dpo_loss_type: sigmoid, exo_pair, robust"),
        ({"dpo_loss_type": ["ipo"], "dpo_label_smoothing": 0.1}, "has no effect with ipo"),
        ({"rl": "kto", "dpo_loss_type": ["sigmoid"]}, "has no effect with rl: kto"),
        ({"dpo_loss_type": "sigmod"}, "dpo_loss_type: sigmod — must be one of sigmoid, "),
        ({"dpo_loss_type": []}, "must be one of sigmoid"),
        ({"dpo_loss_type": [["sigmoid"]]}, "must be one of sigmoid"),
        ({"dpo_loss_type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"rl": "cpo", "cpo_loss_type": ["sigmoid", "hinge"]}, "takes one loss"),
        ({"rl": "cpo", "dpo_loss_type": "hinge"}, "has no effect with rl: cpo; it belongs to rl: dpo"),
        ({"dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [0.5]}, "one loss has all the weight; name more"),
        ({"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1]}, "must be a list of 2 numbers"),
        (
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1, 0]},
            "dpo_loss_weights.1: 0 — must be a list, each item a number > 0",
        ),
        ({"dpo_loss_type": ["hinge", "sft"], "rl_beta": 0}, "rl_beta: 0 — must be a number > 0"),
        ({"dpo_loss_type": ["sigmoid", "sft"], "rpo_alpha": 1}, "add sft to dpo_loss_type"),
        ({"dpo_loss_type": "sft", "rl_beta": 0.2}, "rl_beta: 0.2 — has no effect with sft"),
        ({"dpo_loss_type": "sft", "ld_alpha": 0.2}, "ld_alpha: 0.2 — has no effect with sft"),
        (
            {"dpo_loss_type": "sft", "reference": {"source": "separate_model"}},
            "dpo_loss_type: sft has no reference",
        ),
        ({"dpo_loss_type": "apo_zero", "f_divergence_type": "forward_kl"}, "has no effect with apo_zero"),
        (
            {"dpo_loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"},
            "is not defined for bco_pair",
        ),
        ({"f_alpha_divergence_coef": 0.3}, "has no effect without f_divergence_type: alpha_divergence"),
        ({"f_divergence_type": "kl"}, "f_divergence_type: kl — must be one of reverse_kl, forward_kl"),
        ({"ld_alpha": 1.5}, "ld_alpha: 1.5 — must be a number ≥ 0 and ≤ 1"),
        ({"dpo_loss_type": "exo_pair", "dpo_label_smoothing": 0}, "must be a number > 0 and < 0.5"),
        ({"rl": "hinge"}, "write rl: dpo and dpo_loss_type: hinge"),
        ({"rl": None, "rl_beta": 0.1}, "rl_beta: 0.1 — has no effect without rl"),
        ({"rl": "grpo"}, "rl: grpo — generates while it trains"),
        ({"rl": "ebft"}, "Fiducial learns from given preferences"),
        ({"rl": "ppo"}, "no such method; write one of dpo, ipo, kto, orpo, simpo, cpo"),
        ({"rl": ["dpo"]}, "no such method"),
        ({"rl": "ipo", "rl_beta": 0}, "rl_beta: 0 — must be a number > 0"),
        ({"dpo_label_smoothing": 0.5}, "dpo_label_smoothing: 0.5 — must be a number ≥ 0 and < 0.5"),
        ({"trl": {"beta": "x"}}, "trl.beta: x — must be a number ≥ 0"),
    ],
)
def test_method_refusals(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings)


def test_a_weighted_sum_gives_each_part_the_keys_it_has() -> None:
    mixed = run(
        dpo_loss_type=["sigmoid", "bco_pair", "sft"],
        dpo_loss_weights=[0.8, 0.2, 1],
        rl_beta=0.3,
        ld_alpha=0.5,
    ).method
    assert isinstance(mixed, MixtureConfig)
    assert mixed.weights == (0.8, 0.2, 1.0)
    assert [part.hyperparameters for part in mixed.losses] == [
        {"beta": 0.3, "label_smoothing": 0.0, "ld_alpha": 0.5},
        {"beta": 0.3, "running_delta": True, "ld_alpha": 0.5},
        {},
    ]
    assert mixed.title == "0.8 sigmoid + 0.2 bco_pair + 1 sft"


def test_a_term_the_method_lacks_may_be_zero() -> None:
    assert run(cpo_alpha=0, dpo_loss_type=["sigmoid"], dpo_loss_weights=[1.0]) == run()


@pytest.mark.parametrize(
    ("settings", "source", "schedule"),
    [
        ({}, "auto", "auto"),
        (LORA | {"rl_adapter_ref_model": True}, "separate_model", "auto"),
        (LORA | {"rl_adapter_ref_model": False}, "auto", "auto"),
        ({"rl_adapter_ref_model": False}, "auto", "auto"),
        ({"precompute_ref_log_probs": True}, "auto", "precomputed"),
        ({"trl": {"sync_ref_model": True}}, "auto", "synced"),
        ({"trl": {"sync_ref_model": False, "ref_model_sync_steps": 64}}, "auto", "auto"),
        ({"precompute_ref_log_probs": False}, "auto", "live"),
        (
            {"reference": {"source": "initial_policy", "schedule": "precomputed"}},
            "initial_policy",
            "precomputed",
        ),
        (
            {"reference": {"model": "other", "revision": "r", "dtype": "bfloat16", "device": "cpu"}},
            "auto",
            "auto",
        ),
    ],
)
def test_reference(settings: dict[str, Any], source: str, schedule: str) -> None:
    reference = run(**settings).reference
    assert (reference.source, reference.schedule) == (source, schedule)
    assert reference.model == settings.get("reference", {}).get("model")


@pytest.mark.parametrize(
    ("settings", "bits", "start"),
    [({}, None, True), ({"peft": {"loftq_config": {"loftq_bits": 4}}}, 4, "loftq")],
)
def test_loftq(settings: dict[str, Any], bits: int | None, start: str | bool) -> None:
    adapter = run(**LORA, **settings).adapter
    assert adapter is not None
    assert (adapter.loftq_bits, adapter.init_lora_weights) == (bits, start)


def test_loftq_refusals() -> None:
    loftq = {"loftq_config": {"loftq_bits": 4}}
    assert "contradicts peft.loftq_config" in refusal(**LORA, peft=loftq, peft_init_lora_weights="pissa")
    assert "may hold loftq_config" in refusal(**LORA, peft={"loftq_config": {"bits": 4}})
    assert "peft.r: 8 — unknown key" in refusal(**LORA, peft={"r": 8})


def test_notes_of_conversions(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\nrl: dpo\ntf32: auto\ncpo_alpha: 0.0\neval_sample_packing: true\n")
    notes = "\n".join(load_run(path).notes)
    assert all(key in notes for key in ("tf32: auto", "cpo_alpha: 0.0", "eval_sample_packing: true"))


@pytest.mark.parametrize(
    ("settings", "version", "config"),
    [
        ({}, None, None),
        ({"fsdp_config": {}}, None, None),
        ({"fsdp_version": 2}, 2, None),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": True}}, 2, {"offload_params": True}),
        (
            {"fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}},
            2,
            {"reshard_after_forward": True},
        ),
        (
            {"fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True, "fsdp_limit_all_gathers": True}},
            2,
            {"offload_params": True},
        ),
    ],
)
def test_the_version_of_fsdp_stands_beside_its_options_or_among_them(
    settings: dict[str, Any], version: int | None, config: dict[str, Any] | None
) -> None:
    distributed = run(**settings).distributed
    assert (distributed.fsdp_version, distributed.fsdp_config) == (version, config)
    assert "fsdp_config: all — must be a mapping" in refusal(fsdp_version=2, fsdp_config="all")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"fsdp_sharding_strategy": "FULL_SHARD"}, "write reshard_after_forward: true for FULL_SHARD"),
        ({"fsdp_offload_params": True, "offload_params": True}, "means the same as offload_params"),
        ({"fsdp_offload": True}, "unknown key; did you mean offload_params?"),
    ],
)
def test_options_of_fsdp_under_their_older_names(option: dict[str, Any], says: str) -> None:
    assert says in refusal(fsdp_config={"fsdp_version": 2, **option})
