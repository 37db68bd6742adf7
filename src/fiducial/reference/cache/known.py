"""Which records a run will find, told before its weights are loaded. Imports no torch.

An identity is a hash of weights. Where a run has computed it, it is remembered for the files it came from
(name, size, time of change) and the settings that shape what is loaded, so that the next plan only looks it
up. It is a hint for people: every run computes its identity itself. A served reference is known by its names.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fiducial._version import VERSION
from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.reference.cache.names import ShardName
from fiducial.reference.cache.places import local_folder
from fiducial.reference.checkpoint import open_checkpoint
from fiducial.reference.identity import identify_served
from fiducial.reference.kinds import ReferencePlan, Source
from fiducial.reference.precision import sees_gpu

_FOLDER = "known"
_READ_BY_LOADER = (".safetensors", ".bin", ".json")
_SHAPES_ROWS = {"path", "special_tokens", "tokens", "resize_embeddings_to_32x", "mean_resizing_embeddings"}
"""Settings of the tokenizer by which embeddings grow, and what their new rows are."""


def remember(cfg: RunConfig, plan: ReferencePlan, identity: str) -> None:
    """Keep the identity of a run's reference for the plans of later runs. Nothing depends on it."""
    path = _path(cfg, plan)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{identity}.part")
        aside.write_text(json.dumps({"identity": identity}), encoding="utf-8")
        aside.replace(path)
    except OSError:  # a cache one may only read: plans of its users say nothing of it
        return


def known_records(cfg: RunConfig, plan: ReferencePlan) -> int | None:
    """Records of the run's reference that this machine holds; None if its identity is not known yet."""
    try:
        identity = _known_identity(cfg, plan)
        if identity is None:
            return None
        folder = local_folder(cfg.reference.cache) / identity
        return sum(name.records for file in folder.iterdir() if (name := ShardName.parse(file.name)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _known_identity(cfg: RunConfig, plan: ReferencePlan) -> str | None:
    if plan.source is Source.ENDPOINT:
        assert plan.checkpoint is not None, "a server was named"
        return identify_served(plan.checkpoint).digest
    path = _path(cfg, plan)
    return None if path is None else str(json.loads(path.read_text(encoding="utf-8"))["identity"])


def _path(cfg: RunConfig, plan: ReferencePlan) -> Path | None:
    if not plan.kept or plan.checkpoint is None:
        return None
    if plan.source is Source.ENDPOINT:  # its name is no place of files
        return None
    files = list(_files(cfg, plan))
    if not files:
        return None
    parts = json.dumps([files, _settings(cfg, plan), VERSION, sees_gpu()], sort_keys=True, default=str)
    name = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    return local_folder(cfg.reference.cache) / _FOLDER / f"{name}.json"


def _settings(cfg: RunConfig, plan: ReferencePlan) -> dict[str, Any]:
    """Everything that shapes the weights and their precision; a training setting has no place here."""
    adapter = None if plan.source is Source.ADAPTER_OFF or cfg.adapter is None else cfg.adapter.model_dump()
    rows = cfg.tokenizer.model_dump(include=_SHAPES_ROWS, exclude_defaults=True)
    draws = cfg.model.reinit_weights or rows or adapter is not None
    return {
        "model": cfg.model.model_dump(),
        "rows": rows,
        "adapter": adapter,
        "source": plan.source,
        "reference": cfg.reference.model_dump(exclude={"source", "schedule", "cache", "flush_seconds"}),
        "seed": cfg.optimization.seed if draws else None,
    }


def _files(cfg: RunConfig, plan: ReferencePlan) -> Iterator[tuple[str, int, int]]:
    """The files the reference is loaded from, as they are now; none where they are not at hand."""
    assert plan.checkpoint is not None
    adapter = None if plan.source is Source.ADAPTER_OFF else plan.checkpoint.adapter
    for location in filter(None, (plan.checkpoint.path, adapter)):
        try:
            config = open_checkpoint(location, plan.checkpoint.revision, key="base_model")
        except ModelError:
            return
        at_hand = config.folder or config.find("config.json")
        folder = at_hand if at_hand is None or at_hand.is_dir() else at_hand.parent
        for path in sorted(folder.iterdir()) if folder is not None else ():
            if path.suffix in _READ_BY_LOADER:
                found = path.stat()
                yield str(path.absolute()), found.st_size, found.st_mtime_ns
