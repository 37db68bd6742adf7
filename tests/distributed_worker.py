"""One process of a distributed run, started by torchrun from test_distributed.py.

Writes, from rank 0, the gradients of each optimizer step, what was logged, and how the model was wrapped.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from fiducial.config.methods import TDPO2Config
from fiducial.model.loader import unfreeze
from fiducial.model.scoring import Scorer
from fiducial.reference.one_pass import on_trunk
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


def shard(trainer: PreferenceTrainer) -> None:
    """Make accelerate shard on the CPU, where it would silently replicate."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = trainer.accelerator.state
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    trainer.is_fsdp_enabled = True


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
        live=live_reference(mode) if "tdpo" in mode or "trunk" in mode else None,
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
    trainer.train()
    result = {
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
    if "lora" in mode:
        return AdapterOff
    if "trunk" in mode:
        return on_lowest_layer
    return lambda scorer: SeparateModel(Scorer(tiny_model(seed=1), layout=scorer.layout))


def on_lowest_layer(scorer: Scorer) -> Reference:
    """The start again, as far as it is not the policy's own frozen layer."""
    second = Scorer(tiny_model(), layout=scorer.layout)
    return on_trunk(SeparateModel(second), second, scorer, 1, random_groups(2), tolerance=1e-5)


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
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
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
