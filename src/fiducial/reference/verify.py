"""Is the reference really the reference? Measured on real groups: before step 1, after each move, at the end.

What may differ is what the hardware rounds (`noise.py`). Anything larger means another reference.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fiducial.agreement import all_or_none
from fiducial.data.batch import PackedBatch
from fiducial.errors import ModelError, PlanError, TrainingError
from fiducial.model.adapters import POLICY_ADAPTER, base_name
from fiducial.model.mode import evaluating, training_without_dropout
from fiducial.model.randomness import Replay, draws_numbers
from fiducial.model.redirection import causal_lm
from fiducial.model.scoring import Scorer
from fiducial.reference.log_ratio import LogRatios, spread
from fiducial.reference.noise import Groups, NoiseFloor, logps_of, measure_noise, same_arithmetic
from fiducial.reference.sources import AdapterOff, Precomputed, Reference, SeparateModel


@dataclass(frozen=True, slots=True, eq=False)
class Proof:
    """How far policy and reference are apart, in nats a token."""

    max_difference: float
    mean_difference: float
    log_ratios: LogRatios
    noise: NoiseFloor
    tolerance: float
    """What can be rounding."""
    num_tokens: int
    num_sequences: int
    reference_logps: Float[Tensor, " scored"]
    """What the reference answered, to see later whether it has moved."""

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "max_difference": self.max_difference,
            "mean_difference": self.mean_difference,
            "log_ratio": asdict(self.log_ratios),
            "noise_floor": self.noise.nats,
            "dtype": str(self.noise.dtype).removeprefix("torch."),
            "tolerance": self.tolerance,
            "num_tokens": self.num_tokens,
            "num_sequences": self.num_sequences,
        }

    def sentence(self, when: str = "Before step 1") -> str:
        """What was measured, for people."""
        return (
            f"{when} policy and reference differed by at most {self.max_difference:.2g} nats a token on "
            f"{self.num_tokens} tokens (up to {self.tolerance:.1g} is rounding)."
        )


@dataclass(frozen=True, slots=True)
class AdapterProbe:
    """Whether switching the adapter off gives the starting policy, now and after training."""

    on_off_difference: float
    """Between the policy with its adapter on and off."""
    off_movement: float
    """Of the policy with its adapter off, when every trained parameter is perturbed."""
    trained_outside: tuple[str, ...]
    """Trained parameters that stay on when the adapter is off."""
    tolerance: float

    @property
    def on_equals_off(self) -> bool:
        """The adapter starts as the identity."""
        return self.on_off_difference <= self.tolerance

    @property
    def off_unmoved(self) -> bool:
        """Training cannot reach what is left when the adapter is off."""
        return not self.trained_outside and self.off_movement <= self.tolerance


def prove_reference(
    policy: Scorer,
    reference: Reference,
    groups: Groups,
    *,
    expected_equal: bool,
    when: str = "before the first step",
    pass_tokens: int = 0,
    known_noise: float = 0.0,
) -> Proof:
    """Measure the difference between policy and reference on `groups`.

    Args:
        policy: Scores the policy.
        reference: What is compared with it.
        groups: Real groups.
        expected_equal: Whether the reference is the policy of this moment: before the first step its start.
        when: The moment, for errors.
        pass_tokens: Tokens of a full pass, whose noise is measured too.
        known_noise: Rounding that was seen elsewhere: in records scored again, or in an earlier proof.

    Raises:
        TrainingError: They differ by more than noise though they should be equal, or one is not finite.
    """
    batch = policy.pack(groups)
    policy_logps, noise = measure_noise(policy, groups, batch, pass_tokens=pass_tokens)
    noise = NoiseFloor(max(noise.nats, known_noise), noise.dtype)
    reference_logps = logps_of(reference, batch)
    difference = (policy_logps - reference_logps).abs()
    for name, logps in {"policy": policy_logps, "reference": reference_logps}.items():
        if not logps.isfinite().all():
            raise TrainingError(f"the {name}'s log-probs are not finite {when}; check its weights.")
    proof = Proof(
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        log_ratios=spread(policy_logps, reference_logps, batch.sequence.cpu()),
        noise=noise,
        tolerance=noise.tolerance(same_arithmetic=same_arithmetic(policy, reference)),
        num_tokens=len(difference),
        num_sequences=batch.num_sequences,
        reference_logps=reference_logps,
    )
    if expected_equal and proof.max_difference > proof.tolerance:
        raise TrainingError(
            f"{when} the reference is not the policy it should equal: log-probs differ by up to "
            f"{proof.max_difference:.3g} nats a token, where {proof.tolerance:.1g} can be rounding. "
            f"{_likely_reason(policy, reference, batch)}"
        )
    return proof


def require_steady(policy: Scorer, groups: Groups) -> None:
    """Make sure that nothing of training passes is random, but for the adapter's own dropout.

    What is proved, and every reference, is in eval mode.

    Raises:
        ModelError: the model samples, or adds noise, in training.
    """
    first = policy.pack(groups[:1])
    with torch.no_grad(), training_without_dropout(policy.model):
        if not draws_numbers(lambda: policy(first), policy.device):
            return
    batch = policy.pack(groups)  # experts are sampled where two are nearly equal: few tokens may have none
    answers: list[Tensor] = []
    with torch.no_grad():
        with training_without_dropout(policy.model), Replay.from_here(policy.device).again():
            answers.append(policy(batch).values)
        with evaluating(policy.model):
            answers.append(policy(batch).values)
    # Some kernels take numbers that they have no use for.
    if not torch.equal(*answers):
        raise ModelError(
            f"base_model: {type(causal_lm(policy.model)).__name__} draws random numbers in training (experts "
            "that are sampled, or noise), and its reference does not: each pass would be another policy's. "
            "Take a base_model that does not."
        )


def check_unmoved(proof: Proof, policy: Scorer, reference: Reference, groups: Groups) -> float:
    """How far the reference has moved on the proof's `groups`, in nats a token. A collective call.

    Raises:
        TrainingError: It has moved: what was trained was not compared with the starting policy.
    """
    moved = (logps_of(reference, policy.pack(groups)) - proof.reference_logps).abs().max().item()
    with all_or_none():
        if not moved <= proof.tolerance:
            raise TrainingError(
                f"the reference has moved while training, by up to {moved:.3g} nats a token. Something "
                "trained its weights; the result was not compared with the starting policy. Use "
                "`reference: {schedule: precomputed}`."
            )
    return moved


def probe_adapter(scorer: Scorer, groups: Groups) -> AdapterProbe:
    """Measure whether the policy with its adapter off is the starting policy and stays it.

    Two parts: on and off agree; and off does not change when every trained parameter does. Afterwards the
    parameters are what they were, to the bit.
    """
    batch = scorer.pack(groups)
    on, noise = measure_noise(scorer, groups, batch)
    off = AdapterOff(scorer)
    before = logps_of(off, batch)
    trained = [parameter for parameter in scorer.model.parameters() if parameter.requires_grad]
    originals = [parameter.detach().clone() for parameter in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in trained:
            noisy = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(noisy.to(parameter.device, parameter.dtype), alpha=0.1)
        after = logps_of(off, batch)
    finally:
        for parameter, original in zip(trained, originals, strict=True):
            parameter.data.copy_(original)
    return AdapterProbe(
        on_off_difference=(on - before).abs().max().item(),
        off_movement=(after - before).abs().max().item(),
        trained_outside=_trained_outside_adapter(scorer.model),
        tolerance=noise.tolerance(same_arithmetic=same_arithmetic(scorer, off)),
    )


def require_adapter_off(scorer: Scorer, groups: Groups) -> AdapterProbe:
    """Probe the adapter of a run whose reference is the policy with its adapter off.

    Raises:
        PlanError: That is not the starting policy, or will not stay it.
    """
    probe = probe_adapter(scorer, groups)
    remedy = "Use `reference: {source: auto}`, or `{schedule: precomputed, source: initial_policy}`."
    if not probe.on_equals_off:
        raise PlanError(
            "reference.source: adapter_off is not the starting policy: switching the adapter off changes "
            f"log-probs by up to {probe.on_off_difference:.3g} nats a token. This adapter does not start "
            f"as the identity (PiSSA, OLoRA, `init_lora_weights: false`, or a resumed one). {remedy}"
        )
    if not probe.off_unmoved:
        outside = probe.trained_outside
        raise PlanError(
            "reference.source: adapter_off would move with the policy: "
            f"{len(outside)} trained parameters stay on when the adapter is off "
            f"({', '.join(outside[:3])}). {remedy}"
        )
    return probe


def _likely_reason(policy: Scorer, reference: Reference, batch: PackedBatch) -> str:
    if not torch.equal(logps_of(reference, batch), logps_of(reference, batch)):
        return "The reference answers differently each time: dropout is on while it is scored."
    match reference:
        case SeparateModel(scorer=second):
            return _first_differing_weight(policy.model, second.model)
        case AdapterOff():
            return (
                "Switching this adapter off does not give the starting policy (PiSSA, OLoRA, a resumed "
                "adapter): use `reference: {source: auto}`."
            )
        case Precomputed(store=store):
            return (
                f"The records in {store.folder} are not of this policy. Remove that folder and start again."
            )
    return "The reference's adapter is not the one the policy starts from."


def _first_differing_weight(policy: nn.Module, reference: nn.Module) -> str:
    held = {base_name(name): parameter for name, parameter in policy.named_parameters()}
    for name, theirs in reference.named_parameters():
        ours = held.get(name)
        if ours is None:
            return f"The reference has {name}, the policy has not: they are different models."
        if ours.shape != theirs.shape:
            return f"{name} is {_shape(ours)} in the policy and {_shape(theirs)} in the reference."
        if ours.dtype != theirs.dtype:
            return (
                f"{name} is {ours.dtype} in the policy, {theirs.dtype} in the reference (`reference.dtype`)."
            )
        if not torch.equal(ours.detach().cpu(), theirs.detach().cpu()):
            rows = (
                (ours.detach().cpu() != theirs.detach().cpu()).reshape(len(ours), -1).any(-1).nonzero()[:, 0]
            )
            return (
                f"{name} differs, in {len(rows)} of {len(ours)} rows from row {rows[0].item()}: new token "
                "rows or weights were drawn twice, or the policy's were changed after loading."
            )
    if _trained_adapters(policy):
        return "All weights of the base are equal; the policy's adapter makes the difference."
    return "All weights are equal: an attention implementation, a precision or a config field differs."


def _shape(parameter: Tensor) -> str:
    return " × ".join(map(str, parameter.shape))


def _trained_adapters(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if POLICY_ADAPTER in name.split(".")]


def _trained_outside_adapter(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        base_name(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and POLICY_ADAPTER not in name.split(".")
    )
