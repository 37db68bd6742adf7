"""Every loss of the DPO family that TRL has equals TRL's, step by step; and where they differ on purpose.

What differs:

- TRL's sigmoid ignores label_smoothing; ours is conservative DPO.
- TRL's bco_pair compares with 0, which is `bco_running_delta: false` here; the paper's delta is our default.
- TRL's aot and sft depend on how a step is cut into micro-batches. It gets one here and ours several.
- TRL logs beta times log-ratios as the rewards of sft, which reads no reference and gets none here.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from fiducial.config import methods
from fiducial.config.methods import MethodConfig, MixtureConfig
from fiducial.reference.kinds import Sync
from tiny import random_groups
from trl_harness import (
    BATCH_SIZE,
    KINDS,
    STEPS,
    TOLERANCE,
    arguments,
    assert_equal,
    start,
    train_dpo,
    train_fiducial,
    trl,
)

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 still uses the old names, whatever the user passes.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
LOSSES: dict[str, tuple[MethodConfig, dict[str, Any]]] = {
    "sigmoid": (methods.DPOConfig(), {}),
    "hinge": (methods.HingeConfig(beta=0.2), {"beta": 0.2}),
    "ipo": (methods.IPOConfig(), {}),
    "exo_pair": (methods.EXOPairConfig(label_smoothing=0.01), {"label_smoothing": 0.01}),
    "nca_pair": (methods.NCAPairConfig(beta=0.1), {}),
    "robust": (methods.RobustConfig(beta=0.1, label_smoothing=0.2), {"label_smoothing": 0.2}),
    "bco_pair": (methods.BCOPairConfig(beta=0.1, running_delta=False), {}),
    "sppo_hard": (methods.SPPOHardConfig(beta=0.02), {"beta": 0.02}),
    "aot": (methods.AOTConfig(label_smoothing=0.1), {"label_smoothing": 0.1}),
    "aot_unpaired": (methods.AOTUnpairedConfig(label_smoothing=0.1), {"label_smoothing": 0.1}),
    "apo_zero": (methods.APOZeroConfig(), {}),
    "apo_down": (methods.APODownConfig(), {}),
    "discopop": (methods.DiscoPOPConfig(beta=0.1, tau=0.1), {"discopop_tau": 0.1}),
    "sft": (methods.SFTConfig(), {}),
    "sigmoid_norm": (methods.SigmoidNormConfig(beta=2.0), {"beta": 2.0}),
}
MIXTURE = MixtureConfig(
    losses=(methods.DPOConfig(), methods.BCOPairConfig(beta=0.1, running_delta=False), methods.SFTConfig()),
    weights=(0.8, 0.2, 1.0),
)
MODIFIED: dict[str, tuple[MethodConfig, dict[str, Any]]] = {
    "mixture": (MIXTURE, {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "ld_alpha": (methods.DPOConfig(ld_alpha=0.3), {"ld_alpha": 0.3}),
    "use_weighting": (methods.DPOConfig(use_weighting=True), {"use_weighting": True}),
    "forward_kl": (methods.DPOConfig(f_divergence_type="forward_kl"), {"f_divergence_type": "forward_kl"}),
    "js_divergence": (
        methods.HingeConfig(f_divergence_type="js_divergence"),
        {"loss_type": ["hinge"], "f_divergence_type": "js_divergence"},
    ),
    "alpha_divergence": (
        methods.IPOConfig(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
        {"loss_type": ["ipo"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
}
CASES = {name: (method, {"loss_type": [name], **theirs}) for name, (method, theirs) in LOSSES.items()}
CASES |= MODIFIED


@KINDS
@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_trl(name: str, adapter: bool, learning_rate: float, tmp_path: Path) -> None:
    method, settings = CASES[name]
    groups, model = random_groups(STEPS * BATCH_SIZE), start(adapter)
    args = arguments(tmp_path, learning_rate)

    theirs = train_dpo(copy.deepcopy(model), groups, args, **settings)
    ours = train_fiducial(copy.deepcopy(model), groups, args, method)

    assert_equal(ours, theirs, ("loss", "grad_norm", *(REWARDS if method.needs_reference else ())))
    if method.needs_reference:  # at the first step every pair is a tie: half right here, wrong in TRL
        assert (ours[0]["rewards/accuracies"], theirs[0]["rewards/accuracies"]) == (0.5, 0.0)
        assert_equal(ours, theirs, ("rewards/accuracies",), start=1)
    moved = max(abs(log["rewards/margins"]) for log in theirs)
    assert moved > 50 * TOLERANCE, "the policy must have left the reference for this to mean anything"


def test_no_loss_of_trls_is_missing() -> None:
    listed = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]

    assert set(LOSSES) == set(re.findall(r"`'(\w+)'`", listed))


@pytest.mark.parametrize(
    ("name", "method", "settings"),
    [
        ("sigmoid", methods.DPOConfig(label_smoothing=0.2), {"label_smoothing": 0.2}),
        ("bco_pair", methods.BCOPairConfig(beta=1.0), {"beta": 1.0}),
    ],
    ids=["conservative", "delta"],
)
def test_differs_on_purpose(
    name: str, method: MethodConfig, settings: dict[str, Any], tmp_path: Path
) -> None:
    groups, model = random_groups(STEPS * BATCH_SIZE), start(False)
    args = arguments(tmp_path, 1e-3)
    theirs = train_dpo(copy.deepcopy(model), groups, args, loss_type=[name], **settings)

    with pytest.raises(AssertionError):
        assert_equal(train_fiducial(copy.deepcopy(model), groups, args, method), theirs, ("loss",))


CUT = {
    "aot": methods.AOTConfig(beta=2.0),
    "aot_unpaired": methods.AOTUnpairedConfig(beta=2.0),
    "sft": methods.SFTConfig(),
}


@pytest.mark.parametrize("name", CUT)
def test_trl_depends_on_the_cut_of_a_step(name: str, tmp_path: Path) -> None:
    # Few tokens and a high rate: what aot sorts changes places within five steps.
    groups, model = random_groups(STEPS * BATCH_SIZE, longest=4), start(False)
    method, settings = CUT[name], {"beta": 2.0, "loss_type": [name]}
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, accumulated = arguments(tmp_path, 1e-2), arguments(tmp_path, 1e-2, **cut)
    theirs = train_dpo(copy.deepcopy(model), groups, accumulated, **settings)
    ours = train_fiducial(copy.deepcopy(model), groups, whole, method)

    finely_cut = train_fiducial(copy.deepcopy(model), groups, whole, method, micro_batch_tokens=8)
    assert_equal(finely_cut, ours, ("loss",))
    assert len(theirs) == STEPS
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs, ("loss", "grad_norm"))


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_accumulated_steps_equal_trl(name: str, tmp_path: Path) -> None:
    """A step of 2 x 2 pairs: TRL's two micro-batches, and one dataloader item that we cut by tokens."""
    groups, model = random_groups(STEPS * BATCH_SIZE), start(False)
    method, settings = CASES[name]
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = arguments(tmp_path, 1e-3, **cut)
    theirs = train_dpo(copy.deepcopy(model), groups, args, **settings)

    ours = train_fiducial(copy.deepcopy(model), groups, args, method)

    assert_equal(ours, theirs, ("loss", "grad_norm", "epoch", *REWARDS))
    halves = arguments(tmp_path, 1e-3) | {"per_device_train_batch_size": 2, "max_steps": STEPS}
    with pytest.raises(AssertionError):
        assert_equal(train_fiducial(copy.deepcopy(model), groups, halves, method), theirs, ("loss",))


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_a_moving_reference_equals_trls(alpha: float, tmp_path: Path) -> None:
    groups, model, args = random_groups(STEPS * BATCH_SIZE), start(False), arguments(tmp_path, 1e-3)
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": alpha}
    theirs = train_dpo(copy.deepcopy(model), groups, args, **settings)
    method = methods.DPOConfig()

    ours = train_fiducial(copy.deepcopy(model), groups, args, method, sync=Sync(2, alpha))

    assert_equal(ours, theirs, ("loss", "grad_norm", *REWARDS))
    with pytest.raises(AssertionError):
        assert_equal(train_fiducial(copy.deepcopy(model), groups, args, method), theirs, ("loss",))
