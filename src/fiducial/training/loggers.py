"""The loggers a run reports to: there before anything is loaded, and plain about what stops them.

transformers drives them (its `report_to`). What it leaves to an exception in the middle of a run is checked
or explained here: a package that is not installed, MLflow's store, a key or an address a service refuses.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb

from transformers import Trainer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fiducial.config.schema import OutputConfig
from fiducial.errors import ConfigError, FiducialError, TrainingError


@dataclass(frozen=True, slots=True)
class Logger:
    """What a user is told of a logger."""

    key: str
    """The YAML key that switches it on."""
    packages: tuple[str, ...]
    """Modules of which one must be there."""
    install: str
    """What pip calls it."""
    remedy: str


LOGGERS: Mapping[str, Logger] = {
    "wandb": Logger(
        "use_wandb",
        ("wandb",),
        "wandb",
        "Run `wandb login`, or set wandb_mode: offline and sync the run later",
    ),
    "tensorboard": Logger(
        "use_tensorboard",
        ("tensorboard", "tensorboardX"),
        "tensorboard",
        "Make sure that output_dir can be written",
    ),
    "mlflow": Logger(
        "use_mlflow",
        ("mlflow",),
        "mlflow",
        "Set mlflow_tracking_uri to a server (http://…) or a database (sqlite:///mlflow.db, which needs the "
        "whole mlflow package)",
    ),
    "comet_ml": Logger("use_comet", ("comet_ml",), "comet-ml", "Set COMET_API_KEY, or comet_online: false"),
    "trackio": Logger(
        "use_trackio",
        ("trackio",),
        "trackio",
        "Check trackio_project_name and trackio_space_id, without which everything stays on this machine",
    ),
    "swanlab": Logger(
        "use_swanlab", ("swanlab",), "swanlab", "Run `swanlab login`, or set swanlab_mode: local"
    ),
}
"""By transformers' name."""


def require_loggers(names: Sequence[str]) -> None:
    """Find out that a logger's package is missing before anything is read or loaded.

    Raises:
        ConfigError: one is not installed.
    """
    missing = [
        LOGGERS[name]
        for name in names
        if not any(importlib.util.find_spec(package) for package in LOGGERS[name].packages)
    ]
    if missing:
        keys = ", ".join(logger.key for logger in missing)
        packages = " ".join(logger.install for logger in missing)
        raise ConfigError(f"{keys}: not installed here. Run pip install {packages}, or remove the key.")


@contextmanager
def reporting(output: OutputConfig) -> Iterator[None]:
    """Inside, loggers read the run's settings, and what one of them raises becomes a `TrainingError`."""
    before = dict(os.environ)
    chosen = environment(output)
    os.environ.update(chosen)
    try:
        yield
    except FiducialError:
        raise
    except Exception as error:  # each package has its own; what does not come from a logger passes unchanged
        name = _raised_in(error, output.loggers)
        if name is None:
            raise
        logger = LOGGERS[name]
        raise TrainingError(
            f"{logger.key}: {logger.install} stopped with {type(error).__name__}: {str(error).strip()}\n"
            f"{logger.remedy}, or remove {logger.key}."
        ) from error
    finally:  # the next run of this process may say something else
        for variable in chosen:
            os.environ.pop(variable, None)
            if variable in before:
                os.environ[variable] = before[variable]


def environment(output: OutputConfig) -> dict[str, str]:
    """The variables the loggers read: what the run sets, and where MLflow keeps its runs.

    MLflow's own default is a file in whatever folder the run is started from, or, where an older version left
    an `mlruns` folder, a kind of store that it now refuses to write. Here it is one database file for each
    output folder.
    """
    chosen = dict(output.logger_environment)
    uri = "MLFLOW_TRACKING_URI"
    if "mlflow" in output.loggers and uri not in chosen and not os.environ.get(uri):
        folder = Path(output.output_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        chosen[uri] = f"sqlite:///{folder / 'mlflow.db'}"
    return chosen


def close_loggers(trainer: Trainer) -> None:
    """They ended their run with training; what came later would begin another one (MLflow, trackio)."""
    for name in LOGGERS:
        trainer.remove_callback(INTEGRATION_TO_CALLBACK[name])


def _raised_in(error: BaseException, names: Sequence[str]) -> str | None:
    """Whose callback of transformers was running when `error` was raised."""
    owners = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    for name in names:
        if any(isinstance(owner, INTEGRATION_TO_CALLBACK[name]) for owner in owners):
            return name
    return None
