"""The last table names what the method learns from."""

import io
import re

import pytest
from rich.console import Console

from fiducial.training.closing import closing_table

RECORD = {
    "proof": {},
    "predicted": {"scoring_share": 0.25, "peak_bytes": 2**30},
    "measured": {"scoring_share": 0.2, "peak_bytes": 2**29},
}


@pytest.mark.parametrize("unit", ["pair", "completion", "list"])
@pytest.mark.parametrize(("prefix", "title"), [("", "training"), ("eval_", "held-out")])
def test_what_is_counted_is_named(unit: str, prefix: str, title: str) -> None:
    speeds = [{"pairs_per_second": speed} for speed in (9.0, 1.0, 3.0)]
    history = [{f"{prefix}loss": 0.7}, *speeds, {f"{prefix}loss": 0.4}]
    output = io.StringIO()

    Console(file=output, width=80).print(closing_table(history, RECORD, unit=unit))

    assert f"{title} {unit}s" in output.getvalue()
    assert re.search(rf"{unit}s a second .* 3 ", output.getvalue()), "the median"
    assert "0.7" in output.getvalue()
