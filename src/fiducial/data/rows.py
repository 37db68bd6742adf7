"""All rows of one dataset to groups, batch by batch, in this process or shared among several.

Memory holds token ids and one window of batches, never all texts.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any

import datasets

from fiducial.data.example import OddRow, PreferenceExample
from fiducial.data.formats.fields import Fields, Reader, ScoreReader
from fiducial.data.formats.labels import read_scores
from fiducial.data.formats.tools import read_tools
from fiducial.data.tokenize import GroupTokenizer, Tokenized

BATCH = 1000

Columns = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class RowTokenizer:
    """Rows of one dataset to groups; picklable, so that other processes can share the work."""

    name: str
    read: Reader
    fields: Fields
    tokenize: GroupTokenizer
    read_scores: ScoreReader = read_scores

    def __call__(self, first_row: int, columns: Columns) -> list[Tokenized | OddRow]:
        """One result for each row; `columns` maps names to equally long lists."""
        names = list(columns)
        outcomes: list[PreferenceExample | OddRow] = []
        for offset, values in enumerate(zip(*columns.values(), strict=True)):
            row = dict(zip(names, values, strict=True))
            try:
                prompt, completions = self.read(row, self.fields)
                scores = self.read_scores(row, self.fields)
                tools = read_tools(row, self.fields)
            except OddRow as odd:
                outcomes.append(odd)
            else:
                number = first_row + offset
                outcomes.append(PreferenceExample(prompt, completions, self.name, number, scores, tools))
        examples = [outcome for outcome in outcomes if isinstance(outcome, PreferenceExample)]
        tokenized = iter(self.tokenize.tokenize_examples(examples))
        return [outcome if isinstance(outcome, OddRow) else next(tokenized) for outcome in outcomes]


def tokenize_rows(
    rows: datasets.Dataset, work: RowTokenizer, *, num_proc: int | None
) -> Iterator[Tokenized | OddRow]:
    """A result for each row, in order; with `num_proc`, that many processes share the batches."""
    firsts = range(0, len(rows), BATCH)
    columns = sorted(set(work.fields.columns.values()))
    batches = zip(firsts, rows.select_columns(columns).iter(batch_size=BATCH), strict=True)
    if num_proc is None or num_proc == 1 or len(firsts) == 1:
        for first, batch in batches:
            yield from work(first, batch)
        return
    # Started afresh rather than forked: the parent has threads (torch, tokenizers) that a fork would break.
    context = get_context("spawn")
    with ProcessPoolExecutor(min(num_proc, len(firsts)), context, _adopt, (work,)) as pool:
        while window := list(islice(batches, 4 * num_proc)):
            yield from chain.from_iterable(pool.map(_work, *zip(*window, strict=True)))


_adopted: list[RowTokenizer] = []
"""In a worker process: its work, sent once instead of with every batch (tokenizers are large)."""


def _adopt(work: RowTokenizer) -> None:
    _adopted[:] = [work]


def _work(first_row: int, columns: Columns) -> list[Tokenized | OddRow]:
    return _adopted[0](first_row, columns)
