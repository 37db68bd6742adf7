"""Small runs for end-to-end tests: a tiny checkpoint, pairs on disk, and a config that trains on them."""

import json
from pathlib import Path
from typing import Any

from tiny import save_checkpoint


def write_pairs(path: Path, rows: int) -> Path:
    """Pairs of uneven lengths, with something to learn: chosen answers are of other letters."""
    pairs = [
        {
            "prompt": f"Question {row}" + "?" * (row % 5),
            "chosen": " yes" + "abc"[row % 3] * (row % 7 + 1),
            "rejected": " no" + "xyz"[row % 3] * (row % 4 + 1),
        }
        for row in range(rows)
    ]
    path.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return path


def write_labelled(path: Path, labels: list[bool]) -> Path:
    """Completions of uneven lengths, one for each label."""
    rows = [
        {
            "prompt": f"Question {row}" + "?" * (row % 5),
            "completion": (" yes" if label else " no") + "abc"[row % 3] * (row % 7 + 1),
            "label": label,
        }
        for row, label in enumerate(labels)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def run_config(folder: Path, *, rows: int = 12, family: str = "llama", **settings: Any) -> dict[str, Any]:
    """A full fine-tuning run on `rows` pairs; `settings` are keys of the YAML and replace these."""
    base, data = folder / f"base-{family}", folder / f"pairs-{rows}.jsonl"
    if not base.exists():
        save_checkpoint(base, family)
    if not data.exists():
        write_pairs(data, rows)
    chosen: dict[str, Any] = {
        "base_model": str(base),
        "rl": "dpo",
        "datasets": [{"path": str(data)}],
        "sequence_len": 128,
        "micro_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": str(folder / "out"),
        "seed": 1,
    } | settings
    if chosen.get("save_steps"):
        chosen["save_strategy"] = "steps"
    return {key: value for key, value in chosen.items() if value is not None}
