"""How the rows of one dataset are read, decided by its first ones; stored and streamed data alike."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fiducial.config.schema import DatasetConfig
from fiducial.data.audit import DatasetAudit
from fiducial.data.ends import MARKS, spelled_out
from fiducial.data.example import Content, Messages, OddRow
from fiducial.data.formats import choose_format
from fiducial.data.formats.labels import read_scores
from fiducial.data.formats.shape import look_at
from fiducial.data.formats.tools import rendered_tools
from fiducial.data.rows import RowTokenizer
from fiducial.data.templates import ChatTemplate
from fiducial.data.tokenize import GroupTokenizer

NO_GENERATION_PROMPT = "the chat template has no generation prompt: what it puts before an answer is scored"
TOOLS_UNWRITTEN = "the chat template writes no tools, so that the column is not read"
CALLS_UNWRITTEN = "the chat template writes no tool calls: they are left out of rows that have them"
AS_CHAT = {"trl.explicit": "trl.explicit_chat", "kto.trl": "kto.trl_chat", "hh": "hh.chat"}
"""Formats of plain text that `type: auto` recognises, and what the same rows are as conversations."""
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""What columns are called that hold what no text model reads."""
LOOK_AT = 100
"""Rows `type: auto` decides by."""


def choose_reading(
    config: DatasetConfig,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    tokenize: GroupTokenizer,
    *,
    where: str,
) -> tuple[RowTokenizer, DatasetAudit]:
    """What turns rows into groups, and the account to count them in.

    `rows` are the first ones, at most `LOOK_AT`; `columns` those of the dataset.

    Raises:
        ConfigError: no format of that name, or an option it does not read.
        DataError: `auto` finds no format or several, or a column is missing.
    """
    shape = look_at(rows, columns, config)
    name, format_, found = choose_format(config, shape, where=where)
    fields = rendered_tools(found, tokenize.template, named=config.field_tools is not None, where=where)
    work = RowTokenizer(config.path, format_.read, fields, tokenize, format_.scores or read_scores)
    account = DatasetAudit(config.path, name)
    account.unread_columns = [column for column in columns if column not in fields.columns.values()]
    for column in account.unread_columns:
        if column in MEDIA and any(row.get(column) for row in rows):
            account.notes.append(
                f"answers about what is in '{column}' are learnt without it: text alone is read"
            )
    if fields is not found:
        account.notes.append(TOOLS_UNWRITTEN)
    account.notes += _odd_template(work, rows)
    if config.type == "auto" and name in AS_CHAT:
        account.notes += _passed_over_template(work, rows, AS_CHAT[name])
    return work, account


def _odd_template(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is to be said of how the template, or a type's own, writes rows."""
    first = next(_examples(work, rows), "")
    template = work.tokenize.template
    written = first if isinstance(first, str) else None
    if not isinstance(first, str) and template is not None:
        if not template.opens_the_answer:
            yield NO_GENERATION_PROMPT
        if any(_leaves_out_calls(template, each) for each in _examples(work, rows)):
            yield CALLS_UNWRITTEN
        # Turns without their own words, which may speak of such marks.
        written = _rendered(template, tuple({**turn, "content": "1"} for turn in first))
    for mark in spelled_out(written or "", work.tokenize.tokenizer):
        yield f"{mark} is no token of the tokenizer: it is read piece by piece; tokens: ['{mark}'] adds it"


def _passed_over_template(work: RowTokenizer, rows: Sequence[Mapping[str, Any]], chat: str) -> Iterator[str]:
    """That nobody marks the turns of plain text: neither the rows, nor the chat template that is there."""
    special = (
        token.content for token in work.tokenize.tokenizer.added_tokens_decoder.values() if token.special
    )
    first = next(_examples(work, rows), "")
    marked = any(mark in first for mark in (*special, *MARKS))
    if work.tokenize.template is not None and not marked:
        yield f"read as plain text, without the chat template; type: {chat} writes the same rows with it"


def _examples(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[Content]:
    """Prompt and first completion, as one, of each row that can be read."""
    for row in rows:
        try:
            prompt, (completion, *_) = work.read(row, work.fields)
        except OddRow:
            continue
        if isinstance(prompt, str) and isinstance(completion, str):
            yield prompt + completion
        elif not isinstance(prompt, str) and not isinstance(completion, str):
            yield (*prompt, *completion)


def _leaves_out_calls(template: ChatTemplate, messages: Content) -> bool:
    """Whether what the assistant calls is not written, so that nobody learns it."""
    if isinstance(messages, str) or not any(turn.get("tool_calls") for turn in messages):
        return False
    silent = tuple({key: turn[key] for key in turn if key != "tool_calls"} for turn in messages)
    written = _rendered(template, messages)
    return written is not None and written == _rendered(template, silent)


def _rendered(template: ChatTemplate, messages: Messages) -> str | None:
    try:
        return template.render(messages, add_generation_prompt=False)
    except OddRow:  # the row is counted
        return None
