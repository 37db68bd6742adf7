"""One training pass of policy and reference, timed in turn with another way to make it."""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from bench.arena import CONSOLE
from bench.measure import synchronize
from bench.shapes import config
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.scoring import Scorer
from fiducial.reference.one_pass import beside_policy
from fiducial.reference.sources import Reference

LONGEST = 4096
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Seconds = tuple[float, float]
"""On the wall, and of the processor; or ratios of them."""


def build_policy(options: argparse.Namespace, device: torch.device) -> Scorer:
    """A policy of the shape that is asked for, with weights drawn from one seed."""
    torch.manual_seed(0)
    return Scorer(LlamaForCausalLM(config(options.shape, longest=LONGEST)).to(device), layout="packed")


def pairs_of(tokens: int) -> list[TokenizedGroup]:
    """Pairs of 64 tokens for the prompt and each answer, `tokens` in all."""
    rng = np.random.default_rng(0)

    def ids() -> Any:
        return rng.integers(0, 256, 64, dtype=np.int32)

    return [TokenizedGroup(ids(), (ids(), ids())) for _ in range(max(tokens // 192, 1))]


def training_step(policy: Scorer, reference: Reference, groups: list[TokenizedGroup]) -> None:
    """Forward and backward of one training pass."""
    batch = policy.pack(groups).to(policy.device)
    with beside_policy(reference, batch) as answer:
        values = policy(batch).values
    compared = answer()
    assert compared is not None, "the reference is live"
    (values - compared.values).square().sum().backward()


def measured_row(
    name: str, policy: Scorer, groups: list[TokenizedGroup], ratios: list[Seconds]
) -> dict[str, Any]:
    """The medians of `ratios`, told and as the results file holds them."""
    wall, processor = map(median, zip(*ratios, strict=True))
    tokens = policy.pack(groups).input_ids.numel()
    CONSOLE.print(f"{name}, {tokens} tokens: {wall:.2f}x, processor {processor:.2f}x")
    return {"case": name, "tokens": tokens, "wall": wall, "processor": processor}


def in_turn(repeats: int, *ways: Callable[[], None]) -> list[list[Seconds]]:
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
