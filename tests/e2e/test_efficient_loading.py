"""`accelerate launch --use_fsdp` with `cpu_ram_efficient_loading`: each process scores before it shards.

Which ranks read the weights is then up to transformers. A rank with empty ones would score its share of the
reference, and the layout, on noise.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fiducial.train import train
from fiducial.training.callbacks import read_metrics_lines
from launching import torchrun
from run_configs import run_config

WORKER = Path(__file__).parents[1] / "run_worker.py"
LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
SHARDED = {"fsdp_version": 2, "fsdp_config": {"cpu_ram_efficient_loading": True}}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied embeddings": {"family": "gemma3_text"},
    "adapter": {"adapter": "lora", "lora_r": 4},
}


def settings(folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    steps = {"rows": 12, "max_steps": 3, "optimizer": "sgd", "learning_rate": 1e-2}
    return run_config(folder, **(steps | KINDS[kind] | more), output_dir=str(folder / kind))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    runs = [
        {"settings": settings(folder, kind, micro_batch_size=2, **SHARDED), "stop_after": None}
        for kind in KINDS
    ]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    own_cache = {"FIDUCIAL_CACHE": str(folder / "cache")}
    torchrun(WORKER, str(folder / "runs.json"), environment=LAUNCHED | own_cache)
    return folder


def losses(folder: Path) -> list[float]:
    return [log["loss"] for _, log in read_metrics_lines(folder / "metrics.jsonl") if "loss" in log]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_process_has_the_whole_policy_before_step_1(tmp_path: Path, together: Path, kind: str) -> None:
    train(settings(tmp_path, kind, micro_batch_size=4))
    assert len(losses(together / kind)) == 3
    assert losses(together / kind) == pytest.approx(losses(tmp_path / kind), rel=1e-4)
    (ours,), (expected,) = ((folder / kind).glob("*.safetensors") for folder in (together, tmp_path))
    held, alone = load_file(ours), load_file(expected)
    if kind == "tied embeddings":  # accelerate gathers them under both names
        assert torch.equal(held.pop("lm_head.weight"), held["model.embed_tokens.weight"])
    assert set(held) == set(alone)
    assert max((held[name] - alone[name]).abs().max().item() for name in alone) < 1e-5
