"""Two processes stopped and resumed end where they would have ended, replicated and sharded alike."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fiducial.run_report import PLAN_FILE
from fiducial.train import train
from fiducial.training.callbacks import read_metrics_lines
from fiducial.training.checkpoints import Launch, missing_from
from launching import one_process, two_processes
from run_configs import run_config
from tiny import save_adapter, save_checkpoint

WORKER = Path(__file__).parents[1] / "run_worker.py"
# Momentum is state that must be resumed, and unlike Adam's it leaves rounding as small as it is.
MOMENTUM = {"optimizer": "sgd", "optim_args": {"momentum": 0.9}, "learning_rate": 1e-2}
LORA = {"adapter": "lora", "lora_r": 4}
SHARDED = {"fsdp_version": 2, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
LIVE = {"reference": {"schedule": "live"}}
SYNCED = {"schedule": "synced", "sync_steps": 2}
OFFLOADED = {"model": "other", "offload": "disk"}
OFFLOADED_POLICY = "sharded adapter, its weights offloaded, live"
WEIGHTS_OFFLOADED = {"fsdp_config": {"offload_params": True}}
STREAMED = {"streaming": True, "streaming_multipack_buffer_size": 5, "max_steps": 6}
KINDS: dict[str, dict[str, Any]] = {
    "replicated": {"learning_rate": 1e-3},
    "replicated, adapter with dropout": LORA | {"lora_dropout": 0.1, "learning_rate": 1e-2},
    "sharded": MOMENTUM | {"fsdp_version": 2},
    "sharded adapter, live reference": MOMENTUM | LORA | LIVE | SHARDED,
    # A head is in the part of the model that FSDP2 does not let go after a pass without gradient.
    "sharded adapter, synced": MOMENTUM
    | LORA
    | {"lora_target_modules": ["q_proj", "lm_head"], "reference": SYNCED | {"mixup_alpha": 1.0}}
    | {"fsdp_version": 2},
}
REFERENCES: dict[str, dict[str, Any]] = {
    "sharded, synced": {"reference": SYNCED | {"mixup_alpha": 0.25}},
    "sharded adapter, named": LORA | {"reference": {"adapter": "start", "schedule": "live"}},
    "sharded adapter, named, streamed": LORA | STREAMED | {"reference": {"adapter": "start"}},
    OFFLOADED_POLICY: LORA | LIVE | WEIGHTS_OFFLOADED,
    "sharded, offloaded": {"reference": OFFLOADED},
    "sharded, offloaded, live": {"reference": OFFLOADED | {"schedule": "live"}},
    "sharded, offloaded, streamed": STREAMED | {"reference": OFFLOADED},
}
"""Runs that are not resumed: with references that stand beside a sharded policy."""
ONE_PROCESS = [kind for kind in KINDS if kind.startswith("sharded")]


def settings(folder: Path, kind: str, output: str, **more: Any) -> dict[str, Any]:
    """Two epochs of three steps, each of four pairs in two processes."""
    chosen = {"num_epochs": 2, "logging_steps": 2, "val_set_size": 3, "eval_steps": 3, "micro_batch_size": 2}
    chosen |= (KINDS[kind] if kind in KINDS else MOMENTUM | {"fsdp_version": 2} | REFERENCES[kind]) | more
    if "live reference" in kind:
        chosen["lora_model_dir"] = str(folder / "start")
    places = {name: str(folder / name) for name in ("start", "other")}
    if "reference" in chosen:
        chosen["reference"] = {key: places.get(name, name) for key, name in chosen["reference"].items()}
    return run_config(folder, rows=13, **chosen, output_dir=str(folder / kind / output))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes did every run: whole, broken off after step 4, and resumed."""
    folder = tmp_path_factory.mktemp("two")
    save_adapter(folder / "start", Path(settings(folder, "sharded", "whole")["base_model"]))
    save_checkpoint(folder / "other", seed=1)
    runs = [{"settings": settings(folder, kind, "whole"), "stop_after": None} for kind in REFERENCES]
    for kind in KINDS:
        resume = {"auto_resume_from_checkpoints": True}
        runs += [
            {"settings": settings(folder, kind, "whole"), "stop_after": None},
            {"settings": settings(folder, kind, "broken"), "stop_after": 4},
            {"settings": settings(folder, kind, "broken", **resume), "stop_after": None},
        ]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    two_processes(WORKER, str(folder / "runs.json"))
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [record for _, record in read_metrics_lines(folder / "metrics.jsonl")]
    names = ("loss", "eval_loss")
    return [(line["step"], line[name]) for line in lines for name in names if name in line]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in second)


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_is_uninterrupted(together: Path, kind: str) -> None:
    whole, resumed = together / kind / "whole", together / kind / "broken"
    assert (resumed / "checkpoint-4").is_dir()
    assert [step for step, _ in losses(whole)] == [0, 1, 2, 3, 4, 6, 6]
    assert losses(resumed) == losses(whole)
    ours, theirs = weights(resumed), weights(whole)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_says_how_many_processes_it_is_of(together: Path) -> None:
    checkpoint = together / "replicated" / "broken" / "checkpoint-4"
    assert missing_from(checkpoint, Launch(2)) == []
    (checkpoint / "rng_state.pth").touch()
    assert missing_from(checkpoint, Launch(1)) == ["states saved by 1 process(es) and has those of 2"]


@pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning"
)  # PEFT's, of a head's adapter
@pytest.mark.parametrize("kind", [*ONE_PROCESS, *REFERENCES])
def test_a_sharded_run_leaves_the_whole_model_of_one_process(together: Path, kind: str) -> None:
    sharded = together / kind / "whole"
    alone = settings(together, kind, "alone", micro_batch_size=4)
    train({key: value for key, value in alone.items() if not key.startswith("fsdp_")})
    expected, found = weights(together / kind / "alone"), weights(sharded)
    assert set(found) == set(expected)
    assert all(found[name].shape == expected[name].shape for name in expected)
    assert furthest(found, expected) < 1e-5
    for (_, ours), (_, theirs) in zip(losses(sharded), losses(together / kind / "alone"), strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-4)


@pytest.mark.parametrize(
    "kind", ["sharded adapter, live reference", "sharded adapter, named", OFFLOADED_POLICY, "sharded"]
)
def test_an_adapters_layers_are_gathered_once_for_its_live_reference(together: Path, kind: str) -> None:
    plan = json.loads((together / kind / "whole" / PLAN_FILE).read_text(encoding="utf-8"))["reference"]
    assert plan["gathered_once"] == ("adapter" in kind)


def test_one_process_may_offload_its_weights(together: Path) -> None:
    run = settings(together, OFFLOADED_POLICY, "one process", micro_batch_size=4)
    runs = together / "one.json"
    runs.write_text(json.dumps([{"settings": run, "stop_after": None}]), encoding="utf-8")
    one_process(WORKER, str(runs))
    found, expected = (together / OFFLOADED_POLICY / name for name in ("one process", "whole"))
    assert furthest(weights(found), weights(expected)) < 1e-5
    for (_, ours), (_, theirs) in zip(losses(found), losses(expected), strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-4)
    plan = json.loads((found / PLAN_FILE).read_text(encoding="utf-8"))["reference"]
    assert plan["gathered_once"]


@pytest.mark.parametrize("kind", ["sharded adapter, named, streamed", "sharded, offloaded, live"])
def test_the_start_as_reference_would_leave_another_model(together: Path, kind: str) -> None:
    alone = settings(together, kind, "control", micro_batch_size=4)
    train({key: value for key, value in alone.items() if not key.startswith(("fsdp_", "reference"))})
    control, found = weights(together / kind / "control"), weights(together / kind / "whole")
    assert furthest(found, control) > 1e-4


@pytest.mark.parametrize("kind", ONE_PROCESS)
def test_what_a_sharded_run_leaves_behind_loads_as_any_model(together: Path, kind: str) -> None:
    folder = together / kind / "whole"
    if "adapter" in kind:
        base = AutoModelForCausalLM.from_pretrained(together / "base-llama")
        loaded: Any = PeftModel.from_pretrained(base, folder)
        held = {name.replace(".default", ""): value for name, value in loaded.named_parameters()}
    else:
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        held = dict(loaded.named_parameters())
    assert all(torch.equal(held[name], saved) for name, saved in weights(folder).items())
    assert not any(path.suffix in (".bin", ".pt") for path in folder.iterdir())
    AutoTokenizer.from_pretrained(folder)
