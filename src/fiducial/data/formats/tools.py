"""What an assistant could call in a row's conversation, told to the chat template."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fiducial.data.example import OddRow, Reason, Tool
from fiducial.data.formats.cells import cell, without_absent
from fiducial.data.formats.fields import Fields, Row
from fiducial.data.templates import ChatTemplate
from fiducial.errors import ConfigError


def read_tools(row: Row, fields: Fields) -> tuple[Tool, ...]:
    """The row's tools: a list of JSON schemas, each an object or text, or the text of the whole list."""
    value = cell(row, fields, "tools")
    if value is None or value == "":
        return ()
    listed = _parsed(value)
    if not isinstance(listed, list):
        raise OddRow(Reason.TOOLS, repr(value)[:40])
    return tuple(_tool(item) for item in listed)


def rendered_tools(fields: Fields, template: ChatTemplate | None, *, named: bool, where: str) -> Fields:
    """`fields` without a column of tools that the template would not write.

    Raises:
        ConfigError: The column was named for nothing.
    """
    if "tools" not in fields.columns or template is None or template.writes_tools:
        return fields
    if named:
        raise ConfigError(
            f"{where}.field_tools: has no effect, as the chat template writes no tools. Remove it, or give a "
            f"template that does with chat_template or chat_template_jinja."
        )
    return replace(fields, columns={key: name for key, name in fields.columns.items() if key != "tools"})


def _tool(item: Any) -> Tool:
    tool = _parsed(item)
    if not isinstance(tool, Mapping):
        raise OddRow(Reason.TOOLS, repr(item)[:40])
    return tool


def _parsed(value: Any) -> Any:
    """Text as the JSON it holds; what Arrow stored as objects, without what only other rows have."""
    if not isinstance(value, str):
        return without_absent(value)
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise OddRow(Reason.TOOLS, repr(value)[:40]) from error
