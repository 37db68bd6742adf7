"""What it saves to score a live reference in one pass with the policy, against two passes.

    python bench/one_pass.py                  # about 7 minutes; writes bench/results/one_pass.json
    python bench/one_pass.py --parts offloaded quantised    # on a GPU: into one_pass_cuda.json
    python bench/one_pass.py --quick          # shows that it runs, no more

Shared layers: a pass over policy and reference with its backward, in turn with one in which the reference
goes on from the policy's lowest layers. Medians of the ratio, in seconds and in processor time.

Sharded weights: the same with LoRA on all layers, by FSDP2 in two processes of one thread each, where each
layer is gathered once for policy and reference, against twice. Each process has passes of as many tokens.

Offloaded weights: the same in one process on a GPU, for which FSDP2 keeps the weights in the CPU's memory and
copies each layer over once for policy and reference, against twice. Without a GPU nothing is copied far, and
only `--quick` runs it.

Weights in 8 and 4 bits: what bringing each weight back once for both could save at most, were it done: the
time in which all of them are dequantised once.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":  # run as a file: look for modules in the repository, not beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from bench.arena import CONSOLE, HERE, report, write
from bench.measure import synchronize
from bench.results import CONDITIONS
from bench.shapes import config
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.loader import unfreeze
from fiducial.model.quantisation import placement, prepare
from fiducial.model.scoring import Scorer
from fiducial.model.trunk import decoder_layers
from fiducial.reference.holding import Bits
from fiducial.reference.one_pass import OnePass, beside_policy, in_one_pass
from fiducial.reference.sources import AdapterOff, LiveReference, Reference, SeparateModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 4096
PROCESSES = 2
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Seconds = tuple[float, float]
"""On the wall, and of the processor; or ratios of them."""


def main(arguments: list[str]) -> int:
    """Measure, print, write."""
    options = _options(arguments)
    command = ["python", "bench/one_pass.py", *arguments]
    found = _measured_here(options.output, report(command, options.shape))
    for name in options.parts:
        part = PARTS[name]
        found[name] = [*part.measured(options)]
        CONSOLE.print(_table(f"two passes over one, {part.where}", found[name]))
        write(options.output, report(command, options.shape, **found))
    return 0


def _measured_here(path: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The parts that the file holds, if they were measured on the same machine with the same versions."""
    earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = all(earlier.get(name) == now[name] for name in CONDITIONS)
    return {name: earlier[name] for name in PARTS if same and name in earlier}


def _shared_layers(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for tokens in options.tokens:
        yield from _shared_lowest(options, torch.device(DEVICE), tokens)


def _shared_lowest(
    options: argparse.Namespace, device: torch.device, tokens: int
) -> Iterator[dict[str, Any]]:
    groups = _groups(tokens)
    layers = config(options.shape, longest=LONGEST).num_hidden_layers
    for name, depth in (
        ("full, lower half frozen", layers // 2),
        ("full, lower 3/4 frozen", layers * 3 // 4),
    ):
        policy = _policy(options, device)
        patterns = tuple(rf"model\.layers\.{layer}\." for layer in range(depth, layers))
        second = Scorer(copy.deepcopy(policy.model).requires_grad_(False).eval(), layout="packed")
        unfreeze(policy.model, patterns, torch.float32)
        policy.model.train()
        yield _compared(options, name, policy, SeparateModel(second), second, depth, groups)
    policy = _policy(options, device)
    upper = LoraConfig(r=16, target_modules=TARGETS, layers_to_transform=[*range(layers // 2, layers)])
    policy = Scorer(get_peft_model(policy.model, upper).train(), layout="packed")
    off = AdapterOff(policy)
    yield _compared(options, "LoRA on the upper half", policy, off, policy, layers // 2, groups)


def _compared(
    options: argparse.Namespace,
    name: str,
    policy: Scorer,
    live: LiveReference,
    scorer: Scorer,
    depth: int,
    groups: list[TokenizedGroup],
) -> dict[str, Any]:
    joint = in_one_pass(live, scorer, policy, depth, groups, tolerance=1e-3)
    ways = partial(_step, policy, live, groups), partial(_step, policy, joint, groups)
    ratios = [(two[0] / one[0], two[1] / one[1]) for two, one in _in_turn(options.repeats, *ways)]
    return _row(name, policy, groups, ratios)


def _sharded(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens; of the larger shape, whose passes take many seconds, for the least."""
    held = Held("cpu", PROCESSES, OffloadPolicy())
    yield from _in_processes(options, held)
    if options.larger is not None:
        larger = argparse.Namespace(shape=options.larger, tokens=[min(options.tokens)], repeats=3)
        yield from _in_processes(larger, held)


def _offloaded(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
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
        multiprocessing.spawn(_sharded_process, arguments, held.processes)  # type: ignore[no-untyped-call]  # torch types no spawn
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def _sharded_process(rank: int, options: argparse.Namespace, held: Held, folder: Path) -> None:
    torch.set_num_threads(1)
    CONSOLE.quiet = rank > 0
    meeting = f"file://{folder}/meeting"
    dist.init_process_group(held.backend, meeting, rank=rank, world_size=held.processes)
    policy, off, joint = in_both_ways(_policy(options, torch.device(held.device)).model, held)
    rows = []
    for tokens in options.tokens:
        groups = _groups(tokens)
        ways = (partial(_together, partial(_step, policy, each, groups)) for each in (off, joint))
        ratios = [(two[0] / one[0], two[1] / one[1]) for two, one in _in_turn(options.repeats, *ways)]
        rows.append(_row(f"LoRA on all layers, {options.shape}", policy, groups, ratios))
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def in_both_ways(model: PreTrainedModel, held: Held) -> tuple[Scorer, AdapterOff, OnePass]:
    """The model under an adapter and sharded, its reference in passes of its own, and in the policy's."""
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules=TARGETS)).train()
    policy = Scorer(adapted, layout="packed")
    off = AdapterOff(policy)
    joint = in_one_pass(off, policy, policy, 0, _groups(192), tolerance=1e-3, in_step=True)
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


def _quantised(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    held: tuple[Bits, Bits] = (8, 4)
    with tempfile.TemporaryDirectory() as folder:
        with torch.device(DEVICE):
            LlamaForCausalLM(config(options.shape, longest=LONGEST)).save_pretrained(folder)
        for bits in held:
            for autocast in (None, torch.bfloat16):
                yield from _held_in(bits, folder, options, autocast)


def _held_in(
    bits: Bits, checkpoint: str, options: argparse.Namespace, autocast: torch.dtype | None
) -> Iterator[dict[str, Any]]:
    shape = config(options.shape, longest=LONGEST)
    placed = placement(bits, shape, torch.float32, {}, on_cpu=False)
    base = prepare(AutoModelForCausalLM.from_pretrained(checkpoint, **placed))
    model = get_peft_model(base, LoraConfig(r=16, target_modules=TARGETS)).train()
    policy = Scorer(model, layout="packed", autocast=autocast)
    off = AdapterOff(policy)
    for tokens in options.tokens:
        groups = _groups(tokens)
        ways = partial(_step, policy, off, groups), partial(_dequantise, model, autocast)
        timed = _in_turn(options.repeats, *ways)
        saved = [(step[0] / (step[0] - once[0]), step[1] / (step[1] - once[1])) for step, once in timed]
        products = "float32" if autocast is None else "bfloat16"
        yield _row(f"LoRA, {bits}-bit, products in {products}", policy, groups, saved)


def _dequantise(model: nn.Module, autocast: torch.dtype | None) -> None:
    """Every quantised weight once, as bitsandbytes does it for its layer's product."""
    from bitsandbytes.functional import dequantize_4bit  # here: an extra

    part: Any
    for part in model.modules():
        quantised = getattr(getattr(part, "weight", None), "quant_state", None)
        if quantised is not None:
            weight = dequantize_4bit(part.weight.data, quantised)
        elif getattr(getattr(part, "state", None), "CB", None) is not None:
            weight = part.state.CB.float().mul_(part.state.SCB.unsqueeze(1).mul(1 / 127))
        else:
            continue
        if autocast is not None:
            weight.to(autocast)


def _policy(options: argparse.Namespace, device: torch.device) -> Scorer:
    torch.manual_seed(0)
    return Scorer(LlamaForCausalLM(config(options.shape, longest=LONGEST)).to(device), layout="packed")


def _groups(tokens: int) -> list[TokenizedGroup]:
    """Pairs of 64 tokens for the prompt and each answer, `tokens` in all."""
    rng = np.random.default_rng(0)

    def ids() -> Any:
        return rng.integers(0, 256, 64, dtype=np.int32)

    return [TokenizedGroup(ids(), (ids(), ids())) for _ in range(max(tokens // 192, 1))]


def _step(policy: Scorer, reference: Reference, groups: list[TokenizedGroup]) -> None:
    """Forward and backward of one training pass."""
    batch = policy.pack(groups).to(policy.device)
    with beside_policy(reference, batch) as answer:
        values = policy(batch).values
    compared = answer()
    assert compared is not None, "the reference is live"
    (values - compared.values).square().sum().backward()


def _row(name: str, policy: Scorer, groups: list[TokenizedGroup], ratios: list[Seconds]) -> dict[str, Any]:
    wall, processor = map(median, zip(*ratios, strict=True))
    tokens = policy.pack(groups).input_ids.numel()
    CONSOLE.print(f"{name}, {tokens} tokens: {wall:.2f}x, processor {processor:.2f}x")
    return {"case": name, "tokens": tokens, "wall": wall, "processor": processor}


def _in_turn(repeats: int, *ways: Callable[[], None]) -> list[list[Seconds]]:
    """Each way once to warm up, then all of them one after the other, again and again."""
    for way in ways:
        way()
    return [[_timed(way) for way in ways] for _ in range(repeats)]


def _timed(run: Callable[[], None]) -> Seconds:
    synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    run()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    grid = Table(title=title)
    for heading in ("", "tokens a pass", "wall", "processor"):
        grid.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        grid.add_row(row["case"], str(row["tokens"]), f"{row['wall']:.2f}×", f"{row['processor']:.2f}×")
    return grid


@dataclass(frozen=True)
class Part:
    """What is measured, and in words where the one pass gains."""

    measured: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]
    where: str


PARTS = {
    "shared_layers": Part(_shared_layers, "where the lowest layers are shared"),
    "sharded": Part(_sharded, "where sharded layers are gathered once for both"),
    "offloaded": Part(_offloaded, "where offloaded layers are copied once for both"),
    "quantised": Part(_quantised, "at most, where each weight were brought back once"),
}


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = DEVICE == "cuda"
    parser.add_argument("--shape", default="1B" if cuda else "42M")
    parser.add_argument("--tokens", type=int, nargs="+", default=[192, 768, 3072] if cuda else [192, 768])
    parser.add_argument("--repeats", type=int, default=5)
    larger = None if cuda else "1B"
    parser.add_argument("--larger", default=larger, help="a second shape for the sharded weights")
    usual = [name for name in PARTS if name != "offloaded" or cuda]
    parser.add_argument(
        "--parts", nargs="+", choices=list(PARTS), default=usual, help="the output keeps the others"
    )
    parser.add_argument("--output", type=Path, help="bench/results/one_pass.json unless --quick or on a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model, into bench/.cache")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shape, options.tokens, options.repeats, options.larger = "tiny", [192], 1, None
        options.parts = list(PARTS) if options.parts == usual else options.parts
    folder = HERE / (".cache" if options.quick else "results")
    options.output = options.output or folder / f"one_pass{'_cuda' * cuda}.json"
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
