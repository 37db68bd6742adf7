"""A run's settings as the user wrote them: plain values, and where each one stands.

YAML is read as nodes, so that every value keeps its line; a key written twice is an error; `1e-6` is a
number, as in YAML 1.2 and unlike PyYAML.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fiducial.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""Where a value is: `("datasets", 0, "split")`."""

MOST_NODES = 20_000
"""A run's YAML is a few hundred values; aliases of aliases can mean billions."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written, and as which text."""

    where: str
    """`run.yaml:12`, or the override; empty for settings given from Python."""
    text: str | None = None
    """The scalar as the user wrote it."""


@dataclass(slots=True)
class Document:
    """All settings of a run."""

    values: dict[str, Any]
    places: dict[KeyPath, Place] = field(default_factory=dict)
    source_text: str = ""
    name: str = ""
    """The file they come from."""
    duplicates: list[str] = field(default_factory=list)
    """One line for each key that is written twice, to be reported with everything else."""

    def place(self, path: KeyPath) -> Place:
        """Where `path` was written; where its nearest written ancestor was, if nothing is there."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.name))

    def replace(self, path: KeyPath, places: Mapping[KeyPath, Place]) -> None:
        """Forget everything written under `path`, and remember `places` instead."""
        kept = {old: place for old, place in self.places.items() if old[: len(path)] != path}
        self.places = kept | dict(places)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the floats of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_document(path: str | Path) -> Document:
    """The settings in the YAML file at `path`.

    Raises:
        ConfigError: the file is missing, unreadable, empty, not YAML, or holds something else than keys.
    """
    text = _read_text(Path(path))
    value, reading = read_yaml(text, str(path))
    if value is None:
        raise ConfigError(f"{path} is empty; a run needs at least base_model, rl and datasets.")
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {_kind(value)}, not `key: value` lines.")
    return Document(value, reading.places, text, str(path), reading.duplicates)


def read_yaml(
    text: str, name: str, *, within: KeyPath = (), where: str | None = None
) -> tuple[Any, "Reading"]:
    """The value of one YAML text, and where its parts are.

    Args:
        text: the YAML.
        name: what it is called in errors.
        within: the path the text's root has.
        where: the place of every part; the line by default.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        loader = _Loader(text)
        reading = Reading(loader, name, where)
        node = loader.get_single_node()
        return (None if node is None else reading.value(node, within)), reading
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_problem(error, name, where)) from error


class Reading:
    """Turns the nodes of one text into values, and notes where each was."""

    def __init__(self, loader: _Loader, name: str, where: str | None) -> None:
        self.loader, self.name, self.where = loader, name, where
        self.places: dict[KeyPath, Place] = {}
        self.duplicates: list[str] = []
        self.open: list[yaml.Node] = []
        self.seen: set[int] = set()

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The value of `node`, which stands at `path`."""
        self._mark(node, path)
        if node in self.open or len(self.places) > MOST_NODES:
            raise ConfigError(
                f"{self._line(node)}  the alias repeats itself without end; write the value out."
            )
        self.open.append(node)
        result = self._construct(node, path)
        self.open.pop()
        return result

    def _construct(self, node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == _Loader.DEFAULT_MAPPING_TAG:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _Loader.DEFAULT_SEQUENCE_TAG:
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.loader.construct_object(node, deep=True)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        if id(node) not in self.seen:  # merging rewrites the node, so an aliased one is looked at once
            self._find_duplicates(node, path)
        self.seen.add(id(node))
        self.loader.flatten_mapping(node)
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise ConfigError(f"{self._line(key_node)}  a key must be a word, not {_kind(key)}.")
            result[key] = self.value(value_node, (*path, key))
            self._mark(value_node, (*path, key), line_of=key_node)
        return result

    def _find_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                why = f"written twice, first in line {lines[key]}; keep one"
                self.duplicates.append(f"{self._line(key_node)}  {dotted((*path, key))} — {why}")
            lines[key] = line

    def _mark(self, node: yaml.Node, path: KeyPath, *, line_of: yaml.Node | None = None) -> None:
        text = node.value if isinstance(node, yaml.ScalarNode) else None
        self.places[path] = Place(self._line(line_of or node), text)

    def _line(self, node: yaml.Node) -> str:
        return self.where or f"{self.name}:{node.start_mark.line + 1}"


def dotted(path: Sequence[str | int]) -> str:
    """`datasets.0.split`: a path as overrides write it."""
    return ".".join(str(part) for part in path)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name the run's YAML file.")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        order = " first, and settings after it" if "=" in path.name else ""
        raise ConfigError(f"{path} does not exist; name the run's YAML file{order}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def _yaml_problem(error: yaml.YAMLError, name: str, where: str | None) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    if where is not None:
        return f"{where}  not valid YAML: {what}"
    where = f"{name}:{mark.line + 1}" if mark else name
    return f"{where}  not valid YAML: {what}; mend this line or the one above it."


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else f"the single value {value!r}"
