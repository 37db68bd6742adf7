"""The fenced blocks of the documentation, and a workspace in which they run without a hub."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model

from tiny import save_checkpoint, tiny_model

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    file: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of the documentation, or those in one of `languages`."""
    found = []
    for path in DOCS:
        text = path.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(path.relative_to(ROOT)), line, match["language"], body))
    return [block for block in found if not languages or block.language in languages]


def commands() -> list[tuple[str, str]]:
    """Every command line of the documentation, with where it stands."""
    return [
        (f"{block}", line.partition("  #")[0].strip())
        for block in blocks("bash")
        for line in block.text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]


def make_workspace(folder: Path) -> None:
    """A tiny checkpoint, another one, an adapter for the first, and pairs."""
    save_checkpoint(folder / "base")
    save_checkpoint(folder / "other", seed=1)
    adapter = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapter.save_pretrained(folder / "adapter")
    rows = [
        {"prompt": f"Question {index}?", "chosen": f" Yes, {index}.", "rejected": f" No, not {index}."}
        for index in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def localised(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` with everything that would come from the hub replaced by what the workspace holds."""
    local: dict[str, Any] = {
        "base_model": "base",
        "datasets": [{"path": "pairs.jsonl"}],
        "learning_rate": 1e-4,
        "output_dir": "out",
    }
    changed = settings | local | {"bf16": False, "sequence_len": 256, "max_steps": 2}
    if settings.get("val_set_size"):
        changed["val_set_size"] = 2
    if settings.get("test_datasets"):
        changed["test_datasets"] = [{"path": "pairs.jsonl"}]
    if settings.get("lora_model_dir"):
        changed["lora_model_dir"] = "adapter"
    places = {"model": "other", "adapter": "adapter"}
    reference = settings.get("reference") or {}
    found = {key: place for key, place in places.items() if key in reference}
    if found:
        changed["reference"] = reference | found
    return changed
