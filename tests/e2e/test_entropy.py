"""`log_entropy` logs the policy's entropy as the stock model's logits give it; unasked it costs nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import oracles
from fiducial.config.methods import KTOConfig
from fiducial.evaluate import evaluate
from fiducial.logps import ENTROPY
from fiducial.losses import build_loss
from fiducial.model.scoring import Scorer
from fiducial.model.statistics import Gathering
from fiducial.prepare import read_run
from fiducial.reference.sources import InitialPolicy
from fiducial.train import train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.objective import Objective
from run_configs import run_config
from tiny import random_groups, tiny_model

ONE_STEP = {"rows": 6, "val_set_size": 2, "num_epochs": 1, "micro_batch_tokens": 64}
METHODS = {
    "dpo": {},
    "whole-step": {"dpo_loss_type": "aot"},
    "weighted": {"dpo_use_weighting": True},
    "distribution": {"dpo_loss_type": "tdpo2"},
    "reference-free": {"rl": "orpo"},
    "padded": {"sample_packing": False},
}


def logs(settings: dict[str, Any]) -> list[dict[str, Any]]:
    folder = Path(train(settings).output_dir)
    return [record for _, record in read_metrics_lines(folder / "metrics.jsonl")]


@torch.no_grad()
def naive(settings: dict[str, Any], *, held_out: bool) -> float:
    """Mean over the completions' tokens, each prompt and completion alone through the starting model."""
    data, base = read_run(settings).data, settings["base_model"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    values = []
    rows = data.evaluation if held_out else data.train
    assert rows is not None
    for group in (rows[index] for index in range(len(rows))):
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.tolist(), *completion.tolist()]])
            logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1]
            values.append(oracles.entropy(logits.double()))
    return torch.cat(values).mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_it_is_that_of_the_models_own_logits(method: str, tmp_path: Path) -> None:
    settings = run_config(tmp_path, **ONE_STEP, **METHODS[method], log_entropy=True)
    found = logs(settings)

    steps = [log["entropy"] for log in found if "loss" in log]
    assert steps == [pytest.approx(naive(settings, held_out=False), rel=1e-5)]
    assert steps[0] > 0.5
    assert "eval_entropy" in {name for log in found for name in log}


def test_it_is_not_gathered_of_what_is_scored_ahead() -> None:
    scorer = Scorer(tiny_model(), layout="packed")
    objective = Objective(scorer, InitialPolicy(scorer), build_loss(KTOConfig()), logged=(ENTROPY,))
    trained, ahead = objective.parts(random_groups(3, completions=2))
    assert ahead

    (foreknown,) = objective.score_ahead([ahead])
    assert not foreknown.policy.statistics
    scored = objective.step([trained], [ahead])(0)
    assert list(scored.comparison.policy.statistics) == [ENTROPY]


def test_an_evaluation_shows_it(tmp_path: Path) -> None:
    settings = run_config(tmp_path, **ONE_STEP, log_entropy=True, learning_rate=1e-30)
    train(settings)

    assert evaluate(settings)["entropy"] == pytest.approx(naive(settings, held_out=True), rel=1e-5)


def test_it_is_not_gathered_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Gathering, "add")

    names = {name for log in logs(run_config(tmp_path, **ONE_STEP)) for name in log}

    assert not names & {"entropy", "eval_entropy"}
