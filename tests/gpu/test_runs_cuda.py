"""Whole runs on a GPU: against the same runs on the CPU, every kind of reference, memory that runs out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fiducial.errors import ModelError, TrainingError
from fiducial.reference.approximation import LARGEST_MEAN
from fiducial.run_report import PLAN_FILE
from fiducial.train import TrainResult, train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.interruption import Interrupted
from launching import free_port
from quantised import HELD, save_checkpoints, short_run
from resuming import interrupt_after
from run_configs import run_config, write_labelled
from tiny import FAMILIES, save_larger_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EXACT = {"bf16": False, "tf32": False, "optimizer": "sgd", "learning_rate": 1e-2}
LORA = {"adapter": "lora", "lora_r": 4}
SEPARATE = {"source": "separate_model", "schedule": "live"}
METHODS: dict[str, dict[str, Any]] = {
    "dpo, scored ahead": {"reference": {"schedule": "precomputed"}},
    "dpo, a second model": {"reference": SEPARATE},
    "dpo, adapter off": LORA | {"reference": {"schedule": "live"}},
    "ipo": {"rl": "ipo"},
    "kto": {"rl": "kto"},
    "orpo": {"rl": "orpo"},
    "simpo": {"rl": "simpo"},
    "checkpointed": {"gradient_checkpointing": True, "family": "gemma2"},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"peft_use_dora": True, "lora_target_linear": True},
    "rslora": {"peft_use_rslora": True},
    "pissa": {"peft_init_lora_weights": "pissa"},
    "trained modules": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "bias": {"peft_bias": "all", "family": "qwen2"},
    "half": {"bf16": "full"},
}
ALONE = """
import json, sys
from rich.console import Console
from fiducial.train import train
for run in json.load(open(sys.argv[1])):
    train(run, console=Console(quiet=True))
"""


def quietly(settings: dict[str, Any]) -> TrainResult:
    return train(settings, console=Console(quiet=True))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for _, line in read_metrics_lines(folder / "metrics.jsonl") if "loss" in line]


def exact_run(folder: Path, name: str, output: str) -> dict[str, Any]:
    keys: dict[str, Any] = {"rows": 12, "max_steps": 3} | EXACT | METHODS[name]
    if keys.get("rl") == "kto":
        data = folder / "labelled.jsonl"
        if not data.exists():
            write_labelled(data, [number % 3 > 0 for number in range(12)])
        keys["datasets"] = [{"path": str(data)}]
    return run_config(folder, **keys, output_dir=str(folder / output / name))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of `METHODS` by a process that sees no GPU."""
    folder = tmp_path_factory.mktemp("runs")
    runs = folder / "runs.json"
    runs.write_text(json.dumps([exact_run(folder, name, "cpu") for name in METHODS]), encoding="utf-8")
    run_alone(runs, CUDA_VISIBLE_DEVICES="", FIDUCIAL_CACHE=str(folder / "cache"), OMP_NUM_THREADS="2")
    return folder


def run_alone(runs: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(runs)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.xdist_group("as a CPU")
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_trains_as_a_cpu(on_cpu: Path, name: str) -> None:
    result = quietly(exact_run(on_cpu, name, "gpu"))
    ours, expected = losses(result.output_dir), losses(on_cpu / "cpu" / name)
    assert len(ours) == 3
    assert ours == pytest.approx(expected, rel=2e-4)
    assert ours[0] != pytest.approx(ours[2], rel=1e-3)  # it learned: equal losses say something


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_in_half_precision(tmp_path: Path, family: str) -> None:
    result = quietly(run_config(tmp_path, family=family, max_steps=3, learning_rate=1e-4))
    assert result.record["layout"]["layout"] == "packed"
    assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"]
    assert result.record["proof"]["moved_while_training"] == 0
    assert losses(result.output_dir)[0] == pytest.approx(0.6931, abs=5e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_starts_at_its_reference_in_half_precision(tmp_path: Path, name: str) -> None:
    keys = {"adapter": "lora", "lora_r": 4} | ADAPTERS[name]
    result = quietly(run_config(tmp_path, max_steps=3, learning_rate=1e-3, **keys))
    assert losses(result.output_dir)[0] == pytest.approx(0.6931, abs=2e-2)
    assert result.record["proof"]["moved_while_training"] == 0


def test_ligers_kernels_change_only_the_rounding(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is the `liger` extra")
    keys = {"max_steps": 3, "optimizer": "sgd", "learning_rate": 1e-2, "reference": SEPARATE}
    fused = {"liger_rope": True, "liger_rms_norm": True, "liger_glu_activation": True}
    runs = [
        run_config(tmp_path, **keys, **more, output_dir=str(tmp_path / str(number)))
        for number, more in enumerate([{}, fused])  # in this order: they stay in the process
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    run_alone(tmp_path / "runs.json")
    plain, ours = losses(tmp_path / "0"), losses(tmp_path / "1")
    assert ours == pytest.approx(plain, rel=2e-2)
    assert ours != plain


def test_a_family_without_such_a_kernel_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is the `liger` extra")
    with pytest.raises(ModelError, match="no such kernel for gpt_neox"):
        quietly(run_config(tmp_path, family="gpt_neox", liger_rope=True))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoints(tmp_path_factory.mktemp("quantised"))


@pytest.mark.parametrize(
    "reference",
    [{"device": "cpu"}, {"offload": "cpu"}, {"offload": "disk"}],
    ids=["on the CPU", "layers on the CPU", "layers on disk"],
)
def test_a_reference_held_elsewhere_is_the_same(
    tmp_path: Path, checkpoints: Path, reference: dict[str, Any]
) -> None:
    results = [
        quietly(
            short_run(
                tmp_path, checkpoints, EXACT | {"reference": keys, "output_dir": str(tmp_path / str(number))}
            )
        )
        for number, keys in enumerate([SEPARATE, SEPARATE | reference])
    ]
    here, elsewhere = [losses(result.output_dir) for result in results]
    assert elsewhere == pytest.approx(here, rel=1e-4)
    proof = results[1].record["proof"]
    assert proof["max_difference"] <= 1e-4
    # Another device sums in another order, and that is measured.
    assert (proof["approximation"] is None) == ("offload" in reference)


def test_weights_may_wait_in_the_cpus_memory(tmp_path: Path) -> None:
    keys = EXACT | LORA | {"max_steps": 3, "lora_target_linear": True, "reference": {"schedule": "live"}}
    here = run_config(tmp_path, **keys)
    offloaded = {"fsdp_version": 2, "fsdp_config": {"offload_params": True}}
    away = here | offloaded | {"output_dir": str(tmp_path / "away")}
    (tmp_path / "runs.json").write_text(json.dumps([away]), encoding="utf-8")
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    one = dict.fromkeys(("RANK", "LOCAL_RANK"), "0") | dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    run_alone(tmp_path / "runs.json", **place, **one)
    assert losses(tmp_path / "away") == pytest.approx(losses(quietly(here).output_dir), rel=1e-4)
    plan = json.loads((tmp_path / "away" / PLAN_FILE).read_text(encoding="utf-8"))
    assert plan["reference"]["gathered_once"]


@pytest.mark.parametrize("schedule", ["live", "precomputed"])
@pytest.mark.parametrize(
    "held", [{"load_in_8bit": True}, {"load_in_4bit": True}, {"dtype": "bfloat16"}], ids=str
)
def test_an_approximate_reference_is_measured(
    tmp_path: Path, checkpoints: Path, held: dict[str, Any], schedule: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the `quantization` extra")
    keys = {"source": "separate_model", "schedule": schedule} | held
    result = quietly(short_run(tmp_path, checkpoints, EXACT | {"reference": keys}))
    assert 1e-3 < result.record["proof"]["approximation"]["mean_difference"] < LARGEST_MEAN


@pytest.mark.parametrize("schedule", ["live", "precomputed"])
@pytest.mark.parametrize("keys", HELD.values(), ids=HELD)
def test_a_quantised_policy_starts_at_its_reference(
    tmp_path: Path, checkpoints: Path, keys: dict[str, Any], schedule: str
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is the `quantization` extra")
    result = quietly(short_run(tmp_path, checkpoints, keys | {"reference": {"schedule": schedule}}))
    assert losses(result.output_dir)[0] == pytest.approx(0.6931, abs=5e-3)
    assert result.record["proof"]["max_difference"] <= result.record["proof"]["tolerance"]
    assert result.record["proof"]["moved_while_training"] == 0
    assert result.metrics["loss"] < 0.69


@pytest.mark.parametrize("synced", [1.0, 0.5])
def test_a_reference_that_follows(tmp_path: Path, synced: float) -> None:
    moving = {"schedule": "synced", "sync_steps": 2, "mixup_alpha": synced}
    result = quietly(run_config(tmp_path, max_steps=6, reference=moving, **EXACT))
    assert len(losses(result.output_dir)) == 6
    still = quietly(run_config(tmp_path, max_steps=6, output_dir=str(tmp_path / "still"), **EXACT))
    assert losses(result.output_dir)[:2] == pytest.approx(losses(still.output_dir)[:2], rel=1e-4)
    assert losses(result.output_dir)[3] != pytest.approx(losses(still.output_dir)[3], rel=1e-4)


def test_a_resumed_run_goes_on_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"max_steps": 6, "save_steps": 2, "rows": 24}
    whole = quietly(run_config(tmp_path, **keys, output_dir=str(tmp_path / "whole")))
    stopped = run_config(tmp_path, **keys)
    with monkeypatch.context() as patched:
        interrupt_after(3, patched)
        with pytest.raises(Interrupted):
            quietly(stopped)
    resumed = quietly(stopped | {"auto_resume_from_checkpoints": True})
    assert losses(resumed.output_dir) == pytest.approx(losses(whole.output_dir), rel=1e-3)


def test_a_live_reference_is_timed_on_the_gpu(tmp_path: Path) -> None:
    result = quietly(run_config(tmp_path, max_steps=8, rows=32, reference=SEPARATE))
    seconds = result.record["measured"]["seconds"]
    assert 0.05 * seconds["training"] < seconds["scoring"] < seconds["training"]


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 34M parameters, and pairs of 1,016 tokens."""
    folder = tmp_path_factory.mktemp("larger")
    save_larger_checkpoint(folder / "base", layers=8)
    rows = [{"prompt": "abcd", "chosen": "x" * 506, "rejected": chr(65 + row) * 506} for row in range(16)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def larger_run(larger: Path, output: Path, **settings: Any) -> dict[str, Any]:
    return {
        "base_model": str(larger / "base"),
        "rl": "dpo",
        "datasets": [{"path": str(larger / "pairs.jsonl")}],
        "sequence_len": 512,
        "micro_batch_size": 16,
        "micro_batch_tokens": 8192,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "max_steps": 2,
        "save_strategy": "no",
        "output_dir": str(output),
    } | settings


@pytest.mark.xdist_group("larger")
@pytest.mark.parametrize("precision", [{}, {"bf16": False}], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("adapter", [{}, LORA | {"lora_target_linear": True}], ids=["full", "lora"])
def test_the_predicted_peak_is_the_allocator_s(
    larger: Path, tmp_path: Path, adapter: dict[str, Any], precision: dict[str, Any]
) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = quietly(larger_run(larger, tmp_path / "out", **adapter, **precision))
    measured = torch.cuda.max_memory_allocated() - before
    assert result.record["memory"]["peak_bytes"] == pytest.approx(measured, rel=0.2)


@pytest.mark.xdist_group("larger")
def test_a_pass_that_does_not_fit_is_cut_and_changes_nothing(
    larger: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peaks, results = [], []
    for tokens in (1024, 16 * 1024):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run = larger_run(larger, tmp_path / str(tokens), **EXACT, micro_batch_tokens=tokens)
        results.append(quietly(run))
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] > 2 * peaks[0]
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / whole)
    try:
        cut = quietly(larger_run(larger, tmp_path / "cut", **EXACT, micro_batch_tokens=16 * 1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Out of memory with" in caplog.text
    assert losses(cut.output_dir) == pytest.approx(losses(results[0].output_dir), rel=1e-4)


@pytest.mark.xdist_group("larger")
def test_what_fits_nowhere_is_said(larger: Path, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    # The weights fit, a pass does not.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 400 * 2**20) / whole)
    try:
        with pytest.raises(TrainingError, match="memory"):
            quietly(larger_run(larger, tmp_path / "out", **EXACT, sequence_len=1024))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
