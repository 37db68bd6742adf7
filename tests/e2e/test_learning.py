"""Every method of examples/methods teaches the quickstart's model manners, measured in one way for all.

A held-out pair is right if training raised the chosen completion's log-prob more than the rejected one's. At
the start every pair is a tie, which is half right.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiducial.losses import LOSSES
from fiducial.train import train
from quickstart_commands import MADE, ROOT, made_by_quickstart

METHODS = sorted((ROOT / "examples" / "methods").glob("*.yaml"))
ROWS = {"train": 128, "ranked": 128, "held-out": 32}
"""Rows enough for the steps of an example; the rest would be read and scored for nothing."""
LEARNED = 0.85


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's base model and the first of its pairs."""
    made, folder = made_by_quickstart(tmp_path_factory), tmp_path_factory.mktemp("learning")
    shutil.copytree(made / MADE, folder / MADE)
    for name, count in ROWS.items():
        path = folder / MADE / "pairs" / f"{name}.jsonl"
        rows = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(rows[:count]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def untrained(workspace: Path) -> torch.Tensor:
    """The margins of the base model."""
    return margins(workspace, workspace / MADE / "base")


def margins(workspace: Path, model: Path) -> torch.Tensor:
    """Log-prob of chosen minus rejected, for every held-out pair."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / MADE / "base")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    lines = (workspace / MADE / "pairs" / "held-out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    chosen, rejected = (
        whole_logps(policy, tokenizer, [row["prompt"] + row[name] for row in rows])
        for name in ("chosen", "rejected")
    )
    return chosen - rejected


@torch.no_grad()
def whole_logps(model: Any, tokenizer: Any, chats: list[Any]) -> torch.Tensor:
    """Log-probs of chats; their prompts cancel in a margin."""
    batch = tokenizer(tokenizer.apply_chat_template(chats, tokenize=False), padding=True, return_tensors="pt")
    labels = batch["input_ids"][:, 1:, None]
    logps = model(**batch).logits[:, :-1].log_softmax(-1).gather(2, labels)[..., 0]
    return (logps * batch["attention_mask"][:, 1:]).sum(1)


def accuracy(settings: dict[str, Any], workspace: Path, untrained: torch.Tensor) -> float:
    """After training with `settings`."""
    train(settings)
    gained = margins(workspace, workspace / settings["output_dir"]) - untrained
    return ((gained > 0).float() + 0.5 * (gained == 0).float()).mean().item()


def test_every_method_has_an_example() -> None:
    assert {config.model_fields["name"].default for config in LOSSES} <= {path.stem for path in METHODS}


@pytest.mark.slow
@pytest.mark.parametrize("example", METHODS, ids=lambda path: path.stem)
def test_it_learns(
    example: Path, workspace: Path, untrained: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)

    assert accuracy(yaml.safe_load(example.read_text(encoding="utf-8")), workspace, untrained) > LEARNED


@pytest.mark.slow
def test_swapped_pairs_teach_the_opposite(
    workspace: Path, untrained: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace)
    settings = yaml.safe_load((ROOT / "examples" / "methods" / "dpo.yaml").read_text(encoding="utf-8"))
    pairs = (MADE / "pairs" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(pair) for pair in pairs]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    Path("swapped.jsonl").write_text("\n".join(map(json.dumps, swapped)), encoding="utf-8")
    settings |= {"datasets": [{"path": "swapped.jsonl"}], "output_dir": "outputs/swapped"}

    assert accuracy(settings, workspace, untrained) < 0.15
