"""One preference as it was read from a row, before any template or tokenizer.

A row that cannot be a preference raises `OddRow`; it is dropped, counted and shown by the audit. What is
wrong with a whole dataset (a column that is not there) is a `DataError` instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Message = Mapping[str, Any]
"""`role` and `content`, plus whatever else a template may read (`tool_calls`, `name`, …)."""
Messages = tuple[Message, ...]
Tool = Mapping[str, Any]
"""A function the assistant could call, as a JSON schema."""
Content = str | Messages

ANSWERING_ROLES = frozenset({"assistant", "tool"})


class Reason(StrEnum):
    """Why a row was dropped; the values are what the audit prints."""

    MISSING = "a field is missing"
    LABEL = "the label is neither true nor false"
    SCORE = "a score is missing or is no number"
    ORDER = "the chosen completion's score is not the higher one"
    NOT_TEXT = "content is not text"
    TOOLS = "tools are not a list of JSON schemas"
    UNKNOWN_ROLE = "unknown role"
    EMPTY_PROMPT = "empty prompt"
    EMPTY_COMPLETION = "empty completion"
    NO_ASSISTANT = "no assistant turn to compare"
    EQUAL = "chosen equals rejected"
    ANSWERED = "the prompt already ends in one of its answers"
    DIVERGED = "chosen and rejected answer different prompts"
    TEMPLATE = "the chat template refuses the conversation"
    NO_PREFIX = "prompt and completions share no token"
    LONG_PROMPT = "prompt longer than sequence_len"
    LONG = "longer than sequence_len"


class OddRow(Exception):  # noqa: N818 - an odd row is an outcome the audit counts, not a user's error
    """This row is no preference."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One prompt and its completions, all of them text or all conversations."""

    prompt: Content
    completions: tuple[Content, ...]
    """Best first: pairs are (chosen, rejected). A labelled completion stands alone."""
    dataset: str
    row: int
    """Position in the dataset as opened (after `split` and `shards`), counted from 0."""
    scores: tuple[float, ...] = ()
    """Each completion's rating, or 1 and -1 for desirable and undesirable; empty where the row has none."""
    tools: tuple[Tool, ...] = ()
    """What the assistant could call, for the chat template."""

    def check(self) -> None:
        """Raise `OddRow` unless there is a prompt without an answer, and completions that differ."""
        if _is_empty(self.prompt):
            raise OddRow(Reason.EMPTY_PROMPT)
        for completion in self.completions:
            if isinstance(completion, str):
                if not completion.strip():
                    raise OddRow(Reason.EMPTY_COMPLETION)
            else:
                _check_answer(completion)
        if any(self.completions[0] == other for other in self.completions[1:]):
            raise OddRow(Reason.EQUAL)
        if any(_ends_in(self.prompt, completion) for completion in self.completions):
            raise OddRow(Reason.ANSWERED, "type: trl.implicit_chat reads whole conversations")


def _check_answer(messages: Messages) -> None:
    if not messages or messages[0]["role"] != "assistant":
        raise OddRow(Reason.NO_ASSISTANT)
    if any(message["role"] not in ANSWERING_ROLES for message in messages):
        raise OddRow(Reason.DIVERGED, "the conversations differ before their last answer")
    if _is_empty(messages):
        raise OddRow(Reason.EMPTY_COMPLETION)


def _ends_in(prompt: Content, completion: Content) -> bool:
    """Whether the prompt's last turn is the completion's first, as in whole conversations."""
    return not isinstance(prompt, str) and not isinstance(completion, str) and prompt[-1] == completion[0]


def _is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in content)
