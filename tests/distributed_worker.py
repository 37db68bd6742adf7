"""One process of a distributed run, started by torchrun from test_distributed.py.

Writes, from rank 0, the gradients of each optimizer step, what was logged, and how the model was wrapped.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fiducial import compat
from fiducial.config.methods import TDPO2Config
from fiducial.model.loader import unfreeze
from fiducial.model.scoring import Scorer
from fiducial.reference.one_pass import in_one_pass
from fiducial.reference.sources import AdapterOff, Reference, SeparateModel
from fiducial.train import train
from fiducial.training.trainer import PreferenceTrainer
from run_configs import run_config
from tiny import random_groups, tiny_model
from training_harness import build_trainer


class Gradients(TrainerCallback):
    """Whole gradients, by parameter name, just before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.steps.append({name: whole(p.grad) for name, p in model.named_parameters() if p.requires_grad})


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


class MeanPerProcess(PreferenceTrainer):
    """What averaging each process's own mean would do: the negative control."""

    def _cut(self, groups):
        alone = max(len(groups), 1) * self.accelerator.num_processes
        return replace(super()._cut(groups), num_groups=alone)


@contextmanager
def counted(collective: str) -> Iterator[Counter[int]]:
    """How often FSDP2 calls `collective` for the parameters of each layer."""
    calls: Counter[int] = Counter()
    original = getattr(_fsdp_param_group, collective)

    def counting(parameters: Any, *arguments: Any, **named: Any) -> Any:
        names = [re.search(r"\.layers\.(\d+)\.", each._param_fqn) for each in parameters]
        calls.update({int(found[1]) for found in names if found})
        return original(parameters, *arguments, **named)

    setattr(_fsdp_param_group, collective, counting)
    try:
        yield calls
    finally:
        setattr(_fsdp_param_group, collective, original)


def counted_passes(model: nn.Module) -> Counter[bool]:
    """How often `model` is called from now on with gradient, and without."""
    passes: Counter[bool] = Counter()
    model.get_input_embeddings().register_forward_hook(lambda *_: passes.update([torch.is_grad_enabled()]))
    return passes


def shard(trainer: PreferenceTrainer) -> None:
    """Make accelerate shard on the CPU, where it would silently replicate."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True
    # What it is on GPUs: on the CPU accelerate has forgotten by the first step that the model is sharded.
    trainer.accelerator.no_sync = unreduced


@contextmanager
def unreduced(model: FSDPModule) -> Iterator[None]:
    """Inside, backward leaves whole gradients in every process."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def main(folder: Path, mode: str, budget: int, rows: int) -> None:
    """Train three steps as `mode` says; the result is `folder/mode.pt`."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    gradients = Gradients()
    trainer = build_trainer(
        folder / "out",
        model=policy(mode),
        groups=random_groups(rows),
        evaluation=random_groups(5, seed=7),
        budget=budget,
        layout="packed",
        callbacks=[gradients],
        method=TDPO2Config() if "tdpo" in mode else None,
        live=live_reference(mode) if {"tdpo", "trunk", "live", "step"} & set(mode.split("-")) else None,
        per_device_train_batch_size=4 // processes,
        per_device_eval_batch_size=2,
        max_steps=3,
        learning_rate=0.05,
        max_grad_norm=0,  # clipping would hide a wrong scale
        optim="sgd",
        eval_strategy="steps",
        eval_steps=3,
    )
    if mode == "mean-per-process":
        trainer.__class__ = MeanPerProcess
    if "fsdp2" in mode:
        shard(trainer)
    passes = counted_passes(trainer.model)
    with counted("foreach_all_gather") as gathers, counted("foreach_reduce") as reductions:
        trainer.train()
    result = {
        "gathers": dict(gathers),
        "reductions": dict(reductions),
        "passes": dict(passes),
        "gradients": gradients.steps,
        "logs": trainer.state.log_history,
        "fsdp2": isinstance(trainer.model_wrapped, FSDPModule),
        "ddp": isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel),
    }
    if trainer.is_world_process_zero():
        torch.save(result, folder / f"{mode}.pt")
    AcceleratorState._reset_state()  # accelerate keeps it for the whole process


def live_reference(mode: str) -> Callable[[Scorer], Reference]:
    """The adapter switched off, or a model of its own that is not sharded."""
    if "step" in mode:
        return lambda scorer: beside_layers(scorer, 1 if "upper" in mode else 0)
    if "live" in mode:
        return own_passes
    if "lora" in mode:
        return AdapterOff
    if "trunk" in mode:
        return on_lowest_layer
    return lambda scorer: SeparateModel(Scorer(tiny_model(seed=1), layout=scorer.layout))


def on_lowest_layer(scorer: Scorer) -> Reference:
    """The start again, as far as it is not the policy's own frozen layer."""
    second = Scorer(tiny_model(), layout=scorer.layout)
    return in_one_pass(SeparateModel(second), second, scorer, 1, random_groups(2), tolerance=1e-5)


def beside_layers(scorer: Scorer, depth: int) -> Reference:
    """The adapter switched off, in the policy's own calls of the layers from `depth` on."""
    off = AdapterOff(scorer)
    return in_one_pass(off, scorer, scorer, depth, random_groups(2), tolerance=1e-5, in_step=True)


def own_passes(scorer: Scorer) -> Reference:
    """The adapter switched off, asked once: a scorer's first pass also measures its head."""
    off = AdapterOff(scorer)
    off.token_logps(scorer.pack(random_groups(2)))
    return off


def run_settings(folder: Path) -> dict[str, Any]:
    """Four pairs a step, however many processes share them."""
    settings = {"rows": 13, "num_epochs": 2, "val_set_size": 2, "optimizer": "sgd", "learning_rate": 1e-2}
    pairs = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    return run_config(folder, **settings, micro_batch_size=pairs, output_dir=str(folder / "run"))


def whole_run(folder: Path) -> None:
    """`train(cfg)` as a user starts it."""
    train(run_settings(folder))
    AcceleratorState._reset_state()


def policy(mode: str) -> Any:
    model = tiny_model(tie_word_embeddings="tied" in mode)
    if "trunk" in mode:
        unfreeze(model, (r"model\.layers\.1\.",), torch.float32)
    if "lora" not in mode:
        return model
    torch.manual_seed(0)
    upper = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]} if "upper" in mode else {}
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | upper)))
    if "checkpointed" in mode:
        compat.enable_gradient_checkpointing(adapted, {"use_reentrant": False})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


if __name__ == "__main__":
    whole_run(Path(sys.argv[1]))
    for mode in sys.argv[2].split(","):
        main(Path(sys.argv[1]), mode, int(sys.argv[3]), int(sys.argv[4]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
