"""Rewrite the parts of README.md that are made: what `fiducial plan` prints for its run, and the tree.

    python docs/readme.py        (or: make docs)

A test fails while the README holds anything else. The plan is made offline, from the model's config alone.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PACKAGE = ROOT / "src" / "fiducial"
WIDTH = 118
FOLDERS = {
    "examples/": "Runs to start from; quickstart/ makes its own model and pairs",
    "docs/": "The reference's rules, losses, data, memory and speed, coming from axolotl or TRL",
    "bench/": "Measures against TRL and against the machine's limit; results/ as JSON",
    "tests/": "unit/ mirrors the package; contract/, e2e/, parity/ (against TRL), gpu/; naive twins",
    "src/fiducial/": "The package",
}

# meta-llama/Llama-3.1-8B-Instruct, as far as a plan reads it.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def render(readme: str) -> str:
    """`readme` with its made parts made anew."""
    run = re.search(r"```yaml\n(# run\.yaml\n.*?)```", readme, re.DOTALL)
    assert run is not None, "the README shows a run.yaml"
    for name, text in {"plan": plan(run[1]), "tree": tree()}.items():
        made = f"<!-- {name}: made by docs/readme.py -->\n```text\n{text}\n```"
        pattern = rf"<!-- {name}: made by docs/readme\.py -->\n```text\n.*?\n```"
        assert re.search(pattern, readme, re.DOTALL), f"the README has a place for the {name}"
        readme = re.sub(pattern, lambda _, made=made: made, readme, flags=re.DOTALL)
    return readme


def plan(run: str) -> str:
    """What `fiducial plan` prints for `run` where the hub's cache holds the model's config alone."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "hub" / "models--meta-llama--Llama-3.1-8B-Instruct"
        (cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (cache / "snapshots" / ("0" * 40) / "config.json").write_text(json.dumps(LLAMA_8B), encoding="utf-8")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40, encoding="utf-8")
        (Path(folder) / "run.yaml").write_text(run, encoding="utf-8")
        offline = {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "COLUMNS": "90", "PYTHONUTF8": "1"}
        printed = subprocess.run(
            [sys.executable, "-m", "fiducial", "plan", "run.yaml"],
            cwd=folder,
            env={key: value for key, value in os.environ.items() if key != "HF_HUB_CACHE"} | offline,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            check=True,
        ).stdout
    return "\n".join(line.rstrip() for line in printed.strip().splitlines())


def tree() -> str:
    """The folders, and each file of the package with the first words of its docstring."""
    lines = [f"{folder:<26}{what}" for folder, what in FOLDERS.items()]
    for path in sorted(PACKAGE.rglob("*.py"), key=_files_before_folders):
        depth = len(path.relative_to(PACKAGE).parts)
        if path.name == "__init__.py":
            if depth == 1:
                continue
            name, indent = f"{path.parent.name}/", "  " * (depth - 1)
        else:
            name, indent = path.name, "  " * depth
        lines.append(_clip(f"{indent}{name:<{26 - len(indent)}}{purpose(path)}"))
    return "\n".join(lines)


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[^A-Z ])[.](?:\s|$)", paragraph)[0].rstrip(".:")


def _files_before_folders(path: Path) -> list[tuple[int, str]]:
    parts = path.relative_to(PACKAGE).parts
    return [(2 if part != path.name else int(part != "__init__.py"), part) for part in parts]


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1].rpartition(" ")[0].rstrip(",;:") + " …"


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
