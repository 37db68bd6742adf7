"""The predicted peak of a whole run on the CPU against the process's own high-water mark.

The model is large enough for the interpreter not to matter, and every run is a process of its own. Predicted
is what is allocated. glibc keeps holes of what was freed between what is still held, and aligned blocks do
not fit into them again: under LoRA, whose layers free several arrays for each they keep, that is as much once
more (docs/reference.md). There the library is told to give back at once what is freed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny import save_larger_checkpoint

RUN = """
import json, sys
from rich.console import Console
from fiducial.train import train
result = train(json.loads(sys.argv[1]), console=Console(quiet=True))
print("RECORD", json.dumps(result.record))
"""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
LORA = {"adapter": "lora", "lora_r": 8, "lora_target_linear": True}

UPPER = {"unfrozen_parameters": [r"model\.layers\.[23]\."], "reference": {"schedule": "live"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21M parameters, and two pairs that fill a pass of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("memory")
    save_larger_checkpoint(folder / "base", layers=4)
    rows = [{"prompt": "abcd", "chosen": "x" * 506, "rejected": letter * 506} for letter in "yz"]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's high-water mark")
@pytest.mark.parametrize(
    ("settings", "allocator"),
    [({}, {}), (LORA, GIVE_BACK), (UPPER, GIVE_BACK)],
    ids=["full", "lora", "upper layers beside a reference"],
)
def test_the_predicted_peak_is_the_measured_one(
    settings: dict[str, Any], allocator: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    run = {
        "base_model": str(folder / "base"),
        "rl": "dpo",
        "datasets": [{"path": str(folder / "pairs.jsonl")}],
        "sequence_len": 512,
        "micro_batch_size": 2,
        "micro_batch_tokens": 2048,
        "learning_rate": 1e-4,
        "max_steps": 2,  # the optimizer has its state from the end of the first on
        "save_strategy": "no",
        "output_dir": str(tmp_path / "out"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(run | settings)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | allocator,
    )
    assert "RECORD" in done.stdout, done.stderr[-2000:]
    record = json.loads(done.stdout.partition("RECORD ")[2].splitlines()[0])
    predicted, measured = record["predicted"]["peak_bytes"], record["measured"]["peak_bytes"]
    assert predicted == record["memory"]["peak_bytes"]
    assert measured > 300e6
    assert predicted == pytest.approx(measured, rel=0.2)
