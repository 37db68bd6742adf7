"""Two passes against one where processes hold the weights: sharded between them, or offloaded by one."""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from bench.arena import CONSOLE
from bench.timed_step import TARGETS, build_policy, in_turn, measured_row, pairs_of, training_step
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import decoder_layers
from fiducial.reference.one_pass import OnePass, in_one_pass
from fiducial.reference.sources import AdapterOff

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROCESSES = 2


def sharded(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens; of the larger shape, whose passes take many seconds, for the least."""
    held = Held("cpu", PROCESSES, OffloadPolicy())
    yield from _in_processes(options, held)
    if options.larger is not None:
        larger = argparse.Namespace(shape=options.larger, tokens=[min(options.tokens)], repeats=3)
        yield from _in_processes(larger, held)


def offloaded(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens."""
    yield from _in_processes(options, Held(DEVICE, 1, CPUOffloadPolicy(pin_memory=DEVICE == "cuda")))


@dataclass(frozen=True)
class Held:
    """Where FSDP2 keeps the weights, and where it brings them together."""

    device: str
    processes: int
    offload: OffloadPolicy

    @property
    def backend(self) -> str:
        """What moves them between processes."""
        return "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo"


def _in_processes(options: argparse.Namespace, held: Held) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (options, held, Path(folder))
        multiprocessing.spawn(_process, arguments, held.processes)  # type: ignore[no-untyped-call]  # torch types no spawn
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _process(rank: int, options: argparse.Namespace, held: Held, folder: Path) -> None:
    torch.set_num_threads(1)
    CONSOLE.quiet = rank > 0
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(held.backend, meeting, rank=rank, world_size=held.processes)
    policy, off, joint = in_both_ways(build_policy(options, torch.device(held.device)).model, held)
    rows = []
    for tokens in options.tokens:
        groups = pairs_of(tokens)
        ways = (partial(_together, partial(training_step, policy, each, groups)) for each in (off, joint))
        ratios = [(two[0] / one[0], two[1] / one[1]) for two, one in in_turn(options.repeats, *ways)]
        rows.append(measured_row(f"LoRA on all layers, {options.shape}", policy, groups, ratios))
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def in_both_ways(model: PreTrainedModel, held: Held) -> tuple[Scorer, AdapterOff, OnePass]:
    """The model under an adapter and sharded, its reference in passes of its own, and in the policy's."""
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS)).train()
    policy = Scorer(adapted, layout="packed")
    off = AdapterOff(policy)
    joint = in_one_pass(off, policy, policy, 0, pairs_of(192), tolerance=1e-3, in_step=True)
    _shard(policy, held)
    return policy, off, joint


def _shard(policy: Scorer, held: Held) -> None:
    """As accelerate does it: each layer is gathered by itself, and what is needed at both ends stays."""
    model: Any = policy.model.get_base_model()
    mesh = init_device_mesh(held.device, (held.processes,))  # by default on a GPU, wherever the model is
    where: dict[str, Any] = {"mesh": mesh, "offload_policy": held.offload}
    for layer in decoder_layers(policy.model):
        fully_shard(layer, **where)
    ends = [model.model.norm, model.model.embed_tokens, model.lm_head]
    fully_shard(ends, reshard_after_forward=False, **where)
    fully_shard(policy.model, **where)


def _together(way: Callable[[], None]) -> None:
    dist.barrier()
    way()
    dist.barrier()
