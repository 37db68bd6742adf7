"""Every plan that would be right for a run, side by side: what each holds in memory and costs in time.

Time is told as a multiple of training without any reference, which no machine has to be measured for: with N
weights a forward pass is 2N operations a token, a backward pass 4N, or 2N below an adapter, whose frozen
weights need no gradient of their own, and none below the lowest layer that trains. A live reference adds its
forward pass to every epoch, as far as the policy's own has not been there, a precomputed one to the first
alone, and nothing where its log-probs are cached already.
"""

from dataclasses import dataclass

from fiducial.config.schema import RunConfig
from fiducial.reference.facts import Facts
from fiducial.reference.kinds import ReferencePlan, Schedule, Source
from fiducial.reference.memory import estimate_memory
from fiducial.reference.plan import possible_plans
from fiducial.reference.shared import share_above
from fiducial.reference.trained import count_trained, untrained_layers

FORWARD, BACKWARD_INPUTS, BACKWARD_WEIGHTS = 2.0, 2.0, 2.0
"""Operations a weight and token."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """What one plan would cost."""

    source: Source
    schedule: Schedule
    peak_bytes: int
    relative_time: float
    """Of the whole run, as a multiple of training without a reference."""
    chosen: bool


def alternatives(
    cfg: RunConfig, facts: Facts, plan: ReferencePlan, token_budget: int, *, longest: int | None = None
) -> tuple[Alternative, ...]:
    """Every right plan for the run, `plan` among them; none where there is no reference.

    `longest` as in `estimate_memory`.
    """
    if plan.schedule is None:
        return ()
    chosen = (plan.source, plan.schedule)
    found = [each for each in possible_plans(cfg, facts) if (each.source, each.schedule) != chosen]
    return tuple(
        Alternative(
            each.source,
            each.schedule,
            estimate_memory(cfg, facts, each, token_budget, longest=longest).peak,
            relative_time(cfg, facts, each),
            each is plan,
        )
        for each in (plan, *found)
        if each.schedule is not None
    )


def relative_time(cfg: RunConfig, facts: Facts, plan: ReferencePlan) -> float:
    """The run's time under `plan`, as a multiple of the time without any reference."""
    if plan.schedule is None or plan.source is Source.ENDPOINT:
        return 1.0
    training = FORWARD + backward(cfg, facts)
    weights = weight_ratio(facts, plan)
    epochs = cfg.optimization.num_epochs if plan.schedule is Schedule.PRECOMPUTED else 1.0
    return 1 + FORWARD * weights / training / max(epochs, 1.0)


def backward(cfg: RunConfig, facts: Facts) -> float:
    """Operations of the backward pass a weight of the model and token.

    Two for the gradient of what each weight reads, above the lowest layer in which something is trained, and
    two for the gradient of each trained weight itself, an adapter's few aside.
    """
    above = share_above(facts, untrained_layers(cfg, facts))
    trained = count_trained(cfg, facts).base / facts.model.num_parameters
    return BACKWARD_INPUTS * above + BACKWARD_WEIGHTS * trained


def weight_ratio(facts: Facts, plan: ReferencePlan) -> float:
    """Weights that scoring the reference meets, for each of the policy's."""
    if plan.shared_layers:
        return share_above(facts, plan.shared_layers)
    reference = facts.reference if plan.source is Source.SEPARATE_MODEL else None
    return (reference or facts.model).num_parameters / facts.model.num_parameters
