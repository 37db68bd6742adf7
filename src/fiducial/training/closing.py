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


def closing_table(history: Sequence[Mapping[str, Any]], record: Mapping[str, Any], *, unit: str) -> Table:
    """Held-out metrics where there are any, else those of training; the reference; then time and memory.

    Args:
        history: everything that was logged.
        record: what plan.json holds.
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
    if record["proof"]:
        table.add_section()
        for words, value in _reference_rows(record["proof"]):
            table.add_row(words, "", value)
    table.add_section()
    speeds = [log["pairs_per_second"] for log in history if "pairs_per_second" in log]
    if speeds:
        table.add_row(f"{unit}s a second", "", f"{sorted(speeds)[len(speeds) // 2]:.3g}")
    predicted, measured = record["predicted"], record["measured"]
    for words, name, show in (
        ("time that scoring takes", "scoring_share", _percent),
        ("peak memory", "peak_bytes", _gigabytes),
    ):
        table.add_row(f"{words}, predicted", "", show(predicted[name]))
        table.add_row(f"{words}, measured", "", show(measured[name]))
    return table


def _reference_rows(proof: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured of the reference: before step 1, and whether it stayed."""
    spread = proof["log_ratio"]["per_token"]
    rows = [
        (
            "policy − reference before step 1, a token",
            f"{spread['min']:.1e} to {spread['max']:.1e}",
        ),
        ("noise of other batch shapes", f"{proof['noise_floor']:.1e}, equal up to {proof['tolerance']:.1e}"),
    ]
    if moves := proof.get("moves"):
        rows.append(
            ("reference moved to the policy", f"{len(moves)} times, last at step {moves[-1]['step']}")
        )
    moved = proof["moved_while_training"]
    rows.append(("reference moved by itself", "no" if moved == 0 else f"by rounding, {moved:.1e}"))
    return rows


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "rewards/accuracies" else f"{value:.4g}"


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"
