"""What a run leaves in its folder so that its reference can be found again: `run.json`. Imports no torch.

It holds the run's settings, its configuration with everything decided that depended on the machine, the
identity of its reference, and what that answered on a few groups. The groups themselves are not in it, only
the keys of their content: a trained model's folder is passed on, and rows are not the folder's to give.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fiducial._version import VERSION
from fiducial.config.dialect import KEY_OF
from fiducial.config.schema import RunConfig
from fiducial.errors import ConfigError, ModelError
from fiducial.reference.differences import changes

RECORD_FILE = "run.json"
FORMAT = 1
"""Raised when the file is written another way."""
_DECIDED = ("model.dtype", "model.autocast")
_KEPT_WITH_STATE = (
    *("optimization.optimizer", "model.unfrozen_parameters", "adapter.r", "adapter.rank_pattern"),
    *("adapter.target_modules", "adapter.target_linear", "adapter.target_parameters"),
    *("adapter.modules_to_save", "adapter.trainable_token_indices", "adapter.ensure_weight_tying"),
    *("adapter.layers_to_transform", "adapter.layers_pattern", "adapter.layer_replication"),
    *("adapter.use_dora", "adapter.bias"),
    *("adapter.alpha", "adapter.alpha_pattern", "adapter.use_rslora", "adapter.init_lora_weights"),
)
"""Settings that say which weights are trained, of which shape, what the optimizer keeps of them, and which
policy an adapter's weights make."""
_ONE_STATE = frozenset({"adamw_torch", "adamw_torch_fused"})
"""Optimizers that keep the same."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probs of a reference on a few groups."""

    keys: tuple[str, ...]
    """Content keys of the completions, group after group."""
    logps: tuple[tuple[float, ...], ...]
    """Of every token of each completion, in nats."""
    tolerance: float
    """What could be rounding when they were scored."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run, and the reference it was compared with."""

    run: RunConfig
    settings: Mapping[str, Any] | None
    """The run in the keys of the YAML dialect; None where it was started from Python with a `RunConfig`."""
    reference: Mapping[str, Any] | None
    """The identity of the reference before step 1; None where the loss has none."""
    start: Answers | None
    base: Mapping[str, Any] | None = None
    """The identity of the base below the adapter, where `reference` is not over it; None if not known."""
    moved: Answers | None = None
    """Of a synced reference, after its last move."""
    moved_weights: str = ""
    """Hash of a synced reference's weights after its last move; empty if not known."""
    running: Mapping[str, float] = field(default_factory=dict)
    """What the loss carried from step to step, as it stood with the weights beside the record."""
    trained_on: str = ""
    """Hash of the training data in its order; empty if not known, as of streamed rows."""
    held_out: str | None = ""
    """Hash of what `val_set_size` kept from training, None where it kept nothing; empty if not known."""
    version: str = VERSION
    id: str = ""
    """The run's own, which it keeps when it is resumed; empty where an older version wrote the record."""
    trained_by: str | None = ""
    """Id of the run whose trained weights lie beside the record: another one's until this run has ended."""

    @property
    def has_ended(self) -> bool:
        """Whether the weights beside the record are this run's."""
        return self.trained_by == self.id

    def trained_on_others(self, now: str) -> bool:
        """Whether rows, or their order, are others than then; `now` is the hash of today's, if known."""
        return bool(self.trained_on and now) and self.trained_on != now

    def held_out_others(self, now: str | None) -> bool:
        """Whether `val_set_size` holds out what it did not then; `now` is the hash of today's."""
        return now is not None and self.held_out not in ("", now)

    def beside_weights_of(self, run: str | None) -> "RunRecord":
        """The record for a folder with the trained weights of the run with that id."""
        return replace(self, trained_by=run)

    def write(self, folder: Path) -> None:
        """Keep the record in `folder`; a reader sees the old one or the new one, never half of one."""
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".{RECORD_FILE}.part"
        aside.write_text(json.dumps(self._as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
        aside.replace(folder / RECORD_FILE)

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": self.version,
            "id": self.id,
            "trained_by": self.trained_by,
            "settings": self.settings,
            "run": self.run.model_dump(mode="json"),
            "reference": self.reference,
            "start": _plain(self.start),
            "base": self.base,
            "moved": _plain(self.moved),
            "moved_weights": self.moved_weights,
            "running": dict(self.running),
            "trained_on": self.trained_on,
            "held_out": self.held_out,
        }


def read_record(folder: Path) -> RunRecord:
    """The record of the run that wrote `folder`, its output folder or one of its checkpoints.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    found = find_record(folder)
    if found is None:
        raise ConfigError(_no_record(folder))
    return found


def find_record(folder: Path) -> RunRecord | None:
    """As `read_record`, but None where there is none."""
    for place in (folder, folder.parent):
        path = place / RECORD_FILE
        if path.is_file():
            return _read(path)
        if not folder.name.startswith("checkpoint-"):
            break
    return None


def own_record(record: RunRecord | None, folder: Path) -> RunRecord | None:
    """`record` where it lies in `folder` itself; a checkpoint's run may have left one of another moment."""
    return record if (folder / RECORD_FILE).is_file() else None


def moved_weights(record: RunRecord | None, folder: Path) -> str:
    """Hash of where a synced reference stood when `folder` was written; empty if not known."""
    own = own_record(record, folder)
    return "" if own is None else own.moved_weights


def no_record_note(folder: Path) -> str:
    """What is not known of trained weights in `folder` without a record, for people."""
    return (
        f"{folder} has no {RECORD_FILE}: whether the reference is the one these weights were trained against "
        "cannot be told."
    )


def run_id(folder: Path) -> str:
    """Id of the run whose record is in `folder`; empty where none is, or it cannot be read."""
    return str(_glance(folder).get("id", ""))


def trained_by(folder: Path) -> str | None:
    """Id of the run whose trained weights the record in `folder` knows; None where there is no record."""
    found = _glance(folder)
    return found.get("trained_by", "") if found else None


def changed_settings(then: RunConfig, now: RunConfig) -> list[str]:
    """What decides a run's result and is another `now` than `then`, each by the key that sets it."""
    return list(_changes(then, now).values())


def require_resumable(checkpoint: Path, then: RunConfig, now: RunConfig) -> None:
    """Raise `ConfigError` where `checkpoint` holds other weights or another optimizer's state than `now` has.

    A reference that follows the policy is among them: without it the run would be back at its start.
    """
    moves = (then.reference.schedule == "synced") != (now.reference.schedule == "synced")
    kept = _KEPT_WITH_STATE + (("reference.schedule",) if moves else ())
    found = {name: words for name, words in _changes(then, now).items() if name in kept}
    if {then.optimization.optimizer, now.optimization.optimizer} <= _ONE_STATE:
        found.pop("optimization.optimizer", None)
    if found:
        raise ConfigError(
            f"{checkpoint} cannot be resumed by this run: {'; '.join(found.values())}. What is saved "
            "there belongs to the old setting. Put it back, or start anew in another "
            "output_dir."
        )


def _changes(then: RunConfig, now: RunConfig) -> dict[str, str]:
    before, after = _settings(then), _settings(now)
    return {
        name: f"{KEY_OF.get(name, name)}: {before.get(name)} then, {after.get(name)} now"
        for name in sorted(before.keys() | after.keys())
        # A record holds what `auto` came to on its machine.
        if before.get(name) != after.get(name) and not (name in _DECIDED and after[name] == "auto")
    }


def require_same_reference(record: RunRecord, now: Mapping[str, Any]) -> tuple[str, ...]:
    """What is computed in another way than when the run started, a phrase each.

    `now` is the identity of the reference as it is loaded today.

    Raises:
        ModelError: it is another policy now.
    """
    if record.reference is None:
        return ()
    found = changes(record.reference, now)
    if found.another:
        raise ModelError(
            f"{now['checkpoint']} is not the reference this run was started with: "
            f"{'; '.join(found.another)}. What was trained was compared with other weights. Put the old ones "
            f"back ({_naming_keys(record.run)}), or start the run anew in another output_dir."
        )
    return found.computed


def _naming_keys(cfg: RunConfig) -> str:
    """The settings that say which weights the reference has."""
    given = cfg.reference.model_dump(include={"endpoint", "model", "revision", "adapter"}, exclude_none=True)
    own = [] if cfg.reference.model is not None else ["base_model", "model_revision"]
    if not given and cfg.adapter is not None and cfg.adapter.path is not None:
        own.append("lora_model_dir")
    return ", ".join([*own, *(f"reference.{key}" for key in given)])


def _settings(cfg: RunConfig) -> dict[str, Any]:
    """`section.field` to its value, of the sections that decide a result."""
    sections = cfg.model_dump(mode="json", exclude={"output", "distributed"}, exclude_none=True)
    return {
        f"{section}.{field}": value for section, fields in sections.items() for field, value in fields.items()
    }


def _glance(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(path: Path) -> RunRecord:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(
                f"{path} has format {found['format']}, of Fiducial {found['version']}; this is {VERSION}, "
                f"which reads format {FORMAT}. Use the version that wrote it."
            )
        return RunRecord(
            run=RunConfig.model_validate(found["run"]),
            settings=found["settings"],
            reference=found["reference"],
            start=_answers(found["start"]),
            base=found.get("base"),
            moved=_answers(found["moved"]),
            moved_weights=found.get("moved_weights", ""),
            running={name: float(value) for name, value in found.get("running", {}).items()},
            trained_on=found.get("trained_on", ""),
            held_out=found.get("held_out", ""),
            version=found["version"],
            id=found.get("id", ""),
            trained_by=found.get("trained_by", ""),
        )
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(
            f"{path} is damaged or was not written by Fiducial ({type(error).__name__}). Name the run's YAML "
            "file instead."
        ) from error


def _no_record(folder: Path) -> str:
    if not folder.exists():
        return (
            f"{folder} does not exist; name a run's YAML file, its output folder, or one of its checkpoints."
        )
    inside = sorted(path.parent.name for path in folder.glob(f"*/{RECORD_FILE}"))
    if inside:
        return f"{folder} is no run's folder, but holds {', '.join(inside[:3])}; name one of those."
    return (
        f"{folder} holds no {RECORD_FILE}, so no run of Fiducial began there. Name the run's YAML file, its "
        "output folder, or one of its checkpoints."
    )


def _plain(answers: Answers | None) -> dict[str, Any] | None:
    if answers is None:
        return None
    return {
        "keys": list(answers.keys),
        "logps": [list(values) for values in answers.logps],
        "tolerance": answers.tolerance,
    }


def _answers(found: Mapping[str, Any] | None) -> Answers | None:
    if found is None:
        return None
    rows: Sequence[Sequence[float]] = found["logps"]
    logps = tuple(tuple(float(value) for value in row) for row in rows)
    return Answers(tuple(found["keys"]), logps, float(found["tolerance"]))
