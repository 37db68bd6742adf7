"""From the user's settings to `RunConfig`: sorts, converts and checks keys, and collects what is wrong."""

import re
from enum import Enum
from pathlib import PurePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from fiducial.config import dialect, method_keys, method_names, nested
from fiducial.config.checks import check
from fiducial.config.document import Document, KeyPath, dotted
from fiducial.config.methods import MixtureConfig
from fiducial.config.outcomes import Key, Note, Outcome, Put, Refuse, as_path
from fiducial.config.schema import DataConfig, RunConfig
from fiducial.config.wording import describe_field
from fiducial.errors import ConfigError


class Translation:
    """One pass over one document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.settings: dict[str, Any] = {}
        self.draft: dict[str, dict[str, Any]] = {"model": {}}
        self.origins: dict[KeyPath, KeyPath] = {}
        self.problems: dict[KeyPath, str] = {}
        self.notes: list[str] = []

    def run(self, problems: list[str]) -> tuple[RunConfig, tuple[str, ...]]:
        """The run and its notes.

        Args:
            problems: lines about mistakes found before, to be reported with the others.

        Raises:
            ConfigError: with one line for every mistake, in the order of the file.
        """
        self._sort_keys()
        self._translate()
        config = self._validate()
        lines = [
            *self.document.duplicates,
            *problems,
            *(self._line(path, why) for path, why in self.problems.items()),
        ]
        if lines or config is None:
            raise ConfigError("\n".join(sorted(lines, key=_line_number)))
        return config, tuple(self.notes)

    def _sort_keys(self) -> None:
        for outcome in nested.check_inside(self.document.values):
            self._take(outcome)
        for key, value in self.document.values.items():
            entry = dialect.unsupported(key) if isinstance(key, str) else None
            if key in dialect.SUPPORTED:
                if value is not None:
                    self.settings[key] = nested.supported_part(_plain(value), key)
            elif entry is None:
                self._refuse(key, f"unknown key; {dialect.suggest(str(key))}")
            elif value is not None:
                harmless = entry.changes_nothing(value)
                self._take(Note(key, entry.why) if harmless else Refuse(key, entry.why))

    def _translate(self) -> None:
        for key, target in dialect.DIRECT.items():
            if key in self.settings:
                self._take(Put(target, self.settings[key], key))
        for first, second in dialect.ONE_FIELD_TWO_KEYS:
            if first in self.settings and second in self.settings:
                self._refuse(second, f"means the same as {first}; keep one of them")
        for convert, _ in dialect.CONVERTED:
            for outcome in convert(self.settings):
                self._take(outcome)
        for outcome in check(self.settings):
            self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        match outcome:
            case Put(target, value, key):
                section, field = target.split(".")
                self.draft.setdefault(section, {})[field] = value
                self.origins[(section, field)] = as_path(key)
            case Refuse(key, why):
                self._refuse(key, why)
            case Note(key, why):
                written = as_path(key)[0] in self.document.values
                self.notes.append(self._line(as_path(key), f"left out: {why}" if written else why))

    def _refuse(self, key: Key, why: str) -> None:
        self.problems.setdefault(as_path(key), why)

    def _validate(self) -> RunConfig | None:
        draft = dict(self.draft)
        if "kind" not in draft.get("adapter", {}):
            draft.pop("adapter", None)  # keys that only an adapter reads were refused or noted
        if "name" not in draft.get("method", {}):
            draft.pop("method", None)
        if "data" in draft and "datasets" not in draft["data"]:
            self._check_data_alone(draft.pop("data"))
        try:
            return RunConfig.model_validate(draft)
        except ValidationError as error:
            self._take_validation_errors(error, ())
            return None

    def _check_data_alone(self, data: dict[str, Any]) -> None:
        """Check the lengths and counts of a run that names no datasets; nothing reads them."""
        try:
            DataConfig.model_validate(data | {"datasets": ()})
        except ValidationError as error:
            self._take_validation_errors(error, ("data",))

    def _take_validation_errors(self, error: ValidationError, section: KeyPath) -> None:
        for details in error.errors():
            location = located(section + details["loc"])
            path = self._user_path(location)
            if details["type"] == "missing":
                self._refuse(path, _REQUIRED.get(str(path[-1]), "is required"))
                continue
            field = field_at(section + details["loc"])
            words = describe_field(field) if field else details["msg"]
            hint = (
                "; put it in quotes"
                if details["type"] == "string_type" and _is_scalar(details["input"])
                else ""
            )
            self._refuse(path, f"must be {words}{hint}")

    def _user_path(self, location: KeyPath) -> KeyPath:
        """The path, in the user's words, of what stands at `location` in `RunConfig`."""
        section_field, inner = location[:2], location[2:]
        key = dialect.KEY_OF.get(dotted(section_field), str(section_field[-1]))
        path = self.origins.get(section_field, (key,))
        if section_field == ("method", "losses") and len(location) > _PART_FIELD:
            return as_path(method_keys.key_of(str(location[_PART_FIELD]), self.settings))
        value = _at(self.document.values, path)
        for part in inner:
            if not isinstance(value, dict | list):
                break
            path, value = (*path, part), _at(value, (part,))
        return path

    def _line(self, path: KeyPath, why: str) -> str:
        place = self.document.place(path)
        value = _at(self.document.values, path)
        text = place.text if path in self.document.places and place.text is not None else _short(value)
        where = f"{place.where}  " if place.where else ""
        return f"{where}{dotted(path)}{'' if value is None else f': {text}'} — {why}"


_UNIONS = (RunConfig.model_fields["method"], MixtureConfig.model_fields["losses"])
"""Fields that hold one of several config classes, whose name pydantic puts after them."""

_PART_FIELD = 4
"""Where the field's name stands in `method.losses.0.hinge.beta`."""

_REQUIRED = {
    "base_model": "is required: write base_model: a local folder or a hub name",
    "path": "is required: a file, a folder or a hub name; with data_files alone, ds_type says what they are",
}


def located(location: KeyPath) -> KeyPath:
    """The location without the method's name, which pydantic puts after `method`."""
    return location[:1] + location[2:] if location[:1] == ("method",) else location


def field_at(location: KeyPath) -> FieldInfo | None:
    """The deepest field of `RunConfig` on the way to `location`."""
    models: list[type[BaseModel]] = [RunConfig]
    found = None
    for part in location:
        if found in _UNIONS and part in method_names.BY_NAME:
            models = [method_names.BY_NAME[str(part)]]
        fields = [
            model.model_fields[part]
            for model in models
            if isinstance(part, str) and part in model.model_fields
        ]
        if fields:
            found = fields[0]
            models = [model for field in fields for model in _models_in(field.annotation)]
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _at(value: Any, path: KeyPath) -> Any:
    """The value at `path`, or None where there is none."""
    for part in path:
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            return None
    return value


def _plain(value: Any) -> Any:
    """`value` with enum members as values, paths as text and tuples as lists, as YAML would give them."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _is_scalar(value: Any) -> bool:
    return value is not None and not isinstance(value, dict | list | tuple)


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, str) else " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line_number(line: str) -> tuple[int, int]:
    """Sorts by line; what has none stands first, overrides last."""
    number = re.match(r".*?:(\d+)  ", line)
    return (1 if line.startswith("override ") else 0, int(number.group(1)) if number else 0)
