"""What counts as equal: how far the same log-probs are apart when they are only computed in another shape.

Products of another shape may be summed in another order. That noise is measured on the loaded model, in the
precision and on the device of the run; four times the largest that was seen is the limit of rounding. Where
two references are equal on paper and computed in another way (a merged adapter, another device), a fixed
allowance for the precision stands beside it, because the shape of a batch says nothing of that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.adapters import POLICY_ADAPTER
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import AdapterOff, InitialPolicy, Precomputed, Reference, SeparateModel

Groups = Sequence[TokenizedGroup]

NOISE_FACTOR = 4
"""The largest of a few hundred roundings seen twice rarely differs by more than twice."""
LEAST = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2e-3, torch.float64: 1e-9}
"""Nats a token that one rounding of a product can make, where the shapes looked at happened to show none."""
ALLOWANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float64: 1e-9}
"""Nats a token by which two exact ways of computing the same may differ: DoRA switched off, by 0.056."""
SERVED_ALLOWANCE = 5e-2
"""Nats a token by which a server may answer otherwise the second time: what it computes in, and in which
batches, is its own business."""
FILLED_TOKENS = 4096
"""A pass of this many tokens is as good as any larger one: kernels are chosen alike beyond it."""


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """Largest change of a model's own log-probs with the shape of the batch, in nats a token."""

    nats: float
    dtype: torch.dtype
    """The precision of the products, for which it holds."""

    def tolerance(self, *, same_arithmetic: bool) -> float:
        """Largest difference that can be rounding."""
        least = LEAST if same_arithmetic else ALLOWANCE
        return max(NOISE_FACTOR * self.nats, least[self.dtype])


def measure_noise(
    scorer: Scorer, groups: Groups, batch: PackedBatch, *, pass_tokens: int = 0
) -> tuple[Float[Tensor, " scored"], NoiseFloor]:
    """The policy's log-probs of `batch`, which holds `groups`, and how much they change with its shape.

    The groups are scored together, each alone, and repeated until a pass of `pass_tokens` tokens is full.
    """
    policy = InitialPolicy(scorer)
    together = logps_of(policy, batch)
    alone = torch.cat([logps_of(policy, scorer.pack([group])) for group in groups])
    noise = (together - alone).abs().max().item()
    repeats = min(pass_tokens, FILLED_TOKENS) // max(batch.input_ids.numel(), 1)
    if repeats > 1:
        filled = logps_of(policy, scorer.pack([*groups] * repeats))
        noise = max(noise, (filled - together.repeat(repeats)).abs().max().item())
    return together, NoiseFloor(noise, scorer.autocast or scorer.model.dtype)


def same_arithmetic(policy: Scorer, reference: Reference) -> bool:
    """Whether a reference that equals the policy computes its log-probs by the same products."""
    match reference:
        case Precomputed(same_arithmetic=alike):
            return alike
        case SeparateModel(scorer=second):
            alike = second.layout == policy.layout and second.device == policy.device
            # With an adapter the second model has it merged in, or starts from weights that were split.
            return alike and not isinstance(policy.model, PeftModel)
        case AdapterOff():
            assert isinstance(policy.model, PeftModel), "there is no adapter to switch off"
            # DoRA divides by a norm and multiplies by it again; `orthogonal` adds what cancels.
            config = policy.model.peft_config[POLICY_ADAPTER]
            return not getattr(config, "use_dora", False) and config.init_lora_weights in (True, "gaussian")
    return True


def logps_of(reference: Reference, batch: PackedBatch) -> Float[Tensor, " scored"]:
    """The reference's log-probs of a batch, on the CPU."""
    logps = reference.token_logps(batch)
    assert logps is not None, "there is no reference to verify"
    return logps.values.detach().float().cpu()
