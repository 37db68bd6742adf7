"""A finished run found again from its folder: its record, its trained weights, and whether they fit.

A folder is a run's output folder or one of its checkpoints. What is wrong with it is said before any weight
is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiducial.config.document import Document
from fiducial.config.overrides import apply_overrides
from fiducial.config.schema import RunConfig
from fiducial.config.translation import Translation
from fiducial.errors import ConfigError, ModelError
from fiducial.reference.adapter_facts import check_adapter_fits, read_adapter_facts
from fiducial.reference.checkpoint import TensorFact, open_checkpoint, read_sharded_tensor_facts
from fiducial.reference.facts import Facts
from fiducial.run_record import RECORD_FILE, RunRecord, find_record, read_record
from fiducial.training.checkpoints import (
    SHARDED_WEIGHTS,
    STATE_FILE,
    WHOLE_WEIGHTS,
    last_complete,
    read_state,
)

_HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run that has written something."""

    cfg: RunConfig
    """Its configuration, in the precision it was trained in."""
    folder: Path
    """Where its trained weights are."""
    record: RunRecord | None
    """None where an older version, or another program, wrote the folder."""
    new_data: bool = False
    """Whether `datasets` are not those it was trained on."""


def from_folder(folder: Path, overrides: Sequence[str] = ()) -> FinishedRun:
    """The run that wrote `folder`, with `overrides` (`key=value`) laid over its settings.

    Raises:
        ConfigError: there is no record of a run, or an override is wrong.
        ModelError: the folder was left half-written, or its weights are another run's.
    """
    record = read_record(folder)
    require_whole(folder)
    _require_own_weights(folder, record)
    cfg = _overridden(record, folder, tuple(overrides)) if overrides else record.run
    return FinishedRun(_as_trained(cfg, record), folder, record, _names_datasets(overrides))


def from_config(cfg: RunConfig, folder: Path | None = None, *, new_data: bool = False) -> FinishedRun:
    """The run `cfg` describes, which wrote `folder` or its output folder.

    Raises:
        ModelError: there are no trained weights, they were left half-written, or another run left them.
    """
    folder = folder or Path(cfg.output.output_dir)
    require_whole(folder)
    record = find_record(folder)
    if record is not None:
        _require_own_weights(folder, record)
    return FinishedRun(cfg if record is None else _as_trained(cfg, record), folder, record, new_data)


def require_whole(folder: Path) -> None:
    """Raise `ModelError` where `folder` has no trained weights, or only a part of them."""
    found = [name for name in (*WHOLE_WEIGHTS, *SHARDED_WEIGHTS) if (folder / name).exists()]
    if not found:
        raise ModelError(f"{folder} holds no trained model: train the run first, or name its checkpoint.")
    if folder.name.startswith("checkpoint-") and read_state(folder) is None:
        raise ModelError(
            f"{folder} was cut off while it was written: its {STATE_FILE} is missing or incomplete. Name the "
            "checkpoint before it."
        )


def _require_own_weights(folder: Path, record: RunRecord) -> None:
    """Raise `ModelError` where the run that began last in `folder` has not left its weights there yet."""
    if record.has_ended:
        return
    newest = last_complete(folder)
    remedy = "Let it end" if newest is None else f"Name its checkpoint {newest}, or let it end"
    raise ModelError(
        f"the run that began last in {folder} has not ended, and the weights there are an earlier run's. "
        f"{remedy} (auto_resume_from_checkpoints: true)."
    )


def require_fits(folder: Path, cfg: RunConfig, facts: Facts) -> None:
    """Compare the trained weights in `folder` with the run's base, by names and shapes.

    Raises:
        ModelError: they are damaged, or of another model.
    """
    if (folder / "adapter_config.json").is_file():
        if cfg.adapter is None:
            raise ModelError(f"{folder} holds an adapter, and the run trains all weights. Set adapter: lora.")
        trained = read_adapter_facts(str(folder), allow_pickle=False)
        stored = facts.model.tensors if facts.model.shapes_are_exact else None
        check_adapter_fits(trained, facts.model.location, stored, tied=facts.model.tied_embeddings)
        return
    if any((folder / name).exists() for name in (*SHARDED_WEIGHTS, "latest")):
        return  # shards have no names to compare before they are put together
    if cfg.adapter is not None:
        raise ModelError(f"{folder} holds a whole model, and the run trains an adapter. Remove adapter.")
    checkpoint = open_checkpoint(str(folder), None, key="output_dir")
    tensors = read_sharded_tensor_facts(checkpoint, "model")
    if tensors is not None and facts.model.shapes_are_exact and (why := _misfit(tensors, facts)):
        raise ModelError(
            f"{folder} was not trained from base_model {facts.model.location}: {why}. Set base_model to the "
            "one it was trained from."
        )


def _misfit(trained: Mapping[str, TensorFact], facts: Facts) -> str | None:
    """The first weight that is not the base's; rows of new tokens may have been added."""
    base = facts.model.tensors
    for name, fact in base.items():
        found = trained.get(name)
        if found is None:
            return f"it has no {name}"
        if found.shape[1:] != fact.shape[1:] or found.shape[:1] < fact.shape[:1]:
            return f"{name} is {_times(found)} there and {_times(fact)} in the base"
    new = [name for name in trained if name not in base and not name.endswith(_HEADS)]
    return f"the base has no {new[0]}" if new else None


def _times(fact: TensorFact) -> str:
    return " × ".join(map(str, fact.shape))


def _overridden(record: RunRecord, folder: Path, overrides: tuple[str, ...]) -> RunConfig:
    if record.settings is None:
        raise ConfigError(
            f"{folder / RECORD_FILE}: the run was started from Python with a RunConfig, so `key=value` "
            "settings have nothing to be laid over. Call fiducial.evaluate with a changed RunConfig."
        )
    settings: dict[str, Any] = dict(record.settings)
    document = Document(settings, name=str(folder / RECORD_FILE))
    return Translation(document).run(apply_overrides(document, overrides))[0]


def _names_datasets(overrides: Sequence[str]) -> bool:
    return any(override.partition("=")[0].partition(".")[0] == "datasets" for override in overrides)


def _as_trained(cfg: RunConfig, record: RunRecord) -> RunConfig:
    """`cfg` with `auto` precisions as they were decided then: on another machine they may mean others."""
    decided = record.run.model
    pinned: dict[str, Any] = {}
    if cfg.model.dtype == "auto":
        pinned["dtype"] = decided.dtype
    if cfg.model.autocast == "auto":
        pinned["autocast"] = decided.autocast
    return cfg.model_copy(update={"model": cfg.model.model_copy(update=pinned)}) if pinned else cfg
