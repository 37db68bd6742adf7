"""How the rows of one dataset are read, decided by its first ones; stored and streamed data alike."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fiducial.config.schema import DatasetConfig
from fiducial.data.audit import DatasetAudit
from fiducial.data.ends import spelled_out
from fiducial.data.example import Content, OddRow
from fiducial.data.formats import choose_format
from fiducial.data.formats.labels import read_scores
from fiducial.data.formats.shape import look_at
from fiducial.data.formats.tools import rendered_tools
from fiducial.data.rows import RowTokenizer
from fiducial.data.tokenize import GroupTokenizer

NO_GENERATION_PROMPT = "the chat template has no generation prompt: what it puts before an answer is scored"
TOOLS_UNWRITTEN = "the chat template writes no tools, so that the column is not read"
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
    if fields is not found:
        account.notes.append(TOOLS_UNWRITTEN)
    account.notes += _odd_template(work, rows)
    return work, account


def _first_example(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> tuple[Content, Content] | None:
    """Prompt and first completion of the first row that can be read."""
    for row in rows:
        try:
            prompt, completions = work.read(row, work.fields)
        except OddRow:
            continue
        return prompt, completions[0]
    return None


def _odd_template(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is to be said of how the template, or a type's own, writes rows."""
    example, template = _first_example(work, rows), work.tokenize.template
    if example is None:
        return
    prompt, completion = example
    if isinstance(prompt, str) and isinstance(completion, str):
        written = prompt + completion
    elif template is None or isinstance(prompt, str) or isinstance(completion, str):
        return
    else:
        if not template.opens_the_answer:
            yield NO_GENERATION_PROMPT
        try:
            written = template.render((*prompt, *completion), add_generation_prompt=False)
        except OddRow:  # this row is counted
            return
    for mark in spelled_out(written, work.tokenize.tokenizer):
        yield f"{mark} is no token of the tokenizer: it is read piece by piece; tokens: ['{mark}'] adds it"
