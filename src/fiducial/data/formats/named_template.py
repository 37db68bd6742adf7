"""axolotl's `chatml.*`, `llama3.*` and `zephyr.nectar` types: rows rendered with a template of their own.

They give plain text and ignore `chat_template`. The tokenizer adds BOS as it does for any text, and the
template's end-of-turn mark ends the completion.
"""

from dataclasses import dataclass

from fiducial.data.example import Messages, OddRow, Reason
from fiducial.data.formats.cells import answer, cell, messages, optional_text, split_shared, text
from fiducial.data.formats.fields import Fields, Preference, Row
from fiducial.data.formats.scores import as_score


@dataclass(frozen=True, slots=True)
class TurnMarks:
    """How one family writes a turn: `header` (with the role), content, `end`, `gap` before the next turn."""

    header: str
    end: str
    gap: str = ""

    def opening(self, role: str) -> str:
        """What stands before a turn's content."""
        return self.header.format(role=role)

    def prompt(self, turns: Messages) -> str:
        """`turns`, and the opening of the answer."""
        closed = "".join(self.opening(t["role"]) + t["content"] + self.end + self.gap for t in turns)
        return closed + self.opening("assistant")


CHATML = TurnMarks("<|im_start|>{role}\n", "<|im_end|>", "\n")
LLAMA3 = TurnMarks("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>")
ZEPHYR = TurnMarks("<|{role}|>\n", "</s>", "\n")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, perhaps a system prompt, and its answers, each text or a conversation that ends in it."""

    marks: TurnMarks

    def __call__(self, row: Row, fields: Fields) -> Preference:
        """Render one row."""
        turns: Messages = ({"role": "user", "content": text(row, fields, "prompt")},)
        if system := optional_text(row, fields, "system"):
            turns = ({"role": "system", "content": system}, *turns)
        answers = [
            answer(row, fields, option)
            for option in ("chosen", "rejected", "completion")
            if option in fields.columns
        ]
        return self.marks.prompt(turns), _close(self.marks, *answers)


@dataclass(frozen=True, slots=True)
class Chats:
    """`chosen` and `rejected` are whole conversations, of any number of turns, with the same history."""

    marks: TurnMarks

    def __call__(self, row: Row, fields: Fields) -> Preference:
        """Render one row."""
        chosen, rejected = messages(row, fields, "chosen"), messages(row, fields, "rejected")
        shared, _ = split_shared(chosen, rejected)
        if len(chosen) != len(shared) + 1 or len(rejected) != len(shared) + 1:
            raise OddRow(Reason.DIVERGED, "the conversations differ before their last answer")
        return self.marks.prompt(shared), _close(self.marks, chosen, rejected)


@dataclass(frozen=True, slots=True)
class Chat:
    """`completion` is a whole conversation that ends in the labelled answer."""

    marks: TurnMarks

    def __call__(self, row: Row, fields: Fields) -> Preference:
        """Render one row."""
        turns = messages(row, fields, "completion")
        return self.marks.prompt(turns[:-1]), _close(self.marks, turns)


def nectar(row: Row, fields: Fields) -> Preference:
    """A ranking of answers: rank 1, the best, is chosen; rank 2 is rejected.

    axolotl compares the two worst answers, the worst as chosen. Here the direction is Nectar's own.
    """
    answers = cell(row, fields, "messages")
    if not isinstance(answers, list) or len(answers) < 2:
        raise OddRow(Reason.MISSING, "two ranked answers")
    if any(not isinstance(item, dict) or item.get("rank") is None for item in answers):
        raise OddRow(Reason.MISSING, "the rank of an answer")
    first, second = sorted(answers, key=lambda item: as_score(item["rank"], "rank"))[:2]
    turns = ({"role": "system", "content": ""}, {"role": "user", "content": text(row, fields, "prompt")})
    ranked = Fields({"answer": "answer"})
    return ZEPHYR.prompt(turns), (text(first, ranked, "answer"), text(second, ranked, "answer"))


def _close(marks: TurnMarks, *answers: Messages) -> tuple[str, ...]:
    for turns in answers:
        if not turns or turns[-1]["role"] != "assistant":
            raise OddRow(Reason.NO_ASSISTANT)
        if not turns[-1]["content"].strip():
            raise OddRow(Reason.EMPTY_COMPLETION)
    return tuple(turns[-1]["content"] + marks.end for turns in answers)
