"""Conversations with the two answers beside them: ShareGPT, and axolotl's `chat_template.*` types."""

from fiducial.data.formats.cells import answer, prompt_messages
from fiducial.data.formats.fields import Fields, Preference, Row
from fiducial.data.formats.shape import Shape

ANSWER = frozenset({"text", "message"})


def answered(row: Row, fields: Fields) -> Preference:
    """`messages` is the prompt; `chosen` and `rejected` are text, a message, or messages that end in it."""
    completions = (answer(row, fields, "chosen")[-1:], answer(row, fields, "rejected")[-1:])
    return prompt_messages(row, fields, "messages"), completions


def is_sharegpt(shape: Shape) -> bool:
    """`conversations` with one answer in each of `chosen` and `rejected`."""
    name = shape.names.get("messages", "conversations")
    return shape.kinds.get(name) == "messages" and _has_answers(shape)


def is_messages(shape: Shape) -> bool:
    """`messages` with one answer in each of `chosen` and `rejected`."""
    return "messages" not in shape.names and shape.kind("messages") == "messages" and _has_answers(shape)


def _has_answers(shape: Shape) -> bool:
    return shape.kind("prompt") != "messages" and {shape.kind("chosen"), shape.kind("rejected")} <= ANSWER
