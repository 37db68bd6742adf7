"""The folder a run writes to, looked at before anything is read: may it be written to, what is in it?"""

import os
import shutil
from pathlib import Path

from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError
from fiducial.reference.describe import readable_size
from fiducial.reference.facts import Facts
from fiducial.reference.precision import BYTES, held_precision
from fiducial.reference.trained import count_trained
from fiducial.training.checkpoints import WHOLE_WEIGHTS

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = tuple(name for name in WHOLE_WEIGHTS if name not in ADAPTER_FILES)


def keep_sources(cfg: RunConfig) -> None:
    """Raise `ConfigError` where the run would write over what it, or its reference, starts from."""
    output, asked = Path(cfg.output.output_dir).resolve(), cfg.reference
    sources = {
        "base_model": cfg.model.base_model,
        "lora_model_dir": None if cfg.adapter is None else cfg.adapter.path,
        "reference.model": None if asked.endpoint is not None else asked.model,
        "reference.adapter": asked.adapter,
    }
    for key, location in sources.items():
        if location is None:
            continue
        source = Path(location).resolve()
        below = source.name.startswith("checkpoint-") and output == source.parent
        if below or output == source:
            raise ConfigError(
                f"output_dir: {cfg.output.output_dir} is where {key}: {location} lies, and the run would "
                "write over it: what it was trained from, or compared with, could not be found again. Name "
                "another folder."
            )


def make_output_folder(cfg: RunConfig) -> Path:
    """The run's `output_dir`, as `make_folder` makes it."""
    return make_folder(Path(cfg.output.output_dir), "output_dir", adapter=cfg.adapter is not None)


def require_room(cfg: RunConfig, facts: Facts, *, resuming: bool) -> None:
    """Raise `ConfigError` where the run's weights would not fit on the disk that holds `output_dir`.

    What is certain to be written is counted: the trained model, and the first checkpoint of a run that saves
    some. Weights that are there already may be written over. Without checkpoints a model that finds the disk
    full at the end of training is lost.
    """
    folder, saves = Path(cfg.output.output_dir), cfg.output.save_strategy != "no" and not resuming
    needed = _saved_bytes(cfg, facts) * (2 if saves else 1)
    disk = shutil.disk_usage(folder)
    there = sum(path.stat().st_size for path in folder.rglob("*.safetensors") if path.is_file())
    if needed <= disk.free + there or disk.total == 0:  # some network disks do not tell
        return
    what = "the trained model and a checkpoint of it take" if saves else "the trained model takes"
    without = ", or save no checkpoints (save_strategy: no)" if saves else ""
    raise ConfigError(
        f"output_dir: the disk that holds {folder} has {readable_size(disk.free)} free, and {what} at least "
        f"{readable_size(needed)}. Free space there, name a folder on another disk{without}."
    )


def _saved_bytes(cfg: RunConfig, facts: Facts) -> int:
    precision = held_precision(cfg)
    if cfg.adapter is not None:
        return count_trained(cfg, facts).adapter * precision.adapter
    return facts.model.num_parameters * BYTES[precision.weights] if facts.model.shapes_are_exact else 0


def make_folder(folder: Path, key: str, *, adapter: bool) -> Path:
    """`folder`, which `key` names, made where it is not there yet, for an adapter or a whole model.

    Raises:
        ConfigError: it cannot be written to, or holds weights of the other kind, which programs would load
            for those that are to be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: {folder} is no folder and cannot become one: {error.strerror}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {folder} may not be written to. Allow it, or name another folder.")
    mine, others = ("an adapter", MODEL_FILES) if adapter else ("a whole model", ADAPTER_FILES)
    found = [name for name in others if (folder / name).exists()]
    if found:
        raise ConfigError(
            f"{key}: {folder} holds another run's {found[0]}, and this one leaves {mine}: programs "
            "would take the one for the other. Name another folder, or empty this one."
        )
    return folder
