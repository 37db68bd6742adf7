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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: look for modules in the repository, not beside this file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from bench.arena import CONSOLE, HERE, report, write
from bench.one_pass_processes import DEVICE, offloaded, sharded
from bench.results import CONDITIONS
from bench.shapes import config
from bench.timed_step import (
    LONGEST,
    TARGETS,
    build_policy,
    in_turn,
    measured_row,
    pairs_of,
    training_step,
)
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.loader import unfreeze
from fiducial.model.quantisation import placement, prepare
from fiducial.model.scoring import Scorer
from fiducial.reference.holding import Bits
from fiducial.reference.one_pass import in_one_pass
from fiducial.reference.sources import AdapterOff, LiveReference, SeparateModel


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
    groups = pairs_of(tokens)
    layers = config(options.shape, longest=LONGEST).num_hidden_layers
    for name, depth in (
        ("full, lower half frozen", layers // 2),
        ("full, lower 3/4 frozen", layers * 3 // 4),
    ):
        policy = build_policy(options, device)
        patterns = tuple(rf"model\.layers\.{layer}\." for layer in range(depth, layers))
        second = Scorer(copy.deepcopy(policy.model).requires_grad_(False).eval(), layout="packed")
        unfreeze(policy.model, patterns, torch.float32)
        policy.model.train()
        yield _compared(options, name, policy, SeparateModel(second), second, depth, groups)
    policy = build_policy(options, device)
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
    ways = partial(training_step, policy, live, groups), partial(training_step, policy, joint, groups)
    ratios = [(two[0] / one[0], two[1] / one[1]) for two, one in in_turn(options.repeats, *ways)]
    return measured_row(name, policy, groups, ratios)


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
        groups = pairs_of(tokens)
        ways = partial(training_step, policy, off, groups), partial(_dequantise, model, autocast)
        timed = in_turn(options.repeats, *ways)
        saved = [(step[0] / (step[0] - once[0]), step[1] / (step[1] - once[1])) for step, once in timed]
        products = "float32" if autocast is None else "bfloat16"
        yield measured_row(f"LoRA, {bits}-bit, products in {products}", policy, groups, saved)


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
    "sharded": Part(sharded, "where sharded layers are gathered once for both"),
    "offloaded": Part(offloaded, "where offloaded layers are copied once for both"),
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
