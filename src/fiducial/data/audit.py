"""What became of every row: kept, truncated, or dropped and why, with row numbers to look at."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console

from fiducial.data.dataset import TokenizedDataset
from fiducial.data.example import OddRow, Reason
from fiducial.errors import DataError

EXAMPLES = 3
PIECES = ("prompt", "chosen", "rejected")
_REMEDIES: Mapping[str, str] = {
    Reason.UNKNOWN_ROLE: "Say what it means with roles: {user: [...], assistant: [...]}.",
    Reason.NO_ASSISTANT: "An answer's last turn must be the assistant's; roles says what rows call it.",
    Reason.EMPTY_PROMPT: "Say which column holds the prompt with field_prompt.",
    Reason.LONG: "Raise sequence_len, or write excess_length_strategy: truncate.",
    Reason.LONG_PROMPT: "Raise sequence_len, or write excess_length_strategy: truncate.",
    Reason.LABEL: "Write true and false there, or 1 and 0, or name another column with field_label.",
}
"""What helps where no row is left."""


@dataclass
class Dropped:
    """Rows dropped for one reason."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    """Numbers of the first ones."""
    detail: str = ""
    """What was found in them, each once."""

    def add(self, row: int, detail: str) -> None:
        """Count one more."""
        if len(self.rows) < EXAMPLES:
            self.rows.append(row)
            found = self.detail.split("; ") if self.detail else []
            self.detail = "; ".join(dict.fromkeys([*found, detail] if detail else found))
        self.count += 1


@dataclass
class DatasetAudit:
    """The account of one dataset."""

    name: str
    format: str
    role: Literal["train", "evaluation"] = "train"
    rows: int = 0
    kept: int = 0
    truncated: int = 0
    doubled_bos: int = 0
    """Rows whose rendering began with two BOS; one was removed."""
    dropped: dict[str, Dropped] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    """Median and longest of each piece (`piece_names`), in tokens."""
    unread_columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drop(self, row: int, odd: OddRow) -> None:
        """Count a row that is no preference."""
        self.dropped.setdefault(str(odd.reason), Dropped()).add(row, odd.detail)

    def measure(self, dataset: TokenizedDataset) -> None:
        """Fill in how many rows are kept, and how long they are."""
        self.kept = len(dataset)
        self.lengths = {}
        for piece, name in enumerate(piece_names(single=bool((dataset.num_completions == 1).all()))):
            lengths = dataset.piece_lengths(piece)
            if len(lengths):
                self.lengths[name] = {"median": int(np.median(lengths)), "max": int(lengths.max())}

    def reasons(self) -> list[str]:
        """One line for each reason rows were dropped."""
        return [
            f"{dropped.count} × {reason}{f' ({dropped.detail})' if dropped.detail else ''}: rows "
            f"{', '.join(map(str, dropped.rows))}{', …' if dropped.count > len(dropped.rows) else ''}"
            for reason, dropped in self.dropped.items()
        ]

    def require_rows(self, where: str) -> None:
        """Raise `DataError` if no row was kept."""
        if not self.kept:
            remedies = (_REMEDIES[reason] for reason in self.dropped if reason in _REMEDIES)
            raise DataError(
                f"{where} ({self.name}): none of the {self.rows} rows read can be used as '{self.format}'. "
                + " ".join([*(f"{reason}." for reason in self.reasons()), *remedies])
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetAudit":
        """The inverse of `dataclasses.asdict`."""
        dropped = {reason: Dropped(**item) for reason, item in values["dropped"].items()}
        return cls(**{**values, "dropped": dropped})


@dataclass
class Audit:
    """The account of a run's data."""

    datasets: list[DatasetAudit] = field(default_factory=list)
    train: int = 0
    """Groups to train on, after deduplication and holding out."""
    evaluation: int = 0
    labels: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Desirable and undesirable completions of `train` and `evaluation`; empty for pairs."""
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The whole account as JSON values."""
        return asdict(self)

    def render(self, console: Console) -> None:
        """Print the account, readable from 80 columns on: each dataset, then each reason with row numbers."""
        for each in self.datasets:
            for line in _account(each):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print(self.summary(), highlight=False, markup=False)
        for line in self._remarks():
            console.print(f"  {line}", highlight=False, markup=False)

    def summary(self) -> str:
        """One line."""
        rows = sum(each.rows for each in self.datasets)
        kept = sum(each.kept for each in self.datasets)
        truncated = sum(each.truncated for each in self.datasets)
        # Pairs that are taken apart are not as many as their rows.
        train = f"{self.train} completions" if self.labels else str(self.train)
        line = f"{rows} rows: {train} to train on, {self.evaluation} to evaluate, {rows - kept} dropped"
        return f"{line}, {truncated} truncated" if truncated else line

    def _remarks(self) -> Iterable[str]:
        for each in self.datasets:
            yield from _remarks(each)
        for role, (desirable, undesirable) in self.labels.items():
            use = "to train on" if role == "train" else "to evaluate"
            yield f"{use}: {desirable} desirable and {undesirable} undesirable completions"
        yield from self.notes


def piece_names(*, single: bool) -> tuple[str, ...]:
    """What the pieces of a group are called: of a labelled completion, or of a pair."""
    return ("prompt", "completion") if single else PIECES


def _account(audit: DatasetAudit) -> Iterable[str]:
    role = "" if audit.role == "train" else f" ({audit.role})"
    yield f"Data: {audit.name}{role}, read as {audit.format}"
    yield f"  {audit.kept} of {audit.rows} rows kept, {audit.truncated} truncated"
    lengths = [f"{piece} {item['median']}/{item['max']}" for piece, item in audit.lengths.items()]
    if lengths:
        yield f"  tokens, median/longest: {', '.join(lengths)}"


def _remarks(audit: DatasetAudit) -> Iterable[str]:
    for reason in audit.reasons():
        yield f"{audit.name}: dropped {reason}"
    if audit.doubled_bos:
        yield f"{audit.name}: {audit.doubled_bos} rows began with BOS twice; one was removed"
    if audit.unread_columns:
        yield f"{audit.name}: columns not read: {', '.join(audit.unread_columns)}"
    for note in audit.notes:
        yield f"{audit.name}: {note}"
