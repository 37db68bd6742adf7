"""HH transcripts: `chosen` and `rejected` hold whole dialogues with `Human:` and `Assistant:` turns.

The prompt is what the two dialogues share, up to the last assistant marker in it. Where a human turn comes
after that, they answer different prompts, and the row is odd.
"""

import re

from fiducial.data.example import Messages, OddRow, Reason
from fiducial.data.formats.cells import shared_text, text
from fiducial.data.formats.fields import Fields, Preference, Row
from fiducial.data.formats.shape import Shape

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def transcript(row: Row, fields: Fields) -> Preference:
    """The dialogue as plain text, markers included."""
    chosen, rejected = text(row, fields, "chosen"), text(row, fields, "rejected")
    end = shared_text(chosen, rejected).rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        answered = ASSISTANT in chosen and ASSISTANT in rejected
        raise OddRow(Reason.DIVERGED if answered else Reason.NO_ASSISTANT)
    if HUMAN in chosen[end:] or HUMAN in rejected[end:]:
        raise OddRow(Reason.DIVERGED)
    return chosen[:end], (chosen[end:], rejected[end:])


def chat(row: Row, fields: Fields) -> Preference:
    """The dialogue as messages, for a model with a chat template."""
    prompt, answers = transcript(row, fields)
    assert isinstance(prompt, str)
    history = _turns(prompt.removesuffix(ASSISTANT))
    return history, tuple(({"role": "assistant", "content": str(answer).strip()},) for answer in answers)


def is_transcript(shape: Shape) -> bool:
    """Every text begins with a human turn and holds an assistant's."""
    if shape.kind("prompt") is not None or {shape.kind("chosen"), shape.kind("rejected")} != {"text"}:
        return False
    cells = (row.get(shape.column(option)) for row in shape.rows for option in ("chosen", "rejected"))
    return all(value.startswith(HUMAN) and ASSISTANT in value for value in cells if value is not None)


def _turns(dialogue: str) -> Messages:
    _, *parts = _TURN.split(dialogue)
    return tuple(
        {"role": _ROLE[role], "content": content.strip()}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    )
