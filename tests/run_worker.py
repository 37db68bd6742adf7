"""Processes of whole runs, started by torchrun: `train(cfg)` for each of the runs in a JSON file, in turn.

A run is {"settings": keys of the YAML, "stop_after": a step or null}. A run with `fsdp_version` is really
sharded, on the CPU, where accelerate would silently replicate it; each step makes sure.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from transformers import TrainerCallback

from fiducial import assembly
from fiducial.train import train
from fiducial.training import arguments
from fiducial.training.interruption import Interrupted
from fiducial.training.trainer import PreferenceTrainer


class Interrupt(TrainerCallback):
    """Ctrl-C in one process only, as a machine that is taken away sends it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step - 1 and state.is_world_process_zero:
            os.kill(os.getpid(), signal.SIGINT)


class ShardedTrainer(PreferenceTrainer):
    """Shards where the run asks for it."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                # Memory is pinned for a GPU to copy from.
                state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            # Both, as accelerate does on a GPU: each new AcceleratorState takes it from PartialState.
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def training_step(self, model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        assert isinstance(model, FSDPModule) == bool(self.args.fsdp), "it is replicated instead"
        return super().training_step(model, *arguments, **options)


def run(settings: dict[str, Any], stop_after: int | None) -> None:
    assembly.setting_callbacks = lambda cfg: [] if stop_after is None else [Interrupt(stop_after)]
    try:
        train(settings)
        assert stop_after is None
    except Interrupted:
        assert stop_after is not None
    AcceleratorState._reset_state()  # accelerate keeps it for the whole process


if __name__ == "__main__":
    assembly.PreferenceTrainer = ShardedTrainer
    arguments._check_launch = lambda cfg: None  # it refuses to shard without a GPU
    for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(each["settings"], each["stop_after"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
