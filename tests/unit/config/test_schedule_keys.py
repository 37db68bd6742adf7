"""Batch sizes, evaluation, saving and loggers: what a user may write and what the run becomes."""

from typing import Any

import pytest

from fiducial.config.load import load_run, validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError

DATA = {"datasets": [{"path": "a"}], "learning_rate": 1e-6}
HELD_OUT = DATA | {"val_set_size": 0.1}


def run(**settings: Any) -> RunConfig:
    return validate_config({"base_model": "m", "rl": "dpo", **settings})


def refusal(**settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        run(**settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("micro", "steps", "total", "expected"),
    [
        (None, None, None, (1, 1)),
        (2, None, None, (2, 1)),
        (2, 4, None, (2, 4)),
        (2, None, 8, (2, 4)),
        (None, 4, 8, (2, 4)),
        (None, None, 8, (1, 8)),
        (2, 4, 8, (2, 4)),
    ],
)
def test_two_batch_keys_give_the_third(micro: int, steps: int, total: int, expected: tuple[int, int]) -> None:
    optimization = run(
        micro_batch_size=micro, gradient_accumulation_steps=steps, batch_size=total
    ).optimization
    assert (optimization.micro_batch_size, optimization.gradient_accumulation_steps) == expected


def test_batch_refusals() -> None:
    assert "batch_size: 7 — does not go with micro_batch_size 2" in refusal(micro_batch_size=2, batch_size=7)
    message = refusal(micro_batch_size=2, gradient_accumulation_steps=2, batch_size=8)
    assert "does not go with micro_batch_size 2 × gradient_accumulation_steps 2" in message
    assert "must be a whole number ≥ 1" in refusal(batch_size="many")
    assert refusal(micro_batch_size="x", batch_size=8) == "micro_batch_size: x — must be a whole number > 0"


@pytest.mark.parametrize(
    ("settings", "strategy", "steps", "per_epoch"),
    [
        (DATA, "no", None, None),
        (HELD_OUT, "epoch", None, None),
        (DATA | {"test_datasets": [{"path": "b"}]}, "epoch", None, None),
        (HELD_OUT | {"eval_steps": 50}, "steps", 50, None),
        (HELD_OUT | {"eval_steps": 0.1, "eval_strategy": "steps"}, "steps", 0.1, None),
        (HELD_OUT | {"evals_per_epoch": 4}, "steps", None, 4),
        (HELD_OUT | {"evals_per_epoch": 0}, "no", None, None),
        (HELD_OUT | {"eval_strategy": False}, "no", None, None),
        (HELD_OUT | {"evaluation_strategy": "epoch"}, "epoch", None, None),
        (DATA | {"evals_per_epoch": 1, "val_set_size": 0.0}, "no", None, None),
    ],
)
def test_evaluation(
    settings: dict[str, Any], strategy: str, steps: float | None, per_epoch: int | None
) -> None:
    evaluation = run(**settings).evaluation
    assert (evaluation.strategy, evaluation.steps, evaluation.per_epoch) == (strategy, steps, per_epoch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            DATA | {"eval_steps": 5},
            "eval_steps: 5 — needs evaluation data; write val_set_size or test_datasets",
        ),
        (DATA | {"eval_strategy": "epoch"}, "eval_strategy: epoch — needs evaluation data"),
        (HELD_OUT | {"eval_steps": 5, "evals_per_epoch": 2}, "evals_per_epoch: 2 — contradicts eval_steps"),
        (
            HELD_OUT | {"eval_steps": 5, "eval_strategy": "epoch"},
            "eval_strategy: epoch — contradicts eval_steps",
        ),
        (HELD_OUT | {"eval_strategy": "steps"}, "steps needs eval_steps or evals_per_epoch"),
        (HELD_OUT | {"eval_strategy": "often"}, "must be one of no, steps or epoch"),
        (HELD_OUT | {"eval_strategy": "no", "evaluation_strategy": "no"}, "is the old name of eval_strategy"),
        (HELD_OUT | {"eval_steps": 0}, "eval_steps: 0 — must be a number > 0"),
        (HELD_OUT | {"eval_steps": "x"}, "eval_steps: x — must be a number > 0"),
        (HELD_OUT | {"eval_steps": 5, "evals_per_epoch": 0}, "evals_per_epoch: 0 — contradicts eval_steps"),
        (
            HELD_OUT | {"evals_per_epoch": 0, "eval_strategy": "epoch"},
            "evals_per_epoch: 0 — contradicts eval_strategy: epoch",
        ),
        (DATA | {"save_steps": 5, "saves_per_epoch": 0}, "saves_per_epoch: 0 — contradicts save_steps"),
        (DATA | {"save_steps": 5, "saves_per_epoch": 2}, "saves_per_epoch: 2 — contradicts save_steps"),
        (DATA | {"save_steps": 5, "save_strategy": "epoch"}, "save_strategy: epoch — contradicts save_steps"),
        (DATA | {"save_strategy": "steps"}, "steps needs save_steps or saves_per_epoch"),
        (DATA | {"save_strategy": "best"}, "best needs evaluation data and metric_for_best_model"),
    ],
)
def test_schedule_refusals(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings)


@pytest.mark.parametrize(
    ("settings", "strategy", "steps", "per_epoch"),
    [
        ({}, "epoch", None, None),
        ({"save_steps": 100}, "steps", 100, None),
        ({"saves_per_epoch": 2}, "steps", None, 2),
        ({"saves_per_epoch": 0}, "no", None, None),
        ({"save_strategy": False}, "no", None, None),
        ({"save_strategy": "no"}, "no", None, None),
        (HELD_OUT | {"save_strategy": "best", "metric_for_best_model": "eval_loss"}, "best", None, None),
    ],
)
def test_saving(settings: dict[str, Any], strategy: str, steps: float | None, per_epoch: int | None) -> None:
    output = run(**settings).output
    assert (output.save_strategy, output.save_steps, output.saves_per_epoch) == (strategy, steps, per_epoch)


def test_loggers_and_what_they_are_told() -> None:
    output = run(
        use_wandb=True,
        wandb_project="align",
        wandb_entity="team",
        wandb_name="first",
        wandb_mode="offline",
        wandb_watch="",
        wandb_log_model="false",
        use_tensorboard=True,
        mlflow_experiment_name="exp",
        mlflow_tracking_uri="http://localhost",
        hf_mlflow_log_artifacts=True,
        use_trackio=True,
        trackio_project_name="align",
        trackio_space_id="me/space",
    ).output
    assert output.loggers == ("wandb", "tensorboard", "mlflow", "trackio")
    assert output.run_name == "first"
    assert output.project == "align"
    assert output.logger_environment == {
        "WANDB_PROJECT": "align",
        "WANDB_ENTITY": "team",
        "WANDB_MODE": "offline",
        "WANDB_LOG_MODEL": "false",
        "MLFLOW_EXPERIMENT_NAME": "exp",
        "MLFLOW_TRACKING_URI": "http://localhost",
        "HF_MLFLOW_LOG_ARTIFACTS": "true",
        "TRACKIO_SPACE_ID": "me/space",
    }


@pytest.mark.parametrize(
    ("settings", "loggers", "environment"),
    [
        ({}, (), {}),
        ({"wandb_project": ""}, (), {}),
        ({"wandb_project": "p"}, ("wandb",), {"WANDB_PROJECT": "p"}),
        ({"use_comet": True, "comet_mode": "get", "comet_online": False}, ("comet_ml",), None),
        ({"swanlab_project": "p"}, ("swanlab",), {"SWANLAB_PROJECT": "p"}),
        ({"use_wandb": False, "wandb_project": "p", "wandb_name": "n"}, (), {}),
    ],
)
def test_naming_a_project_asks_for_its_logger(
    settings: dict[str, Any], loggers: tuple[str, ...], environment: dict[str, str] | None
) -> None:
    output = run(**settings).output
    assert output.loggers == loggers
    comet = {"COMET_START_MODE": "get", "COMET_START_ONLINE": "false"}
    assert output.logger_environment == (comet if environment is None else environment)
    assert output.run_name is None


def test_logger_refusals() -> None:
    assert "wandb_mode: offline — has no effect without use_wandb: true" in refusal(wandb_mode="offline")
    assert "wandb_name: n — has no effect without use_wandb" in refusal(wandb_name="n")
    assert "use_wandb: please — must be true or false" in refusal(use_wandb="please")
    assert "wandb_entity: ['a'] — must be text" in refusal(use_wandb=True, wandb_entity=["a"])
    names = {"use_wandb": True, "wandb_name": "a", "use_mlflow": True, "mlflow_run_name": "b"}
    assert "mlflow_run_name: b — contradicts wandb_name; a run has one name" in refusal(**names)
    assert "a secret would be copied beside the model; export COMET_API_KEY" in refusal(comet_api_key="k")


def test_a_switched_off_logger_is_noted(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\nuse_wandb: false\nwandb_project: p\n")
    assert "wandb_project: p — left out: use_wandb is false" in load_run(path).notes[0]
