"""The last thing a run prints: where it began, where it ended, and what it took."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

_ROWS = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "kl": "log-ratio to the reference (kl)",
}


def first_and_last(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Of every logged number, its first and its last value."""
    seen: dict[str, tuple[float, float]] = {}
    for log in history:
        for name, value in log.items():
            if isinstance(value, int | float):
                seen[name] = (seen[name][0] if name in seen else value, value)
    return seen


def closing_table(history: Sequence[Mapping[str, Any]], memory: Mapping[str, Any], *, unit: str) -> Table:
    """Held-out metrics where there are any, else those of training; then speed and memory.

    Args:
        history: everything that was logged.
        memory: predicted and measured peak, in bytes.
        unit: what the method learns from one of, such as a pair.
    """
    values = first_and_last(history)
    prefix = "eval_" if "eval_loss" in values else ""
    table = Table(title=f"{'held-out' if prefix else 'training'} {unit}s", title_justify="left")
    table.add_column("")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for name, words in _ROWS.items():
        if prefix + name in values:
            first, last = values[prefix + name]
            table.add_row(words, _number(name, first), _number(name, last))
    table.add_section()
    speeds = [log["pairs_per_second"] for log in history if "pairs_per_second" in log]
    if speeds:
        table.add_row(f"{unit}s a second", "", f"{sorted(speeds)[len(speeds) // 2]:.3g}")
    table.add_row("peak memory, predicted", "", _gigabytes(memory["peak_bytes"]))
    table.add_row("peak memory, measured", "", _gigabytes(memory["measured_peak_bytes"]))
    return table


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "rewards/accuracies" else f"{value:.4g}"


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"
