"""`key=value` settings of the command line, laid over a run's YAML.

The key is a dotted path with list positions (`datasets.0.split='train[:100]'`); the value is read as YAML.
"""

import re
from typing import Any

from fiducial.config.document import Document, KeyPath, Place, dotted, read_yaml
from fiducial.errors import ConfigError

_BRACKETS = re.compile(r"\[(\d+)\]")


def apply_overrides(document: Document, overrides: tuple[str, ...]) -> list[str]:
    """Set every override in `document`, later ones last; returns one line for each that cannot be set."""
    problems = []
    for override in overrides:
        try:
            _apply(document, override)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _apply(document: Document, override: str) -> None:
    where = f"override '{override}'"
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{where}  not of the form key=value; write for example rl_beta=0.2")
    if key.startswith("-"):
        raise ConfigError(f"{where}  overrides have no dashes; write {override.lstrip('-')}")
    path = _path(key.strip(), where)
    value, reading = read_yaml(text, where, within=path, where=where)
    container = _container(document, path, where)
    _set(container, path, value, where)
    document.replace(path, reading.places or {path: Place(where, "null")})
    document.duplicates.extend(reading.duplicates)


def _path(key: str, where: str) -> KeyPath:
    with_dots = _BRACKETS.sub(r".\1", key)
    if with_dots != key:
        raise ConfigError(f"{where}  positions follow a dot; write {with_dots}=...")
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _container(document: Document, path: KeyPath, where: str) -> Any:
    """The mapping or list that holds the last part of `path`; mappings on the way are made where absent."""
    current: Any = document.values
    for depth, part in enumerate(path[:-1]):
        here = path[: depth + 1]
        if isinstance(current, dict):
            if current.get(part) is None:
                _refuse_position(path, depth + 1, where)
                current[part] = {}
                document.places[here] = Place(where)
            current = current[part]
        else:
            current = _item(current, here, where)
    return current


def _refuse_position(path: KeyPath, depth: int, where: str) -> None:
    if isinstance(path[depth], int):
        listed = dotted(path[:depth])
        raise ConfigError(f"{where}  {listed} is no list yet; write {listed}='[...]'")


def _item(container: Any, path: KeyPath, where: str) -> Any:
    """The item at `path`; one more mapping is added where it comes right after the last."""
    position = _position(container, path, where)
    if position > len(container):
        raise ConfigError(f"{where}  {dotted(path[:-1])} has {_count(container)}; positions count from 0")
    if position == len(container):
        container.append({})
    return container[position]


def _set(container: Any, path: KeyPath, value: Any, where: str) -> None:
    if isinstance(container, dict):
        container[path[-1]] = value
        return
    position = _position(container, path, where)
    if position > len(container):
        add = f"write {dotted(path[:-1])}.{len(container)} to add one more"
        raise ConfigError(f"{where}  {dotted(path[:-1])} has {_count(container)}; {add}")
    container[position : position + 1] = [value]


def _position(container: Any, path: KeyPath, where: str) -> int:
    """The last part of `path`, which must be a position in the list `container`."""
    parent, position = dotted(path[:-1]), path[-1]
    if not isinstance(container, list):
        raise ConfigError(f"{where}  {parent} is {container!r}; it has no part {position!r}")
    if not isinstance(position, int):
        raise ConfigError(f"{where}  {parent} is a list; name the item, for example {parent}.0.{position}")
    return position


def _count(container: list[Any]) -> str:
    return f"{len(container)} item{'' if len(container) == 1 else 's'}"
