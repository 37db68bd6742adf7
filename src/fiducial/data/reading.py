"""How the rows of one dataset are read, decided by its first ones; stored and streamed data alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from fiducial.config.schema import DatasetConfig
from fiducial.data.audit import DatasetAudit
from fiducial.data.example import OddRow
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
    if _scores_headers(work, rows):
        account.notes.append(NO_GENERATION_PROMPT)
    return work, account


def _scores_headers(work: RowTokenizer, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are conversations that the template does not open the answer of."""
    template = work.tokenize.template
    if template is None or template.opens_the_answer:
        return False
    for row in rows:
        try:
            prompt, _ = work.read(row, work.fields)
        except OddRow:
            continue
        return not isinstance(prompt, str)
    return False
