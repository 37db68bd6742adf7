"""Reads a run: YAML or a mapping, checked as a whole, into one typed `RunConfig`.

Every mistake is found before any is reported, and each is one line: where, key and value, why, what to write
instead. `key: null` and an absent key are the same. Paths stay as the user wrote them, relative to the
working directory; only `~` becomes the user's home.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fiducial.config.default_dict import DictDefault
from fiducial.config.document import Document, read_document
from fiducial.config.overrides import apply_overrides
from fiducial.config.schema import RunConfig
from fiducial.config.translation import Translation
from fiducial.errors import ConfigError

__all__ = ["DictDefault", "LoadedRun", "load_config", "load_run", "validate_config"]


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A checked run, and how it was written."""

    config: RunConfig
    notes: tuple[str, ...]
    """Keys that were left out because they cannot change the result, and assumptions; one line each."""
    source_text: str
    """The YAML as the user wrote it, without overrides."""
    settings: Mapping[str, Any]
    """The keys of the dialect with the overrides laid over them."""


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Read the YAML at `path`, lay `overrides` (`key=value`) over it, and check everything.

    Raises:
        ConfigError: the file or an override cannot be read, or a key is wrong; all mistakes are listed.
    """
    document = read_document(path)
    problems = apply_overrides(document, tuple(overrides))
    config, notes = Translation(document).run(problems)
    return LoadedRun(config, notes, document.source_text, document.values)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The typed run in the YAML at `path`, as `load_run` reads it."""
    return load_run(path, overrides).config


def validate_config(settings: Mapping[str, Any] | RunConfig) -> RunConfig:
    """The typed run in `settings`, which hold the keys of the YAML dialect.

    A `DictDefault`, any other mapping, or a `RunConfig`, which is returned as it is. `base_model` alone is
    required, so that a part of a run can be checked; `fiducial train` asks for what it needs beyond that.

    Raises:
        ConfigError: a key is wrong; the message lists all mistakes.
    """
    if isinstance(settings, RunConfig):
        return settings
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{settings!r} is no run: give a mapping of its keys; a YAML file is read by load_config(path)."
        )
    return Translation(Document(DictDefault(settings).to_dict())).run([])[0]
