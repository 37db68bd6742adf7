"""Which checkpoint a run resumes from, and what a full disk means for one being written.

transformers writes a checkpoint's state file last, so a folder without a readable one was cut off while it
was written. It is never resumed from; the complete one before it is.
"""

import errno
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiducial.errors import ConfigError, FiducialError, ModelError, TrainingError
from fiducial.reference.checkpoint import CheckpointFiles, read_sharded_tensor_facts
from fiducial.run_record import run_id

_FULL_DISK_WORDS = (
    "No space left on device",
    "os error 28",
    "PytorchStreamWriter failed writing",
    ". unexpected pos ",  # how torch finds out when it closes a zip file that was cut short
)
STATE_FILE = "trainer_state.json"
NUM_PROCESSES = "num_processes"
"""Under which name a callback keeps in `STATE_FILE` how many processes there were."""
WHOLE_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
SHARDED_WEIGHTS = ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_0")
"""What a run with `fsdp_version` resumes from, for each `state_dict_type`; whole weights may lie beside."""
_CONFIGS = ("config.json", "adapter_config.json")
_OPTIMIZER = ("optimizer.pt",)
_SHARDED_OPTIMIZER = ("optimizer.bin", "optimizer_0")
"""Without its state transformers starts optimizer and schedule anew, and says nothing."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a run is spread over processes: a checkpoint is resumed exactly only by the same."""

    num_processes: int = 1
    sharded: bool = False


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """The trainer's state saved in `checkpoint`, or None where it is missing or cut off."""
    return _read_json(checkpoint / STATE_FILE)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def saved_callback_states(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """By class name, what callbacks keep in `checkpoint`; nothing where another program wrote it."""
    states = (read_state(checkpoint) or {}).get("stateful_callbacks", {})
    # transformers keeps a list where there are several callbacks of one class.
    return {name: state for name, state in states.items() if isinstance(state, dict)}


def missing_from(checkpoint: Path, launch: Launch = Launch()) -> list[str]:
    """What `checkpoint` lacks for an exact resume by `launch`; empty where it is complete.

    A file that was cut short counts as missing: copying it was interrupted, or the power failed.
    """
    wanted, saved_by = launch.num_processes, _saved_by(checkpoint)
    if saved_by not in (None, wanted):
        return [f"states saved by {wanted} process(es) and has those of {saved_by}"]
    states = ["rng_state.pth"] if wanted == 1 else [f"rng_state_{rank}.pth" for rank in range(wanted)]
    missing = [name for name in ("scheduler.pt", *states) if not _is_whole(checkpoint / name)]
    written = (name for name in _CONFIGS if (checkpoint / name).exists())
    missing += [name for name in (*written, STATE_FILE) if _read_json(checkpoint / name) is None]
    return missing + (_missing_weights(checkpoint, launch) or _missing_optimizer(checkpoint, launch))


def _saved_by(checkpoint: Path) -> int | None:
    """How many processes wrote `checkpoint`, or None where it does not say.

    Its files do not tell: a folder may still hold the states of an earlier run's further processes.
    """
    for state in saved_callback_states(checkpoint).values():
        if (number := state.get("args", {}).get(NUM_PROCESSES)) is not None:
            return int(number)
    return None


def _missing_weights(checkpoint: Path, launch: Launch) -> list[str]:
    whole, sharded = (
        any((checkpoint / name).exists() for name in names) for names in (WHOLE_WEIGHTS, SHARDED_WEIGHTS)
    )
    if not (whole or sharded):
        return ["weights"]
    if sharded != launch.sharded:
        return [f"weights saved {'with' if launch.sharded else 'without'} fsdp_version"]
    return [] if launch.sharded or _has_whole_weights(checkpoint) else ["whole weights"]


def _has_whole_weights(checkpoint: Path) -> bool:
    files = CheckpointFiles("resume_from_checkpoint", str(checkpoint), None, checkpoint)
    try:
        for name in ("model", "adapter_model"):
            read_sharded_tensor_facts(files, name)
    except ModelError:  # it says which file and why; here another checkpoint is looked for
        return False
    return True


def _missing_optimizer(checkpoint: Path, launch: Launch) -> list[str]:
    names = _SHARDED_OPTIMIZER if launch.sharded else _OPTIMIZER
    return [] if any(_is_whole(checkpoint / name) for name in names) else [names[0]]


def _is_whole(path: Path) -> bool:
    """Whether torch saved `path` to its end: a zip archive's last bytes list what is in it."""
    return path.is_dir() or zipfile.is_zipfile(path)


def last_complete(output_dir: Path, launch: Launch = Launch()) -> Path | None:
    """The newest complete checkpoint in `output_dir` of the run that began there last, if there is one."""
    own = _newest_first(output_dir)
    return next((path for path in own if not missing_from(path, launch)), None)


def _newest_first(output_dir: Path) -> list[Path]:
    """The checkpoints of the run that began in `output_dir` last, whether complete or not."""
    numbered = [
        (int(found[1]), path)
        for path in output_dir.glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    ours = run_id(output_dir)
    return [path for _, path in sorted(numbered, reverse=True) if not _is_another_runs(path, ours)]


def _is_another_runs(checkpoint: Path, ours: str) -> bool:
    """Whether `checkpoint` is left over from a run before the one that began in its folder last."""
    theirs = run_id(checkpoint)
    return bool(ours and theirs) and ours != theirs


def to_resume(
    resume_from: str | None, *, auto: bool, output_dir: Path, launch: Launch = Launch()
) -> Path | None:
    """The checkpoint folder the run goes on from, or None to start at step 0.

    Raises:
        ConfigError: the checkpoint that was named is not there or not complete; or there are some to go on
            from, but not for this launch: to begin anew would write over them.
    """
    if resume_from is not None:
        _require_complete(Path(resume_from), launch, key="resume_from_checkpoint")
        return Path(resume_from)
    newest = last_complete(output_dir, launch) if auto else None
    if auto and newest is None:
        # One without a state was cut off while it was written, and is worth nothing.
        for path in _newest_first(output_dir):
            if read_state(path) is not None:
                _require_complete(path, launch, key="auto_resume_from_checkpoints")
    return newest


def _require_complete(path: Path, launch: Launch, *, key: str) -> None:
    if missing := missing_from(path, launch):
        lacks = f"lacks {_named(path, missing)}" if path.is_dir() else "is not there"
        instead = last_complete(path.parent, launch)
        advice = (
            f"Use resume_from_checkpoint: {instead}."
            if instead is not None and instead != path
            else "Remove the key to start from the beginning."
        )
        raise ConfigError(
            f"{key}: {path} cannot be resumed exactly by {launch.num_processes} "
            f"process(es): it {lacks}. {advice}"
        )


def _named(checkpoint: Path, missing: list[str]) -> str:
    return ", ".join(f"a whole {name}" if (checkpoint / name).exists() else name for name in missing)


@contextmanager
def full_disk_explained(output_dir: Path, launch: Launch = Launch()) -> Iterator[None]:
    """Turn a write that failed for want of space into a `TrainingError` that says where and what to do."""
    try:
        yield
    except FiducialError:  # it says already what cannot be written, and where
        raise
    except Exception as error:  # every writer has its own exception type; all others pass on unchanged
        if not is_full_disk(error):
            raise
        good = last_complete(output_dir, launch)
        resume = f" Then resume with resume_from_checkpoint: {good}." if good is not None else ""
        raise TrainingError(
            f"The disk that holds {output_dir} is full; what was being written is incomplete, everything "
            "before it is intact. Free space there, set output_dir to another disk, or keep fewer "
            f"checkpoints with save_total_limit.{resume}"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of space.

    By error number where there is one; safetensors and torch's zip writer only have words.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(error) for words in _FULL_DISK_WORDS):
        return True
    return error.__context__ is not None and is_full_disk(error.__context__)
