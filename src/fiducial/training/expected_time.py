"""How long a run will take: its matrix products over the speed of this machine at just those.

Attention's own products, norms and the optimizer are left out, and so is what a step spends waiting: the
figure is a lower bound, which measured time exceeds by a fifth to a half (docs/performance.md).
"""

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from fiducial.config.schema import RunConfig
from fiducial.model.products import product
from fiducial.reference.alternatives import FORWARD, backward, weight_ratio
from fiducial.reference.facts import Facts, ModelFacts
from fiducial.reference.kinds import ReferencePlan, Schedule

_MEASURED_TOKENS = 512
_MEASURED_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Amount:
    """How much data a pass over some groups computes."""

    tokens: int
    """With each prompt once."""
    scored: int
    """Completion tokens, which alone go through the head."""

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens + other.tokens, self.scored + other.scored)


@dataclass(frozen=True, slots=True)
class ExpectedSeconds:
    """Of a whole run, where no record of the reference is cached."""

    scoring: float
    training: float

    def sentence(self, speed: float, plan: ReferencePlan) -> str:
        """What was reckoned, for people; `speed` in operations a second of one process."""
        training = f"At {speed / 1e9:,.0f} GFLOP/s, training takes at least {_duration(self.training)}"
        if plan.schedule is None:
            return f"{training}."
        cached = " where nothing of it is cached" if plan.kept else ""
        return f"{training}, and scoring the reference {_duration(self.scoring)}{cached}."


def expected_seconds(
    cfg: RunConfig,
    facts: Facts,
    plan: ReferencePlan,
    *,
    train: Amount,
    held_out: Amount,
    epochs: float,
    speed: float,
) -> ExpectedSeconds | None:
    """Seconds of scoring the reference and of training; evaluation is not in it.

    None for a mixture of experts, whose products are not those of its widths.

    Args:
        cfg: The run.
        facts: What is known of its checkpoints.
        plan: The reference it was decided to use.
        train: What one epoch computes.
        held_out: What is evaluated, and scored once where the reference is precomputed.
        epochs: Passes over the training data.
        speed: Operations a second, of all processes together.
    """
    if facts.model.sizes.experts > 1:
        return None
    forward = forward_operations(facts.model, train)
    training = epochs * forward * (FORWARD + backward(cfg, facts)) / FORWARD
    scoring = 0.0
    if plan.schedule is Schedule.PRECOMPUTED:
        scoring = weight_ratio(facts, plan) * forward_operations(facts.model, train + held_out)
    elif plan.schedule is not None:
        scoring = weight_ratio(facts, plan) * epochs * forward
    return ExpectedSeconds(scoring / speed, training / speed)


def forward_operations(model: ModelFacts, amount: Amount) -> float:
    """Two a weight: of the body for every token, of the head for every scored one."""
    head = model.sizes.vocab_size * model.sizes.hidden
    body = model.num_parameters - head * (1 if model.tied_embeddings else 2)
    return FORWARD * (body * amount.tokens + head * amount.scored)


def products_a_second(model: ModelFacts, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the model's largest layer product, measured for a moment."""
    sizes = model.sizes
    left = torch.randn(_MEASURED_TOKENS, sizes.hidden).to(device, dtype)
    right = torch.randn(sizes.hidden, sizes.intermediate).to(device, dtype)
    timer = Timer(
        "product(left, right)",
        globals={"product": product, "left": left, "right": right},
        num_threads=torch.get_num_threads(),
    )
    seconds = timer.blocked_autorange(min_run_time=_MEASURED_SECONDS).median
    return 2.0 * _MEASURED_TOKENS * sizes.hidden * sizes.intermediate / seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
