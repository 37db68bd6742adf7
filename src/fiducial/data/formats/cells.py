"""Reading one cell of a row: text, a message, or messages, with the rows' names turned into ours."""

from collections.abc import Mapping
from typing import Any

from fiducial.data.example import Content, Message, Messages, OddRow, Reason
from fiducial.data.formats.fields import Fields, Row
from fiducial.data.formats.shape import CONTENT_KEYS, ROLE_KEYS


def cell(row: Row, fields: Fields, option: str) -> Any:
    """The value of an option's column, or None where the dataset or the row has none."""
    column = fields.columns.get(option)
    return None if column is None else row.get(column)


def text(row: Row, fields: Fields, option: str) -> str:
    """A cell that must be text, and more than white space."""
    value = _as_text(cell(row, fields, option), option)
    if not value.strip():
        raise OddRow(Reason.EMPTY_PROMPT if option == "prompt" else Reason.EMPTY_COMPLETION, option)
    return value


def optional_text(row: Row, fields: Fields, option: str) -> str:
    """A cell that is text or nothing; nothing is the empty string."""
    value = cell(row, fields, option)
    return "" if value is None else _as_text(value, option)


def messages(row: Row, fields: Fields, option: str) -> Messages:
    """A cell that must be a list of messages."""
    value = cell(row, fields, option)
    if value is None:
        raise OddRow(Reason.MISSING, option)
    if not isinstance(value, list):
        raise OddRow(Reason.NOT_TEXT, f"{option} is not a list of messages")
    return tuple(_message(item, fields, option) for item in value)


def prompt_messages(row: Row, fields: Fields, option: str) -> Messages:
    """A cell of messages, or the text of one user turn; the row's system prompt comes first."""
    value = cell(row, fields, option)
    turns: Messages
    turns = ({"role": "user", "content": value},) if isinstance(value, str) else messages(row, fields, option)
    return with_system(turns, row, fields)


def answer(row: Row, fields: Fields, option: str) -> Messages:
    """A cell that is an answer: text, one message, or a list of messages."""
    value = cell(row, fields, option)
    if isinstance(value, str):
        return ({"role": "assistant", "content": value},)
    if isinstance(value, Mapping):
        return (_message(value, fields, option),)
    return messages(row, fields, option)


def with_system(turns: Messages, row: Row, fields: Fields) -> Messages:
    """`turns` after the row's system prompt, where it has one and the turns do not."""
    system = optional_text(row, fields, "system")
    if not system or (turns and turns[0]["role"] == "system"):
        return turns
    return ({"role": "system", "content": system}, *turns)


def is_conversation(value: Any) -> bool:
    """Whether a cell holds messages rather than text."""
    return isinstance(value, list | Mapping)


def shared_text(left: str, right: str) -> str:
    """The characters two texts begin with alike."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return left[:index]
    return min(left, right, key=len)


def split_shared(chosen: Messages, rejected: Messages) -> tuple[Messages, tuple[Content, ...]]:
    """Two whole conversations to the turns they share and the answers they end in."""
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise OddRow(Reason.EQUAL)
    if shared == min(len(chosen), len(rejected)):
        raise OddRow(Reason.DIVERGED, "one conversation goes on where the other ends")
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def without_absent(value: Any) -> Any:
    """A cell's value without what only other rows have.

    Arrow stores objects of one column with the keys of all of them, absent ones as null: a call's arguments
    would be rendered with those of every other function.
    """
    if isinstance(value, Mapping):
        return {key: without_absent(item) for key, item in value.items() if item is not None}
    return [without_absent(item) for item in value] if isinstance(value, list) else value


def _message(value: Any, fields: Fields, option: str) -> Message:
    if not isinstance(value, Mapping):
        raise OddRow(Reason.NOT_TEXT, f"{option} holds something that is not a message")
    names = fields.properties
    role_key = _key(value, names.get("role"), ROLE_KEYS)
    content_key = _key(value, names.get("content"), CONTENT_KEYS)
    role = value.get(role_key)
    if role is None:
        raise OddRow(Reason.MISSING, f"role in {option}")
    if not isinstance(role, str) or role not in fields.roles:
        raise OddRow(Reason.UNKNOWN_ROLE, repr(role))
    ours = {theirs: own for own, theirs in names.items()}
    rest: dict[str, Any] = {
        str(ours.get(key, key)): without_absent(item)
        for key, item in value.items()
        if item is not None and key not in (role_key, content_key)
    }
    content = value.get(content_key)
    if content is None and rest.get("tool_calls"):
        content = ""
    return {"role": fields.roles[role], "content": _joined(content, f"content in {option}"), **rest}


def _joined(content: Any, what: str) -> str:
    """A message's content: text, or a list of parts as OpenAI writes it, all of which are text."""
    if not isinstance(content, list):
        return _as_text(content, what)
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise OddRow(Reason.NOT_TEXT, f"{what} has a part of type {kind!r}")
    return "".join(_as_text(part.get("text"), f"text of a part of {what}") for part in content)


def _key(value: Mapping[str, Any], mapped: str | None, usual: tuple[str, ...]) -> str:
    if mapped is not None:
        return mapped
    return next((key for key in usual if value.get(key) is not None), usual[0])


def _as_text(value: Any, what: str) -> str:
    if value is None:
        raise OddRow(Reason.MISSING, what)
    if not isinstance(value, str):
        raise OddRow(Reason.NOT_TEXT, what)
    return value
