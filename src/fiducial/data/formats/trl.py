"""TRL's preference formats: the prompt in its own column (explicit), or inside both answers (implicit)."""

from fiducial.data.example import OddRow, Reason
from fiducial.data.formats.cells import (
    answer,
    cell,
    is_conversation,
    messages,
    prompt_messages,
    shared_text,
    split_shared,
    text,
    with_system,
)
from fiducial.data.formats.fields import Fields, Preference, Row
from fiducial.data.formats.shape import Shape

CHAT = frozenset({"message", "messages"})


def explicit(row: Row, fields: Fields) -> Preference:
    """`prompt`, `chosen`, `rejected`: text that is tokenized as it stands."""
    return text(row, fields, "prompt"), (text(row, fields, "chosen"), text(row, fields, "rejected"))


def explicit_chat(row: Row, fields: Fields) -> Preference:
    """`prompt` a list of messages, `chosen` and `rejected` the answers to it."""
    completions = (answer(row, fields, "chosen"), answer(row, fields, "rejected"))
    return prompt_messages(row, fields, "prompt"), completions


def implicit(row: Row, fields: Fields) -> Preference:
    """Two texts that begin alike: the prompt is what they share, up to the last word's end.

    There is no mark where the prompt ends, so an opening both answers share counts as prompt.
    """
    chosen, rejected = text(row, fields, "chosen"), text(row, fields, "rejected")
    if chosen == rejected:
        raise OddRow(Reason.EQUAL)
    shared = len(shared_text(chosen, rejected))
    while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
        shared -= 1
    return chosen[:shared], (chosen[shared:], rejected[shared:])


def implicit_chat(row: Row, fields: Fields) -> Preference:
    """Two whole conversations: the prompt is the turns they share."""
    shared, completions = split_shared(messages(row, fields, "chosen"), messages(row, fields, "rejected"))
    return with_system(shared, row, fields), completions


def passthrough(row: Row, fields: Fields) -> Preference:
    """`prompt`, `chosen`, `rejected`, each text or messages, decided row by row."""
    if any(is_conversation(cell(row, fields, option)) for option in ("prompt", "chosen", "rejected")):
        return explicit_chat(row, fields)
    return explicit(row, fields)


def is_explicit(shape: Shape) -> bool:
    """Three columns of text."""
    return all(shape.kind(option) == "text" for option in ("prompt", "chosen", "rejected"))


def is_explicit_chat(shape: Shape) -> bool:
    """A column of messages as prompt, and answers as text or messages."""
    answers = {shape.kind("chosen"), shape.kind("rejected")}
    return shape.kind("prompt") == "messages" and answers <= {*CHAT, "text"}


def is_implicit(shape: Shape) -> bool:
    """Two columns of text, no prompt, and no conversation they could be answers to."""
    has_prompt = shape.kind("prompt") is not None or "messages" in shape.kinds.values()
    return not has_prompt and _both(shape, "text")


def is_implicit_chat(shape: Shape) -> bool:
    """Two columns of conversations, and no prompt of messages beside them."""
    return shape.kind("prompt") != "messages" and _both(shape, "messages")


def _both(shape: Shape, kind: str) -> bool:
    return shape.kind("chosen") == kind == shape.kind("rejected")
