"""Two processes train as one does: the same gradients, losses and metrics, replicated and really sharded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distributed_worker
from fiducial.training.callbacks import read_metrics_lines
from launching import torchrun

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
TDPO = ("tdpo-full", "tdpo-full-fsdp2", "tdpo-tied-fsdp2", "tdpo-lora-fsdp2")
IN_STEP = ("lora-step-fsdp2", "lora-upper-step-checkpointed-fsdp2")
MODES = (
    "full",
    "lora",
    "mean-per-process",
    "full-fsdp2",
    "tied-fsdp2",
    "lora-fsdp2",
    "trunk",
    "trunk-fsdp2",
    "lora-live-fsdp2",
    *IN_STEP,
    *TDPO,
)
BUDGET = 60  # the processes need different numbers of micro-batches
ROWS = 9  # steps of 4, 4 and 1: in the last one the second process has nothing


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """By mode, what two processes did; they are started once for all modes."""
    folder = tmp_path_factory.mktemp("two")
    distributed_worker.run_settings(folder)  # what both read is there before they start
    torchrun(WORKER, str(folder), ",".join(MODES), str(BUDGET), str(ROWS))
    results = {mode: torch.load(folder / f"{mode}.pt", weights_only=True) for mode in MODES}
    return results | {"run": run_result(folder / "run")}


def run_result(folder: Path) -> dict:
    logs = [record for _, record in read_metrics_lines(folder / "metrics.jsonl")]
    return {"logs": logs, "weights": load_file(folder / "model.safetensors")}


def run_one(folder: Path, mode: str) -> dict:
    distributed_worker.main(folder, mode, 10**6, ROWS)
    return torch.load(folder / f"{mode}.pt", weights_only=True)


def distances(first: dict, second: dict) -> list[float]:
    """Largest difference of any gradient at each step, as a share of the largest gradient."""
    assert len(first["gradients"]) == len(second["gradients"]) == 3
    shares = []
    for ours, theirs in zip(first["gradients"], second["gradients"], strict=True):
        assert set(ours) == set(theirs)
        largest = max(gradient.abs().max().item() for gradient in ours.values())
        shares.append(max((ours[name] - theirs[name]).abs().max().item() for name in ours) / largest)
    return shares


def logged(result: dict, name: str) -> list[float]:
    return [log[name] for log in result["logs"] if name in log]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "mean-per-process"])
def test_two_processes_train_as_one(tmp_path: Path, two_processes: dict[str, dict], mode: str) -> None:
    alone = run_one(tmp_path, mode.removesuffix("-fsdp2"))
    together = two_processes[mode]
    assert together["fsdp2"] == mode.endswith("fsdp2")
    assert together["ddp"] != together["fsdp2"]
    assert max(distances(alone, together)) < 1e-4
    divergences = ("sequence_kl/chosen", "eval_sequence_kl/rejected") if "tdpo" in mode else ()
    assert all(min(logged(alone, name)) > 0.1 for name in divergences)
    for name in ("loss", "rewards/margins", "kl", "eval_loss", "eval_rewards/margins", *divergences):
        assert logged(together, name) == pytest.approx(logged(alone, name), rel=1e-4, abs=1e-5)
    assert len(logged(together, "loss")) == 3


def test_layers_are_gathered_once_for_policy_and_reference(two_processes: dict[str, dict]) -> None:
    apart, together, upper = (two_processes[mode] for mode in ("lora-live-fsdp2", *IN_STEP))
    trained = apart["passes"][True]
    evaluated = (apart["passes"][False] - trained) // 2  # the policy's passes and the reference's
    assert trained > 3
    assert evaluated > 1
    # In each pass of the policy, and in backward, for which FSDP2 also gathers a layer below the adapter.
    once = 2 * trained + evaluated
    assert apart["passes"] == together["passes"] == upper["passes"]
    assert apart["gathers"] == dict.fromkeys((0, 1), once + trained + evaluated)
    assert together["gathers"] == upper["gathers"] == dict.fromkeys((0, 1), once)


@pytest.mark.parametrize("mode", ["full-fsdp2", "lora-fsdp2", "lora-step-fsdp2"])
def test_no_process_holds_whole_gradients_from_pass_to_pass(
    two_processes: dict[str, dict], mode: str
) -> None:
    result = two_processes[mode]
    assert result["passes"][True] > 3, "steps are cut"
    assert result["reductions"] == dict.fromkeys((0, 1), result["passes"][True])


def test_gathering_layers_once_changes_nothing(two_processes: dict[str, dict]) -> None:
    apart, together = two_processes["lora-live-fsdp2"], two_processes["lora-step-fsdp2"]
    assert distances(apart, together) == [0, 0, 0]
    for name in ("loss", "rewards/margins", "eval_loss"):
        assert logged(together, name) == logged(apart, name) != []
    assert min(map(abs, logged(together, "rewards/margins"))) > 1e-3


def test_the_mean_of_each_process_would_be_another_gradient(
    tmp_path: Path, two_processes: dict[str, dict]
) -> None:
    assert distances(run_one(tmp_path, "full"), two_processes["mean-per-process"])[2] > 0.1


def test_a_whole_run_started_with_torchrun_is_that_of_one_process(
    tmp_path: Path, two_processes: dict[str, dict]
) -> None:
    distributed_worker.whole_run(tmp_path)
    alone, together = run_result(tmp_path / "run"), two_processes["run"]
    assert len(logged(alone, "loss")) == 6
    for name in ("step", "loss", "eval_loss", "rewards/margins"):
        assert logged(together, name) == pytest.approx(logged(alone, name), rel=1e-4, abs=1e-5)
    for name, weight in alone["weights"].items():
        assert (weight - together["weights"][name]).abs().max() < 1e-5
