"""Settings of the reference that could have no effect under the plan that was chosen: refused."""

from fiducial.config.schema import RunConfig
from fiducial.errors import PlanError
from fiducial.reference.holding import policy_bits
from fiducial.reference.kinds import ReferencePlan, Schedule, Source
from fiducial.reference.precision import sees_gpu
from fiducial.reference.start import reads_distributions, streams

_HELD = ("dtype", "load_in_8bit", "load_in_4bit", "device", "offload")


def refuse_idle_holding(cfg: RunConfig, source: Source) -> None:
    """Refuse what describes a second model where there is none, or would be so without it.

    Raises:
        PlanError: A setting could have no effect.
    """
    asked = cfg.reference
    if asked.revision is not None and asked.model is None:
        raise PlanError(
            f"reference.revision: {asked.revision} cannot have an effect without reference.model. "
            f"Write reference.model: {cfg.model.base_model} beside it, or remove it."
        )
    given = {key: value for key in _HELD if (value := getattr(asked, key)) not in (None, False)}
    if source is not Source.SEPARATE_MODEL:
        for key, value in given.items():
            raise PlanError(
                f"reference.{key}: {value} cannot have an effect: the reference is {source}, which shares "
                "the policy's weights. Remove it, or write reference.source: separate_model."
            )
    bits = policy_bits(cfg)
    if bits is not None and f"load_in_{bits}bit" in given:
        raise PlanError(
            f"reference.load_in_{bits}bit: True cannot have an effect: a second model is held in {bits} bits "
            "anyway, as the policy is. Remove it."
        )
    if bits is not None and "offload" in given:
        raise PlanError(
            f"reference.offload: {asked.offload} cannot have an effect on weights in {bits} bits, as the "
            "policy's are: they stay where they were loaded to. Remove it."
        )
    drawn = cfg.model.reinit_weights and asked.model is None
    for key in ("load_in_8bit", "load_in_4bit", "offload"):
        if key in given and drawn:
            raise PlanError(
                f"reference.{key}: {given[key]} cannot have an effect with reinit_weights: weights that are "
                "drawn are held in full. Remove it."
            )
    if asked.offload == "cpu" and not sees_gpu():
        raise PlanError(
            "reference.offload: cpu cannot have an effect: this machine has no GPU, so the layers compute "
            "where they are kept. Remove it, or write reference.offload: disk."
        )


def refuse_idle_cache(cfg: RunConfig, plan: ReferencePlan) -> None:
    """Refuse settings of the cache where nothing is kept.

    Raises:
        PlanError: A setting could have no effect.
    """
    if plan.kept:
        return
    for key, value in {"cache": cfg.reference.cache, "flush_seconds": cfg.reference.flush_seconds}.items():
        if value is not None:
            why, instead = _why_nothing_is_cached(cfg, plan)
            remedy = f"Remove it, or write {instead}." if instead else "Remove it."
            raise PlanError(f"reference.{key}: {value} cannot have an effect: {why}. {remedy}")


def _why_nothing_is_cached(cfg: RunConfig, plan: ReferencePlan) -> tuple[str, str | None]:
    """Why no record of the plan's reference is in a cache, and what to write so that there are some."""
    if reads_distributions(cfg):
        return "the loss reads the reference's probability of every token, which is too much to keep", None
    instead = "reference.schedule: auto" if streams(cfg) else "reference.schedule: precomputed"
    if plan.schedule is Schedule.SYNCED:
        return (
            "the reference moves with the policy, so what it answers is of use to this run alone. It is kept "
            "in output_dir until the next move",
            f"{instead} for a reference that stands still",
        )
    return "the reference is live, scored beside the policy at every step and never read again", instead
