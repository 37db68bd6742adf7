"""What the first rows of a dataset look like, column by column: all that `type: auto` decides by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fiducial.config.schema import DatasetConfig

Kind = Literal["text", "texts", "message", "messages", "mixed", "empty", "other"]

ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value")
LABEL_COLUMNS = ("label", "kto_tag")
_ROLE, _CONTENT = (rf"""["']({"|".join(keys)})["']\s*:""" for keys in (ROLE_KEYS, CONTENT_KEYS))
_WRITTEN_CHAT = re.compile(rf"""\s*\[?\s*\{{\s*({_ROLE}.*{_CONTENT}|{_CONTENT}.*{_ROLE})""", re.DOTALL)
"""How the JSON text, or Python's, of a message or a list of them begins; one key alone may be an answer."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Columns of a dataset and the kind of value each holds."""

    kinds: Mapping[str, Kind]
    rows: Sequence[Mapping[str, Any]]
    """The rows that were looked at."""
    names: Mapping[str, str]
    """Columns the YAML renames: option to column."""

    def column(self, option: str) -> str:
        """The column an option is read from."""
        return self.names.get(option, option)

    def kind(self, option: str) -> Kind | None:
        """What the option's column holds; None where there is no such column."""
        return self.kinds.get(self.column(option))

    def holds_written_chats(self, column: str) -> bool:
        """Whether every cell is the text of a conversation, as CSV files hold them, and not one itself."""
        cells = [value for row in self.rows if (value := row.get(column)) is not None]
        return bool(cells) and all(isinstance(value, str) and _WRITTEN_CHAT.match(value) for value in cells)

    @property
    def is_labelled(self) -> bool:
        """Whether rows hold a label, and no pair."""
        labels = (self.names["label"],) if "label" in self.names else LABEL_COLUMNS
        has_label = any(column in self.kinds for column in labels)
        return has_label and self.kind("chosen") is None is self.kind("rejected")


def look_at(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], config: DatasetConfig) -> Shape:
    """The shape of a dataset's first rows."""
    properties = config.message_property_mappings or {}
    role_keys = (properties["role"],) if "role" in properties else ROLE_KEYS
    content_keys = (properties["content"],) if "content" in properties else CONTENT_KEYS

    def is_message(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and any(key in value for key in role_keys)
            and any(key in value for key in content_keys)
        )

    def kind(value: Any) -> Kind:
        if isinstance(value, str):
            return "text"
        if is_message(value):
            return "message"
        if isinstance(value, list) and all(is_message(item) for item in value):
            return "messages"
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return "texts"
        return "other"

    def column_kind(name: str) -> Kind:
        kinds = {kind(value) for row in rows if (value := row.get(name)) is not None and value != []}
        if not kinds:
            return "empty"
        return kinds.pop() if len(kinds) == 1 else "mixed"

    options = ("prompt", "chosen", "rejected", "completion", "completions", "label", "system", "messages")
    own = config.type if isinstance(config.type, Mapping) else {}
    given = {option: getattr(config, f"field_{option}") or own.get(f"field_{option}") for option in options}
    names = {option: str(name) for option, name in given.items() if name is not None}
    return Shape({name: column_kind(name) for name in columns}, rows, names)
