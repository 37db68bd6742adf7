"""Make docs/losses.md and its plots from the table of losses and the notes in docs/losses/notes.yaml.

    python docs/losses.py        (or: make docs)

A test fails while the page holds anything else, or a loss has no note. The plots are drawn by evaluating the
losses themselves.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from fiducial.config.methods import METHODS, MethodConfig, MixtureConfig
from fiducial.config.methods.dpo import MODIFIERS, MarginConfig
from fiducial.logps import Comparison, Completions, SequenceLogps
from fiducial.loss_table import allowed, default, yaml_key
from fiducial.losses import LOSSES, Loss, build_loss

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "losses.md"
FOLDER = ROOT / "docs" / "losses"
NOTES = FOLDER / "notes.yaml"
WIDTH, HEIGHT, EDGE = 360, 200, 34
TOKENS, LOGP = 1, -20.0
"""Each completion of a plotted pair: its length (so that sums and means are one), and its log-prob."""


def page() -> str:
    """The whole of docs/losses.md."""
    notes = yaml.safe_load(NOTES.read_text(encoding="utf-8"))
    sections = [_section(method, notes["losses"][_name(method)]) for method in METHODS]
    tail = [notes["tail"].strip(), _modifiers(notes["modifiers"])]
    return "\n\n".join([notes["head"].strip(), *sections, *tail]) + "\n"


def plots() -> dict[Path, str]:
    """Every plot, by its file."""
    return {FOLDER / f"{_name(method)}.svg": _svg(method) for method in METHODS}


def _name(method: type[MethodConfig]) -> str:
    return str(method.model_fields["name"].default)


def _section(method: type[MethodConfig], note: dict[str, str]) -> str:
    name = _name(method)
    reference = "Compares with a reference." if method.needs_reference else "Needs no reference."
    lines = [
        f"### {name}",
        "",
        f"`{method.written()}` · [paper]({method.paper}) · {reference}",
        "",
        f"![The loss of {name} against the margin](losses/{name}.svg)",
        "",
        method.summary,
        "",
        f"    {note['formula']}",
        "",
        note["when"].strip(),
        *_hyperparameters(method),
        *(["", f"Defaults: {note['defaults']}"] if "defaults" in note else []),
    ]
    return "\n".join(lines)


def _hyperparameters(method: type[MethodConfig]) -> list[str]:
    rows = [
        f"| `{yaml_key(field)}` | {default(info)} | {allowed(info)} "
        f"| {(info.description or '').partition(chr(10) * 2)[0].replace(chr(10), ' ')} |"
        for field, info in method.model_fields.items()
        if field != "name" and field not in MODIFIERS
    ]
    return ["", "| key | default | range | |", "|---|---|---|---|", *rows] if rows else []


def _modifiers(notes: dict[str, str]) -> str:
    """A table of what each modifier does and to which losses of the family."""
    family = [method for method in METHODS if method.family == "dpo"]
    rows = []
    for field in MODIFIERS:
        info = MarginConfig.model_fields[field]
        having = [_name(method) for method in family if field in method.model_fields]
        without = [_name(method) for method in family if field not in method.model_fields]
        where = ", ".join(having) if len(having) < len(without) else f"all but {', '.join(without)}"
        rows.append(f"| `{yaml_key(field)}` | {allowed(info)} | {notes[field]} | {where} |")
    return "\n".join(["| key | range | what it changes | where |", "|---|---|---|---|", *rows])


def _svg(method: type[MethodConfig]) -> str:
    loss, beta = build_loss(method()), getattr(method(), "beta", 1.0) or 1.0
    scaled = [step / 10 for step in range(-50, 51)]
    values = [_value(method, loss, each / beta) for each in scaled]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0

    def place(x: float, y: float) -> str:
        across = EDGE + (x + 5) / 10 * (WIDTH - EDGE - 8)
        down = HEIGHT - EDGE - (y - low) / spread * (HEIGHT - EDGE - 12)
        return f"{across:.1f},{down:.1f}"

    points = " ".join(place(x, y) for x, y in zip(scaled, values, strict=True))
    axis = " ".join(place(x, low) for x in (-5, 5))
    zero = " ".join(place(0, y) for y in (low, high))
    bottom, style = HEIGHT - 12, 'font-family="sans-serif" font-size="11" fill="#555"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<polyline points="{axis}" stroke="#999" fill="none"/>',
            f'<polyline points="{zero}" stroke="#ddd" fill="none"/>',
            f'<polyline points="{points}" stroke="#0a6" stroke-width="2" fill="none"/>',
            f'<text x="{EDGE}" y="{bottom}" {style}>-5</text>',
            f'<text x="{WIDTH // 2 - 20}" y="{bottom}" {style}>β · margin</text>',
            f'<text x="{WIDTH - 16}" y="{bottom}" {style}>5</text>',
            f'<text x="2" y="18" {style}>{high:.3g}</text>',
            f'<text x="2" y="{HEIGHT - EDGE}" {style}>{low:.3g}</text>',
            "</svg>\n",
        ]
    )


def _value(method: type[MethodConfig], loss: Loss, margin: float) -> float:
    """The loss of one pair (or what stands for it) whose log-ratios are half the margin up and down."""
    ratios = [margin / 2, -margin / 2]
    if method.num_completions == 3:
        ratios = [0.0, *ratios]
    count = len(ratios)
    start = torch.full((count,), LOGP, dtype=torch.float64)
    tokens = torch.full((count,), TOKENS)
    nothing = {name: torch.zeros(count, dtype=torch.float64) for name in ("kl", *loss.statistics)}
    # Without a reference the margin is that of the log-probs; they must stay below 0.
    policy = start + torch.tensor(ratios, dtype=torch.float64)
    if not method.needs_reference:
        policy = policy - max(0.0, float(policy.max()) + 0.1)
    group = torch.zeros(count, dtype=torch.long) if method.paired else torch.arange(count)
    score = torch.tensor([1.0, -1.0] if not method.paired else [float(count - i) for i in range(count)])
    comparison = Comparison(
        SequenceLogps(policy, tokens, nothing),
        SequenceLogps(start, tokens, nothing) if method.needs_reference else None,
        Completions.of(group, score),
    )
    known: dict[str, Any] = dict(loss.running)
    if loss.count is not None:
        known["mean_count"] = float(TOKENS)
    if method.mismatched:
        known["point"] = torch.tensor(0.0)
    return float(loss(comparison, **known).loss.mean())


def main(arguments: list[str]) -> int:
    """Write the page and the plots, or check them."""
    assert set(LOSSES) == set(METHODS) - {MixtureConfig}
    made = {PAGE: page(), **plots()}
    if arguments == ["--check"]:
        return int(any(not path.exists() or path.read_text(encoding="utf-8") != made[path] for path in made))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
