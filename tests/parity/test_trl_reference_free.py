"""Losses without a reference equal those of TRL's experimental trainers; and where they differ on purpose.

What differs:

- TRL's supervised term is the mean of a micro-batch's chosen tokens; ours is each completion's own mean,
  as in the papers, so that no cut of a step changes it. Chosen completions of equal length make them equal.
- TRL's ORPO also supervises the prompt. A prompt of one token has nothing to predict.
- TRL's CPO with ipo logs rewards of mean log-probs, ours of whole completions, as every ipo here. Completions
  of one token make them equal.
- TRL's AlphaPO takes a power of the probability itself, which may be 0, and overflows; not compared there.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from tiny import random_groups
from trl_harness import (
    BATCH_SIZE,
    KINDS,
    STEPS,
    arguments,
    assert_equal,
    cpo,
    start,
    tpo,
    train_cpo,
    train_fiducial,
    train_orpo,
    train_tpo,
)

pytestmark = [
    pytest.mark.parity,
    # TRL 1.16 still uses the old names, whatever the user passes; its experimental package says what it is.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning"),
]

METRICS = (
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
)
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0}
CASES: dict[str, tuple[Any, MethodConfig, dict[str, Any]]] = {
    "orpo": (train_orpo, methods.ORPOConfig(beta=0.5), {"beta": 0.5}),
    "cpo": (
        train_cpo,
        methods.CPOConfig(label_smoothing=0.2, cpo_alpha=0.7),
        {"label_smoothing": 0.2, "cpo_alpha": 0.7},
    ),
    "cpo_hinge": (train_cpo, methods.CPOHingeConfig(), {"loss_type": "hinge"}),
    "simpo": (train_cpo, methods.SimPOConfig(gamma=0.8), {**SIMPO, "beta": 2.0, "simpo_gamma": 0.8}),
    "alphapo": (
        train_cpo,
        methods.AlphaPOConfig(gamma=0.5, reward_alpha=0.1),
        {"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.5, "alpha": 0.1},
    ),
    "tpo": (train_tpo, methods.TPOConfig(beta=0.1, gold_weight=0.3), {"beta": 0.1, "tpo_alpha": 0.3}),
    "tpo_l": (
        train_tpo,
        methods.TPOLConfig(gold_weight=0.3),
        {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 1.6, "tpo_alpha": 0.3},
    ),
}


def groups_of(*, completions: int = 2, prompt: int = 1, first: int | None = 9) -> list[TokenizedGroup]:
    """Random ones whose prompts have `prompt` tokens and whose first completions `first`, others uneven."""
    rng = np.random.default_rng(3)
    return [
        TokenizedGroup(
            rng.integers(0, 256, prompt, dtype=np.int32),
            (
                group.completions[0] if first is None else rng.integers(0, 256, first, dtype=np.int32),
                *group.completions[1:],
            ),
        )
        for group in random_groups(STEPS * BATCH_SIZE, completions=completions)
    ]


@KINDS
@pytest.mark.parametrize("name", CASES)
def test_every_step_equals_trl(name: str, adapter: bool, learning_rate: float, tmp_path: Path) -> None:
    train, method, settings = CASES[name]
    groups = groups_of(completions=method.num_completions or 2)
    model, args = start(adapter), arguments(tmp_path, learning_rate)

    theirs = train(copy.deepcopy(model), groups, args, **settings)
    ours = train_fiducial(copy.deepcopy(model), groups, args, method)

    compared = ("logps/chosen", "logps/rejected") if name == "tpo" else ()
    assert_equal(ours, theirs, (*METRICS, *compared))
    assert len({log["loss"] for log in theirs}) == STEPS


@KINDS
def test_cpo_ipo_equals_trl_on_single_tokens(adapter: bool, learning_rate: float, tmp_path: Path) -> None:
    groups = [
        TokenizedGroup(group.prompt, tuple(completion[:1] for completion in group.completions))
        for group in groups_of(prompt=4)
    ]
    model, args = start(adapter), arguments(tmp_path, learning_rate)

    theirs = train_cpo(copy.deepcopy(model), groups, args, loss_type="ipo")

    assert_equal(train_fiducial(copy.deepcopy(model), groups, args, methods.CPOIPOConfig()), theirs, METRICS)


@KINDS
def test_cpo_ipo_equals_trl_but_for_rewards(adapter: bool, learning_rate: float, tmp_path: Path) -> None:
    groups, model, args = groups_of(), start(adapter), arguments(tmp_path, learning_rate)

    theirs = train_cpo(copy.deepcopy(model), groups, args, loss_type="ipo")

    ours = train_fiducial(copy.deepcopy(model), groups, args, methods.CPOIPOConfig())
    assert_equal(ours, theirs, ("loss", "grad_norm"))
    with pytest.raises(AssertionError):
        assert_equal(ours, theirs, ("rewards/chosen",))


def test_no_loss_of_trls_is_missing() -> None:
    """TRL's TPO also has a hinge and IPO's square; they are not offered here."""
    compared = {
        settings.get("loss_type", "sigmoid") for train, _, settings in CASES.values() if train is train_cpo
    }
    assert compared | {"ipo"} == set(choices(cpo.CPOConfig))  # ipo has a test of its own
    assert set(choices(tpo.TPOConfig)) - {"sigmoid", "tpo-l"} == {"hinge", "ipo"}


def choices(config: Any) -> list[str]:
    found: list[str] = config.__dataclass_fields__["loss_type"].metadata["choices"]
    return found


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("orpo", groups_of(prompt=5)),
        ("orpo", groups_of(first=None)),
        ("cpo", groups_of(first=None)),
        ("tpo", groups_of(first=None, completions=3)),
    ],
    ids=["orpo-prompt", "orpo-tokens", "cpo-tokens", "tpo-tokens"],
)
def test_supervision_differs_on_purpose(name: str, groups: list[TokenizedGroup], tmp_path: Path) -> None:
    train, method, settings = CASES[name]
    model, args = start(False), arguments(tmp_path, 1e-3)
    theirs = train(copy.deepcopy(model), groups, args, **settings)

    with pytest.raises(AssertionError):
        assert_equal(train_fiducial(copy.deepcopy(model), groups, args, method), theirs, ("loss",))
