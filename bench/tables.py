"""The tables of docs/performance.md, from the results in bench/results.

python bench/tables.py            # writes them between the page's markers
python bench/tables.py --check    # exit code 1 if the page says something else
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"

Comparison = Mapping[str, Any]


def page(text: str, results: Path = RESULTS) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end -->` made from `results`/NAME.json."""

    def fill(found: re.Match[str]) -> str:
        path = results / f"{found[1]}.json"
        body = tables(json.loads(path.read_text())) if path.exists() else "Not measured yet."
        return f"<!-- {found[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def tables(report: Mapping[str, Any]) -> str:
    """Where and how the report was made, and one table a comparison."""
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    head = f"`{report['command']}` on {where}; model shape {report['shape']}; {packages}."
    bodies = [_table(each) for each in report.get("comparisons", ())]
    return "\n\n".join([head, *bodies, *([_profile(report["steps"])] if "steps" in report else [])])


def _profile(steps: Sequence[Mapping[str, Any]]) -> str:
    walls = [sum(step["seconds"].values()) for step in steps]
    found = {name for step in steps for name in step["seconds"]}
    names = sorted(found, key=lambda name: -_total(steps, name))
    lines = ["| | " + " | ".join(f"{step['data']}, {step['precision']}" for step in steps) + " |"]
    lines.append("|---|" + "--:|" * len(steps))
    for name in names:
        shares = [step["seconds"].get(name, 0) / wall for step, wall in zip(steps, walls, strict=True)]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    lines.append("| seconds a step | " + " | ".join(f"{wall:.2f}" for wall in walls) + " |")
    return "\n".join(lines)


def _total(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(float(step["seconds"].get(name, 0)) for step in steps)


def _table(comparison: Comparison) -> str:
    facts, rows = comparison["pairs"], comparison["contestants"]
    base = next(iter(rows.values()))
    title = (
        f"**{comparison['data']}, {comparison['precision']}**: {comparison['batch_size']} pairs a step of "
        f"{facts['shared_tokens']:.0f} tokens ({facts['padded_tokens']:.0f} when padded). Products of these "
        f"sizes run at {comparison['matrix_rate'] / 1e9:,.0f} GFLOP/s."
    )
    lines = [
        "| | pairs/s | | training only | | scoring ÷ training | memory | of limit | with attention |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        whole, training = (f"{row[key]:.3g}" for key in ("pairs_per_second", "training_pairs_per_second"))
        lines.append(
            f"| {name} | {whole} | {_times(row, base, 'pairs_per_second')} "
            f"| {training} | {_times(row, base, 'training_pairs_per_second')} "
            f"| {row['scoring_over_training']:.2f} | {row['peak_bytes_above_weights'] / 2**30:.2f} GiB "
            f"| {row['share_of_matrix_rate']:.0%} | {row['share_with_attention']:.0%} |"
        )
    return "\n".join([title, "", *lines])


def _times(row: Mapping[str, float], base: Mapping[str, float], key: str) -> str:
    return f"{row[key] / base[key]:.1f}×"


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    text = PAGE.read_text()
    made = page(text)
    if arguments == ["--check"]:
        return int(made != text)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
