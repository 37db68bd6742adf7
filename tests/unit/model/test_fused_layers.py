"""What the keys of Liger's kernels ask of Liger; the kernels themselves run in tests/gpu."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fiducial.config.load import validate_config
from fiducial.errors import ModelError
from fiducial.model import fused_layers
from fiducial.model.fused_layers import ARGUMENTS
from fiducial.train import train
from run_configs import run_config

EVERY = dict.fromkeys(ARGUMENTS, True)


def chosen(model_type: str, **keys: Any) -> dict[str, bool]:
    cfg = validate_config({"base_model": "m", "rl": "dpo"} | keys)
    config: Any = SimpleNamespace(model_type=model_type)
    return fused_layers.fused_layers(cfg, config)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, and a Liger that knows two families."""

    def llama(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ): ...
    def gemma(rms_norm=True, geglu=True, model=None): ...

    patches = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": llama, "gemma": gemma}
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: object())


def test_nothing_is_asked_without_a_key() -> None:
    assert chosen("llama") == {}


@pytest.mark.usefixtures("liger")
def test_what_was_not_asked_for_is_switched_off() -> None:
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    every = {"rope": True, "rms_norm": True, "swiglu": True}
    assert chosen("llama", **EVERY) == losses | every
    assert chosen("llama", liger_rope=True) == losses | {"rope": True, "rms_norm": False, "swiglu": False}
    assert chosen("gemma", liger_glu_activation=True) == {"geglu": True, "rms_norm": False}


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("gemma", EVERY, "liger_rope: Liger has no such kernel for gemma"),
        ("gpt_neox", {"liger_rms_norm": True}, "liger_rms_norm: Liger has no such kernel for gpt_neox"),
        ("llama", EVERY | {"reference": {"source": "separate_model", "device": "cpu"}}, "reference.device"),
    ],
)
def test_what_cannot_run_is_refused(model_type: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        chosen(model_type, **keys)


@pytest.mark.usefixtures("liger")
def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_layers, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install"):
        chosen("llama", **EVERY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_ends_before_it_loads(tmp_path) -> None:
    with pytest.raises(ModelError, match="liger_rope: Triton's kernels need a GPU"):
        train(run_config(tmp_path, liger_rope=True))
