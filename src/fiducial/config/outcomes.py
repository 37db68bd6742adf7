"""What reading one of the user's keys can lead to. Conversions and checks are pure: they yield these."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fiducial.config.document import KeyPath

Key = str | KeyPath
"""A top-level key, or the path of a nested one."""


@dataclass(frozen=True, slots=True)
class Put:
    """A value of the typed run."""

    target: str
    """`section.field` of `RunConfig`."""
    value: Any
    key: Key
    """Whose value it is, for errors."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """A mistake: why the key's value cannot stand, and what to write instead."""

    key: Key
    why: str


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was left out or assumed, and that cannot change what the user asked for."""

    key: Key
    why: str


Outcome = Put | Refuse | Note
Outcomes = Iterator[Outcome]

T = TypeVar("T")
Deciding = Generator[Outcome, None, T]
"""Yields outcomes on the way to a decision, which it returns."""

Settings = Mapping[str, Any]
"""The user's settings that are set, by top-level key."""


def as_path(key: Key) -> KeyPath:
    """`key` as a path."""
    return key if isinstance(key, tuple) else (key,)
