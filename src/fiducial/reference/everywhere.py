"""Does every process of a run hold the same reference? One machine may have an older copy of a checkpoint.

The policy is made equal when it is wrapped, a second model is not: each process would compare with its own.
"""

import torch

from fiducial.agreement import all_or_none
from fiducial.errors import DataError, ModelError
from fiducial.processes import from_first
from fiducial.reference.noise import Groups
from fiducial.reference.verify import Proof


def require_same_everywhere(proof: Proof, groups: Groups) -> None:
    """Compare what the reference answered here on `groups` with its answers in the first process.

    A collective call.

    Raises:
        ModelError: They differ by more than other hardware rounds.
        DataError: The first process has read other rows.
    """
    keys = [key for group in groups for key in group.keys]
    first_keys, first = from_first(lambda: (keys, proof.reference_logps.tolist()))
    with all_or_none():
        if keys != first_keys:
            raise DataError(
                "datasets: the rows read here are not those of the first process. Give every machine the "
                "same files and the same settings."
            )
        difference = (proof.reference_logps - torch.tensor(first)).abs().max().item()
        if not difference <= (allowed := proof.noise.tolerance(same_arithmetic=False)):
            raise ModelError(
                f"the reference loaded here answers otherwise than in the first process, by up to "
                f"{difference:.3g} nats a token, where {allowed:.1g} can be other hardware. Put the "
                "same checkpoint on every machine: base_model, reference.model, lora_model_dir and "
                "reference.adapter."
            )
