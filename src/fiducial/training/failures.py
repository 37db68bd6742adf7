"""What to tell a user whose step could not be computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError


def loss_not_finite(
    micro_batches: Sequence[Sequence[TokenizedGroup]],
    losses: Sequence[Tensor],
    *,
    step: int,
    learning_rate: float,
) -> TrainingError:
    """Names the step and the rows whose loss is infinite or not a number."""
    groups = [group for micro_batch in micro_batches for group in micro_batch]
    finite = torch.cat(list(losses)).isfinite().tolist()
    bad = [group for group, is_finite in zip(groups, finite, strict=True) if not is_finite]
    keys = ", ".join(" / ".join(group.keys) for group in bad[:4])
    return TrainingError(
        f"The loss is not a number at step {step}, for {len(bad)} of {len(groups)} groups (content keys "
        f"{keys}). The weights were not updated and earlier checkpoints are good. Try a lower learning_rate "
        f"(now {learning_rate:g}), more warmup_steps, max_grad_norm: 1.0, or bf16 instead of fp16."
    )


def gradient_not_finite(*, step: int) -> TrainingError:
    """The loss is a number, and what it asks of the weights is none."""
    return TrainingError(
        f"The gradient is not a number at step {step}, though the loss is one: something overflows in "
        "backward. The weights were not updated and earlier checkpoints are good. Try bf16: false, which "
        "computes in float32, or a lower learning_rate from an earlier checkpoint."
    )


def group_does_not_fit(tokens: int, *, step: int) -> TrainingError:
    """There is nothing left to cut."""
    return TrainingError(
        f"Out of memory at step {step} with one group of {tokens} tokens in a forward pass. Lower "
        "sequence_len, or set gradient_checkpointing: true, bf16: true, or adapter: lora."
    )


def budget_too_large(tokens: int, *, step: int, rank: int, smaller: int) -> TrainingError:
    """With several processes one cannot repeat its step alone: the others wait for it inside a collective."""
    return TrainingError(
        f"Out of memory at step {step} in process {rank} with {tokens} tokens in a forward pass. "
        f"Set micro_batch_tokens: {smaller} and start again."
    )


@contextmanager
def memory_explained(what: str) -> Iterator[None]:
    """Name `what` ran out of a GPU's memory before step 1, where there is no pass to cut.

    Raises:
        TrainingError: It did.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"Out of memory while {what}, before step 1. Look what else holds memory on this GPU, lower "
            "sequence_len or micro_batch_tokens, or hold the weights smaller (adapter: qlora with "
            "load_in_4bit: true, or reference.schedule: precomputed in place of a second model)."
        ) from error
