"""Keys that must be read together to mean something: batch sizes, evaluation, saving, loggers."""

from typing import Any

from fiducial.config.outcomes import Deciding, Note, Outcomes, Put, Refuse, Settings

LOGGERS = {
    "use_wandb": "wandb",
    "use_tensorboard": "tensorboard",
    "use_mlflow": "mlflow",
    "use_comet": "comet_ml",
    "use_trackio": "trackio",
    "use_swanlab": "swanlab",
}
"""Switch to transformers' name of the logger."""

ENVIRONMENT = {
    "wandb_project": ("wandb", "WANDB_PROJECT"),
    "wandb_entity": ("wandb", "WANDB_ENTITY"),
    "wandb_run_id": ("wandb", "WANDB_RUN_ID"),
    "wandb_mode": ("wandb", "WANDB_MODE"),
    "wandb_watch": ("wandb", "WANDB_WATCH"),
    "wandb_log_model": ("wandb", "WANDB_LOG_MODEL"),
    "mlflow_tracking_uri": ("mlflow", "MLFLOW_TRACKING_URI"),
    "mlflow_experiment_name": ("mlflow", "MLFLOW_EXPERIMENT_NAME"),
    "hf_mlflow_log_artifacts": ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS"),
    "comet_workspace": ("comet_ml", "COMET_WORKSPACE"),
    "comet_project_name": ("comet_ml", "COMET_PROJECT_NAME"),
    "comet_experiment_key": ("comet_ml", "COMET_EXPERIMENT_KEY"),
    "comet_mode": ("comet_ml", "COMET_START_MODE"),
    "comet_online": ("comet_ml", "COMET_START_ONLINE"),
    "trackio_space_id": ("trackio", "TRACKIO_SPACE_ID"),
    "swanlab_project": ("swanlab", "SWANLAB_PROJECT"),
    "swanlab_workspace": ("swanlab", "SWANLAB_WORKSPACE"),
    "swanlab_mode": ("swanlab", "SWANLAB_MODE"),
}
"""Key to the logger it belongs to, and the environment variable that the logger or transformers reads."""

RUN_NAMES = {
    "wandb_name": "wandb",
    "mlflow_run_name": "mlflow",
    "trackio_run_name": "trackio",
    "swanlab_experiment_name": "swanlab",
}
"""Key to the logger it belongs to; transformers hands one `run_name` to all of them."""

SWITCHES_ON = (
    "wandb_project",
    "mlflow_experiment_name",
    "comet_project_name",
    "trackio_project_name",
    "swanlab_project",
)
"""Naming a project asks for the logger."""


def batches(settings: Settings) -> Outcomes:
    """Two of the three batch keys give the third; one process contributes `batch_size` groups to a step."""
    micro, steps = "micro_batch_size", "gradient_accumulation_steps"
    given = {key: settings[key] for key in (micro, steps) if key in settings}
    yield from (Put(f"optimization.{key}", value, key) for key, value in given.items())
    if "batch_size" not in settings:
        return
    total = settings["batch_size"]
    if not _is_count(total):
        yield Refuse("batch_size", "must be a whole number ≥ 1")
        return
    if not all(_is_count(value) for value in given.values()):
        return
    known = given.get(micro, 1) * given.get(steps, 1)
    if total % known or (len(given) == 2 and total != known):
        factors = " × ".join(f"{key} {value}" for key, value in given.items())
        yield Refuse("batch_size", f"does not go with {factors}; two of the three keys are enough")
    elif len(given) < 2:
        yield Put(f"optimization.{steps if steps not in given else micro}", total // known, "batch_size")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def held_out(settings: Settings) -> bool:
    """Whether the run has evaluation data."""
    return settings.get("val_set_size") not in (None, 0) or bool(settings.get("test_datasets"))


def evaluation(settings: Settings) -> Outcomes:
    """When held-out pairs are scored: after every epoch, unless the user says otherwise."""
    key = "eval_strategy" if "eval_strategy" in settings else "evaluation_strategy"
    if "evaluation_strategy" in settings and key == "eval_strategy":
        yield Refuse("evaluation_strategy", "is the old name of eval_strategy; keep eval_strategy")
    strategy = _strategy(settings.get(key))
    if not held_out(settings):
        yield from _nothing_to_evaluate(key, strategy, settings)
        return
    strategy = yield from _when(("eval_steps", "evals_per_epoch", key), strategy, settings)
    yield Put("evaluation.strategy", strategy or "epoch", key)
    yield from _puts(settings, {"eval_steps": "evaluation.steps", "evals_per_epoch": "evaluation.per_epoch"})


def _nothing_to_evaluate(key: str, strategy: Any, settings: Settings) -> Outcomes:
    data = "needs evaluation data; write val_set_size or test_datasets, or remove it"
    if "eval_steps" in settings:
        yield Refuse("eval_steps", data)
    if strategy not in (None, "no"):
        yield Refuse(key, data)
    if settings.get("evals_per_epoch"):
        yield Note("evals_per_epoch", "there is no evaluation data")


def saving(settings: Settings) -> Outcomes:
    """When checkpoints are written: after every epoch, unless the user says otherwise."""
    key = "save_strategy"
    strategy = yield from _when(
        ("save_steps", "saves_per_epoch", key), _strategy(settings.get(key)), settings
    )
    if strategy == "best" and not (held_out(settings) and "metric_for_best_model" in settings):
        yield Refuse(
            key, "best needs evaluation data and metric_for_best_model, for example eval_rewards/accuracies"
        )
    yield Put("output.save_strategy", strategy or "epoch", key)
    yield from _puts(
        settings, {"save_steps": "output.save_steps", "saves_per_epoch": "output.saves_per_epoch"}
    )


def _strategy(value: Any) -> Any:
    """YAML reads `no` as false."""
    return "no" if value is False else value


def _when(keys: tuple[str, str, str], strategy: Any, settings: Settings) -> Deciding[Any]:
    """Yields contradictions of the three keys and returns the strategy they mean together."""
    steps, per_epoch, key = keys
    if steps in settings and per_epoch in settings:
        yield Refuse(per_epoch, f"contradicts {steps}; keep one of them")
    if strategy not in (None, "no") and settings.get(per_epoch) == 0:
        yield Refuse(per_epoch, f"contradicts {key}: {strategy}; 0 is never: keep one of them")
    for counting in (steps, per_epoch):
        if settings.get(counting) and strategy not in (None, "steps"):
            yield Refuse(key, f"contradicts {counting}; write {key}: steps, or remove one of them")
    counted = steps in settings or bool(settings.get(per_epoch))
    if strategy == "steps" and not counted:
        yield Refuse(key, f"steps needs {steps} or {per_epoch}")
    if strategy is None and settings.get(per_epoch) == 0:
        return "no"
    return "steps" if counted and strategy is None else strategy


def _puts(settings: Settings, targets: dict[str, str]) -> Outcomes:
    """0 a time means never, which the strategy already says."""
    for key, target in targets.items():
        if key in settings and not (key.endswith("_per_epoch") and settings[key] == 0):
            yield Put(target, settings[key], key)


def logging(settings: Settings) -> Outcomes:
    """Which loggers run, what they are told, and the run's name."""
    on = [name for switch, name in LOGGERS.items() if _is_on(switch, name, settings)]
    yield from (
        Refuse(switch, "must be true or false")
        for switch in LOGGERS
        if not isinstance(settings.get(switch, False), bool)
    )
    if on:
        yield Put("output.loggers", on, f"use_{on[0].removesuffix('_ml')}")
    environment: dict[str, str] = {}
    for key, (logger, variable) in ENVIRONMENT.items():
        if _text(settings.get(key)) and (yield from _belongs(key, logger, on, settings)):
            environment[variable] = _text(settings[key])
    if environment:
        yield Put("output.logger_environment", environment, "loggers")
    yield from _names(on, settings)


def _is_on(switch: str, name: str, settings: Settings) -> bool:
    project = [
        key for key in SWITCHES_ON if key.startswith(switch.removeprefix("use_")) and settings.get(key)
    ]
    return bool(settings.get(switch, bool(project)))


def _text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _belongs(key: str, logger: str, on: list[str], settings: Settings) -> Deciding[bool]:
    """Yields what is wrong with a logger's key, and returns whether it counts."""
    switch = next(name for name, value in LOGGERS.items() if value == logger)
    if isinstance(settings[key], dict | list):
        yield Refuse(key, "must be text")
    elif logger in on:
        return True
    elif switch in settings:
        yield Note(key, f"{switch} is false")
    else:
        yield Refuse(key, f"has no effect without {switch}: true; add it, or remove this")
    return False


def _names(on: list[str], settings: Settings) -> Outcomes:
    if settings.get("trackio_project_name") and (
        yield from _belongs("trackio_project_name", "trackio", on, settings)
    ):
        yield Put("output.project", settings["trackio_project_name"], "trackio_project_name")
    names: dict[str, Any] = {}
    for key, logger in RUN_NAMES.items():
        if settings.get(key) and (yield from _belongs(key, logger, on, settings)):
            names[key] = settings[key]
    for key, name in names.items():
        if name != next(iter(names.values())):
            yield Refuse(key, f"contradicts {next(iter(names))}; a run has one name")
    if names:
        yield Put("output.run_name", next(iter(names.values())), next(iter(names)))
