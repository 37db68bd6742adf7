"""Offloaded by FSDP2 in one process, in one pass with the policy: two passes are the naive twin."""

from collections.abc import Iterator

import pytest
import torch
from bench.one_pass_processes import Held, in_both_ways
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor

from fiducial.model.scoring import Scorer
from fiducial.reference.one_pass import beside_policy
from fiducial.reference.sources import Reference
from tiny import random_groups, tiny_model

GROUPS = random_groups(3)
HELD = Held("cpu", 1, CPUOffloadPolicy(pin_memory=False))


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scored(policy: Scorer, reference: Reference) -> list[Tensor]:
    """Log-probs of policy and reference, and the gradient of every trained weight."""
    policy.model.zero_grad()
    with beside_policy(reference, policy.pack(GROUPS)) as answer:
        values = policy(policy.pack(GROUPS)).values
    compared = answer()
    assert compared is not None
    (values - compared.values).square().sum().backward()
    gradients = [each.grad for each in policy.model.parameters() if each.requires_grad]
    assert all(isinstance(each, DTensor) for each in gradients)
    return [values, compared.values, *(each.full_tensor() for each in gradients)]


@pytest.mark.parametrize("tied", [False, True])
def test_one_pass_is_two_to_the_bit(tied: bool) -> None:
    policy, apart, together = in_both_ways(tiny_model(tie_word_embeddings=tied), HELD)
    assert isinstance(policy.model, FSDPModule)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.to_local().normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    ours, theirs = scored(policy, together), scored(policy, apart)
    assert (ours[0] - ours[1]).abs().max() > 0.1, "a reference that is the policy proves nothing"
    assert len(ours) == len(theirs) > 2
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
