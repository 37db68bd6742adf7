"""An adapter that is named for the reference, held beside the policy's own while the reference is asked."""

from peft import PeftModel
from torch import nn

from fiducial.agreement import all_or_none
from fiducial.model.adapters import REFERENCE_ADAPTER, add_reference_adapter
from fiducial.reference.plan import ReferencePlan, Source


def put_named_adapter(plan: ReferencePlan, policy: nn.Module, *, pickle: bool) -> None:
    """Put the plan's adapter beside the policy's, where the plan has one and it is not there yet.

    All processes must call it; none goes on without the others.

    Raises:
        ModelError: It is missing, damaged, only there as pickle, or was trained on another base.
    """
    if not _beside(plan):
        return
    assert plan.checkpoint is not None, "another policy was named"
    assert plan.checkpoint.adapter is not None, "another policy was named"
    assert isinstance(policy, PeftModel), "planned beside another adapter alone"
    if REFERENCE_ADAPTER not in policy.peft_config:
        with all_or_none():
            add_reference_adapter(policy, plan.checkpoint.adapter, pickle=pickle)


def take_named_adapter(plan: ReferencePlan, policy: nn.Module) -> None:
    """Forget it again: all that it was asked for is in the store."""
    if _beside(plan):
        assert isinstance(policy, PeftModel), "planned beside another adapter alone"
        policy.delete_adapter(REFERENCE_ADAPTER)


def _beside(plan: ReferencePlan) -> bool:
    return plan.source is Source.FROZEN_ADAPTER and not plan.equals_starting_policy
