"""Equal weights and numerics, equal identity, however they were loaded; any difference is named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import import_utils

from fiducial.config.load import validate_config
from fiducial.config.schema import AdapterConfig, RunConfig
from fiducial.model.adapters import new_adapter
from fiducial.model.loader import ModelLoader, resolve_precision
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.reference import checkpoint_weights
from fiducial.reference.checkpoint_weights import fingerprint_files
from fiducial.reference.differences import differences
from fiducial.reference.facts import gather_facts
from fiducial.reference.fingerprint import (
    fingerprint,
    fingerprint_model,
    hash_tensor,
    identify,
    numeric_settings,
)
from fiducial.reference.identity import Identity
from fiducial.reference.plan import Checkpoint, ReferencePlan, Schedule, Source, plan_reference
from fiducial.reference.predicted import predict_identity
from run_configs import run_config
from tiny import FAMILIES, save_adapter, save_checkpoint, tiny_model


def fingerprints_with(**adapter: object) -> tuple[str, str]:
    cfg = AdapterConfig.model_validate({"kind": "lora", "r": 4, **adapter})
    torch.manual_seed(0)
    model = new_adapter(tiny_model(), cfg, float32=True)
    return fingerprint(model, with_adapter=False), fingerprint(model)


def token_rows(*indices: int) -> str:
    """The fingerprint where an adapter replaces those tokens' embeddings by the same numbers."""
    cfg = AdapterConfig(kind="lora", r=4, trainable_token_indices=indices)
    torch.manual_seed(0)
    model = new_adapter(tiny_model(), cfg, float32=True)
    for name, rows in model.named_parameters():
        if "trainable_tokens_delta" in name:
            torch.nn.init.ones_(rows)
    return fingerprint(model)


def test_the_base_under_any_adapter_is_the_base() -> None:
    plain = fingerprint(tiny_model())
    for adapter in ({}, {"r": 2}, {"modules_to_save": ("lm_head",)}, {"trainable_token_indices": (1, 2)}):
        off, on = fingerprints_with(**adapter)
        assert off == plain
        assert on != plain


def test_what_changes_the_answers_changes_the_fingerprint() -> None:
    plain = fingerprint(tiny_model())
    one_bit = tiny_model()
    with torch.no_grad():
        one_bit.lm_head.weight[-1, -1] = torch.nextafter(one_bit.lm_head.weight[-1, -1], torch.tensor(9.0))
    turned = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    others = [one_bit, tiny_model().bfloat16(), tiny_model(rms_norm_eps=0.5), tiny_model(seed=1), turned]
    assert len({plain, *map(fingerprint, others)}) == 6
    adapters = (
        {"alpha": 8},
        {"alpha": 16},
        {"alpha": 8, "use_rslora": True},
        {"alpha": 8, "alpha_pattern": {"q_proj": 2}},
    )
    assert len({fingerprints_with(**adapter)[1] for adapter in adapters}) == 4
    assert token_rows(1, 2) != token_rows(1, 3)
    renamed = tiny_model()
    renamed.config.pad_token_id, renamed.config._name_or_path = 3, "elsewhere"
    renamed.config._attn_implementation_autoset = True  # as older versions of transformers left it
    assert fingerprint(renamed) == plain


def test_equal_bits_of_another_dtype_or_shape_are_other_weights() -> None:
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(8).half(), torch.zeros(8).bfloat16()]
    assert len(set(map(hash_tensor, zeros))) == 4


def test_the_identity_follows_the_plans_source() -> None:
    model = new_adapter(tiny_model(), AdapterConfig(kind="lora", r=4), float32=True)
    scorer = Scorer(model, layout="padded", autocast=torch.bfloat16)
    off, on = (
        identify(ReferencePlan(source, Schedule.PRECOMPUTED, Checkpoint("here"), "a test"), scorer)
        for source in (Source.ADAPTER_OFF, Source.FROZEN_ADAPTER)
    )
    assert off.weights == fingerprint(tiny_model()) != on.weights
    assert (off.checkpoint, off.dtype, off.autocast, off.matmul) == ("here", "float32", "bfloat16", "ieee")
    assert off.digest != on.digest


@pytest.fixture
def _tf32() -> Iterator[None]:
    before = torch.backends.fp32_precision
    import_utils.enable_tf32(True)
    yield
    torch.backends.fp32_precision = before


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize(("device", "matmul"), [("cuda", "tf32"), ("cpu", "ieee")])
def test_tf32_as_transformers_switches_it_on_is_another_identity(device: str, matmul: str) -> None:
    scorer = Scorer(tiny_model(), layout="padded")
    scorer.device = torch.device(device)
    plan = ReferencePlan(Source.INITIAL_POLICY, Schedule.PRECOMPUTED, Checkpoint("here"), "a test")
    assert identify(plan, scorer).matmul == matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_have_the_fingerprint_of_the_model_they_make(
    tmp_path: Path, family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_weights, "_PIECE_BYTES", 1000)
    folder = save_checkpoint(tmp_path, family)
    files = sorted(folder.glob("*.safetensors"))
    settings = numeric_settings(AutoConfig.from_pretrained(folder))
    loaded = fingerprint_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    assert fingerprint_files(files, settings, dtype) == loaded


LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, "lora_target_linear": True}
HALF_LORA = LORA | {"bf16": True}
SECOND = {"source": "separate_model"}


@pytest.mark.parametrize(
    ("settings", "told_by_files"),
    [
        ({}, True),
        ({"bf16": True}, True),
        ({"bf16": "full"}, True),
        ({"model_config": {"rms_norm_eps": 0.5}}, True),
        ({"reference": SECOND | {"dtype": "bfloat16"}}, True),
        (HALF_LORA, True),
        (LORA | {"lora_modules_to_save": ["lm_head"]}, True),
        (LORA | {"reference": SECOND}, True),
        (HALF_LORA | {"lora_modules_to_save": ["lm_head"]}, False),
        (HALF_LORA | {"peft_trainable_token_indices": [1]}, False),
        (LORA | {"peft_layer_replication": [[0, 2], [1, 2]]}, False),
        (LORA | {"peft_init_lora_weights": "pissa"}, False),
        ({"tokens": ["<new>"]}, False),
        ({"resize_token_embeddings_to_32x": True}, False),
        ({"special_tokens": {"pad_token": "<fill>"}}, True),
        ({"reinit_weights": True}, False),
    ],
    ids=str,
)
def test_an_identity_told_by_files_is_that_of_the_loaded_model(
    tmp_path: Path, settings: dict[str, Any], told_by_files: bool
) -> None:
    predicted, loaded = identities(validate_config(run_config(tmp_path, **settings)))
    assert (predicted is not None) is told_by_files
    assert predicted in (None, loaded)


def test_files_tell_another_checkpoint_and_no_adapter_merged_into_it(tmp_path: Path) -> None:
    other, eps = save_checkpoint(tmp_path / "other", seed=1), {"model_config": {"rms_norm_eps": 0.5}}
    reference: dict[str, Any] = {"model": str(other)}
    predicted, loaded = identities(validate_config(run_config(tmp_path, reference=reference, **eps)))
    assert predicted == loaded
    reference["adapter"] = str(save_adapter(tmp_path / "adapter", other))
    predicted, _ = identities(validate_config(run_config(tmp_path, reference=reference)))
    assert predicted is None


def identities(cfg: RunConfig) -> tuple[Identity | None, Identity]:
    """Of the run's reference: as its files tell it, and as it is loaded."""
    plan, tokenizer = plan_reference(cfg, gather_facts(cfg)), load_tokenizer(cfg)
    model: Any = ModelLoader(cfg, tokenizer, reference_model=plan.source is Source.SEPARATE_MODEL).load()[0]
    scorer = Scorer(model, layout="padded", autocast=resolve_precision(cfg).autocast)
    return predict_identity(cfg, plan, tokenizer), identify(plan, scorer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_counts_where_it_is_not_the_embedding(tmp_path: Path, tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    names = fingerprint_model(model).tensors
    assert ("lm_head.weight" in names) is not tied
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stored["lm_head.weight"] = model.lm_head.weight.detach().clone()  # as old checkpoints hold it: twice
    save_file(stored, path)
    settings = numeric_settings(model.config)
    assert fingerprint_files([path], settings, torch.float32) == fingerprint_model(model)


def identity_of(model: torch.nn.Module, **fields: str) -> Identity:
    found = fingerprint_model(model)
    values = {"checkpoint": "base", "dtype": "float32", "autocast": "None"} | fields
    return Identity(weights=found.digest, fingerprint=found, **values)


def test_a_difference_has_a_name() -> None:
    here = identity_of(tiny_model()).as_dict()
    assert differences(here, identity_of(tiny_model(), checkpoint="elsewhere").as_dict()) == []
    one_bit = tiny_model()
    with torch.no_grad():
        one_bit.lm_head.weight[0, 0] += 1
    [phrase] = differences(here, identity_of(one_bit).as_dict())
    assert phrase == f"1 of {len(here['fingerprint']['tensors'])} weights differ (lm_head.weight)"
    [phrase] = differences(here, identity_of(tiny_model(rms_norm_eps=0.5)).as_dict())
    assert phrase == "rms_norm_eps of the config: 0.5 there, 1e-06 here"
    [phrase] = differences(here, identity_of(tiny_model(), autocast="bfloat16").as_dict())
    assert phrase == "the precision of the products (bf16, fp16): bfloat16 there, None here"
    adapter = new_adapter(tiny_model(), AdapterConfig(kind="lora", r=4), float32=True)
    there = identity_of(adapter).as_dict()
    with_adapter, adapter_settings = differences(here, there)[::-1]
    only_there = f" of {len(there['fingerprint']['tensors'])} weights are only there (model.layers.0"
    assert only_there in with_adapter
    assert adapter_settings.startswith("adapter of the config: ")
