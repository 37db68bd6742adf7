"""The tables of docs/performance.md and README.md, from the results in bench/results.

python bench/tables.py            # writes them between the pages' markers
python bench/tables.py --check    # exit code 1 if a page says something else
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
PRECISIONS = ("float32", "bfloat16")
NOT_MEASURED = "Not measured yet."

Comparison = Mapping[str, Any]
Report = Mapping[str, Any]


def page(text: str, render: Callable[[Report], str] | None = None, results: Path = RESULTS) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- end -->` made from `results`/NAME.json."""

    def fill(found: re.Match[str]) -> str:
        path = results / f"{found[1]}.json"
        body = (render or tables)(json.loads(path.read_text())) if path.exists() else NOT_MEASURED
        return f"<!-- {found[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def tables(report: Report) -> str:
    """Where and how the report was made, and its tables."""
    commands = {each.get("command", report["command"]): None for each in report.get("comparisons", ())}
    made = ", ".join(f"`{command}`" for command in commands or {report["command"]: None})
    bodies = _comparisons(report.get("comparisons", ()))
    steps = [_profile(report["steps"])] if "steps" in report else []
    cache = [_warm(report["warm"]), _cold(report["cold"])] if "warm" in report else []
    return "\n\n".join([f"{made} on {_conditions(report)}.", *bodies, *steps, *cache, *_passes(report)])


def summary(report: Report) -> str:
    """A row for each method and data set, both precisions beside each other."""
    found: dict[tuple[str, str], dict[str, Comparison]] = {}
    for each in report["comparisons"]:
        found.setdefault((each["method"], each["data"]), {})[each["precision"]] = each
    lines = [
        f"| {''.join(f'| {precision} | × TRL default | × its best | memory ' for precision in PRECISIONS)}|",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (method, data), precisions in found.items():
        cells = [_summary_cells(precisions.get(precision)) for precision in PRECISIONS]
        lines.append(f"| {method}, {data} | {' | '.join(cells)} |")
    return "\n".join([f"Measured on {_conditions(report)}:", "", *lines])


def _summary_cells(comparison: Comparison | None) -> str:
    rows = comparison["contestants"] if comparison is not None else {}
    if comparison is None or not {"Fiducial", "TRL default"} <= rows.keys():
        return " | ".join("–" * 4)
    ours, default = rows["Fiducial"], rows["TRL default"]
    memory = ours["peak_bytes_above_weights"] / default["peak_bytes_above_weights"]
    return (
        f"{ours['per_second']:.3g} {comparison['unit']}/s | {_times(ours, default, 'per_second')} "
        f"| {_times_best(rows)} | {memory:.0%}"
    )


def _conditions(report: Report) -> str:
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl"))
    return f"{where}; model shape {report['shape']}; {packages}"


def _warm(warm: Mapping[str, Any]) -> str:
    few = warm["few_pairs"]
    lines = [
        f"Warm start: {warm['pairs']:,} pairs of {warm['tokens_a_pair']:.0f} tokens, their records "
        f"({warm['cache_bytes'] / 1e6:.0f} MB) in {warm['files']} files. Until the first step:",
        "",
        "| | seconds | of them imports | processor seconds | memory above the weights "
        f"| above a run of {few['pairs']} pairs |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, each in warm["starts"].items():
        above, pairs = (each["peak_bytes"] - base for base in (warm["model_bytes"], few["peak_bytes"]))
        lines.append(
            f"| {name} | {each['seconds']:.1f} | {each['seconds_of_imports']:.1f} "
            f"| {each['processor_seconds']:.1f} | {above / 1e9:.2f} GB | {pairs / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _cold(cold: Sequence[Mapping[str, Any]]) -> str:
    shares = ", ".join(
        f"{each['share_of_an_epoch']:.2f} on *{each['data']}* ({each['precision']})" for each in cold
    )
    return f"Cold scoring as a share of one training epoch: {shares}."


def _passes(report: Report) -> list[str]:
    titles = {
        "shared_layers": "Two passes over one, layers shared (median):",
        "sharded": "Two passes over one, sharded layers gathered once for both (median, two processes):",
        "offloaded": "Two passes over one, offloaded layers copied once for both (median):",
        "quantised": "Two passes over one, at most, were each weight dequantised once for both (median):",
    }
    return [_ratios(title, report[name]) for name, title in titles.items() if name in report]


def _ratios(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        title,
        "",
        "| | tokens a pass | seconds | processor seconds |",
        "|---|--:|--:|--:|",
        *(
            f"| {row['case']} | {row['tokens']:,} | {row['wall']:.2f}× | {row['processor']:.2f}× |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


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


def _comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    """What the data is like, a line a set, and one table with a row for each comparison."""
    if not comparisons:
        return []
    ordered = sorted(comparisons, key=lambda each: (each["method"], each["data"], each["precision"]))
    lines = [
        "| | TRL default | TRL precomputed | Fiducial | × TRL default | × its best | memory | of TRL's "
        "| scoring ÷ training | of limit | with attention | products, torch's own |",
        "|---|" + "--:|" * 11,
        *(_comparison(each) for each in ordered),
    ]
    return ["\n".join({_waste(each): None for each in ordered}), "\n".join(lines)]


def _waste(comparison: Comparison) -> str:
    facts, waste = comparison["examples"], comparison["waste"]
    return (
        f"- *{comparison['data']}*: {comparison['batch_size']} {comparison['unit']} a step of "
        f"{facts['shared_tokens']:,.0f} tokens. A padded trainer makes {facts['padded_tokens']:,.0f}; "
        f"{waste['padding']:.0%} are padding, {waste['repeated_prompts']:.0%} prompts once more."
    )


def _comparison(comparison: Comparison) -> str:
    rows = comparison["contestants"]
    default, ours = rows["TRL default"], rows["Fiducial"]
    memory = ours["peak_bytes_above_weights"]
    rates = (f"{comparison[key] / 1e9:,.0f}" for key in ("matrix_rate", "torch_matrix_rate"))
    cells = [
        f"{comparison['method']}, {comparison['data']}, {comparison['precision']}",
        *(_speed(rows.get(name)) for name in ("TRL default", "TRL precomputed", "Fiducial")),
        f"{_times(ours, default, 'per_second')} ({_times(ours, default, 'training_per_second')})",
        _times_best(rows),
        f"{memory / 2**30:.2f} GiB",
        f"{memory / default['peak_bytes_above_weights']:.0%}",
        f"{ours['scoring_over_training']:.2f}" if ours["scoring_over_training"] else "–",
        f"{ours['share_of_matrix_rate']:.0%}",
        f"{ours['share_with_attention']:.0%}",
        ", ".join(rates),
    ]
    return f"| {' | '.join(cells)} |"


def _speed(row: Mapping[str, float] | None) -> str:
    return "–" if row is None else f"{row['per_second']:.3g} ({row['training_per_second']:.3g})"


def _times_best(rows: Mapping[str, Mapping[str, float]]) -> str:
    """How much faster than TRL's fastest setting; "–" where that may not have been measured."""
    ours, trl = rows["Fiducial"], [row for name, row in rows.items() if name.startswith("TRL")]
    if ours["scoring_over_training"] > 0 and len(trl) == 1:
        return "–"
    return _times(ours, max(trl, key=lambda row: row["per_second"]), "per_second")


def _times(row: Mapping[str, float], base: Mapping[str, float], key: str) -> str:
    return f"{row[key] / base[key]:.1f}×"


def made() -> dict[Path, str]:
    """Each page as the results say it."""
    return {PAGE: page(PAGE.read_text()), README: page(README.read_text(), summary)}


def main(arguments: list[str]) -> int:
    """Write the pages, or check them."""
    if arguments == ["--check"]:
        return int(any(path.read_text() != text for path, text in made().items()))
    for path, text in made().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
