"""How many completions the lists of local datasets have, told from their first rows. Imports no torch."""

from dataclasses import dataclass

from fiducial.config.schema import DatasetConfig, RunConfig
from fiducial.data.example import OddRow
from fiducial.data.formats import choose_format
from fiducial.data.formats.shape import look_at
from fiducial.errors import FiducialError
from fiducial.reference.row_counts import first_rows

ROWS = 100
"""Rows of each dataset that are looked at."""


@dataclass(frozen=True, slots=True)
class AssumedLists:
    """What a plan takes lists to be like before they are loaded."""

    completions: int | None = None
    """None where the loss says how many it compares, or where the first rows do not tell."""
    sentence: str | None = None
    """For people; None where nothing is assumed."""


def assumed_lists(cfg: RunConfig) -> AssumedLists:
    """How long the lists are of a loss that compares any number of completions."""
    if cfg.method is None or not cfg.method.paired or cfg.method.num_completions is not None:
        return AssumedLists()
    most = most_completions(cfg)
    if most is None:
        return AssumedLists(
            None, "Counted with 2 completions a list: how many there are is known when the data is loaded."
        )
    return AssumedLists(most, f"Counted with {most} completions a list, the most in the data's first rows.")


def most_completions(cfg: RunConfig) -> int | None:
    """Completions of the longest list among the first rows; None where no row can be read without loading."""
    datasets = cfg.data.datasets if cfg.data is not None else ()
    found = [_most(dataset, f"datasets.{number}") for number, dataset in enumerate(datasets)]
    return max((most for most in found if most is not None), default=None)


def _most(config: DatasetConfig, where: str) -> int | None:
    rows = first_rows(config, ROWS)
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    try:
        _, format_, fields = choose_format(config, look_at(rows, columns, config), where=where)
    except FiducialError:
        return None  # loading the data says so
    lengths = []
    for row in rows:
        try:
            lengths.append(len(format_.read(row, fields)[1]))
        except OddRow:  # loading drops it, and says so
            continue
    return max(lengths, default=None)
