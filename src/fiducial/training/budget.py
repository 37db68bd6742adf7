"""How many tokens one forward pass may hold, from the memory there is."""

import os

import psutil
import torch

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.kinds import ReferencePlan
from fiducial.reference.memory import auto_token_budget, estimate_memory


def choose_token_budget(
    cfg: RunConfig, facts: Facts, plan: ReferencePlan, device: torch.device, *, resumed: int | None = None
) -> int:
    """The run's `micro_batch_tokens`; for `auto` what memory allows before the model is loaded.

    A resumed run keeps the budget it had `resumed` with: dropout draws its masks pass by pass.
    """
    chosen = cfg.optimization.micro_batch_tokens
    if chosen != "auto":
        return chosen
    if resumed is not None:
        return resumed
    gpu = device.type == "cuda"
    held = estimate_memory(cfg, facts, plan, 0, gpu=gpu).at("training")
    return auto_token_budget(max(free_memory(device) - held, 0), facts, cfg, gpu=gpu)


def free_memory(device: torch.device) -> int:
    """Bytes this process may still take: the GPU's own, or its share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
