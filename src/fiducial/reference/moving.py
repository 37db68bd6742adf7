"""References that follow the policy (TR-DPO, Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656).

Every few optimizer steps the reference becomes α·policy + (1 − α)·reference. The average is kept in float32
whatever precision the reference computes in: bfloat16 would lose small moves. Of an adapter only an exact
copy is taken (α = 1): averaging its matrices A and B would not average the update B·A.

Only weights that are trained move; the others are equal in both from the start.

What a follower keeps is whole in every process, also where the model is sharded: one process alone can then
save it. Weights that FSDP2 has gathered for a pass are let go first: what is written to those is lost.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from fiducial.errors import TrainingError
from fiducial.model.adapters import POLICY_ADAPTER, REFERENCE_ADAPTER, renamed
from fiducial.reference.fingerprint import hash_tensor
from fiducial.reference.kinds import Sync

STATE_FILE = "reference_state.safetensors"
MOVED_FOLDER = "moved_reference"
"""Below the output folder: where a synced reference stood at the end."""


class Follower(Protocol):
    """A reference's weights, as far as they follow the policy's."""

    def move(self) -> None:
        """Take the policy's weights of this moment in, as far as the sync says."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put the weights back that `state` gave."""
        ...


class ModelFollower:
    """A second model that follows the policy."""

    def __init__(self, policy: nn.Module, reference: nn.Module, sync: Sync) -> None:
        self.policy = policy
        self.sync = sync
        self.reference = dict(reference.named_parameters())
        trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
        self.averages = {
            name: self.reference[name].data if sync.copies else self.reference[name].data.float()
            for name in trained
        }
        """The reference's own tensors where these are float32 already, so that nothing is held twice."""

    @torch.no_grad()
    def move(self) -> None:
        """Reference ← α·policy + (1 − α)·reference."""
        _let_go(self.policy)
        for name, trained in self._policy_weights():
            average = self.averages[name]
            average.lerp_(trained.to(average), self.sync.mixup_alpha)
            _write(self.reference[name], average)

    def state(self) -> dict[str, Tensor]:
        """The averages."""
        return {name: average.detach().cpu() for name, average in self.averages.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put the averages back, and what the reference computes with."""
        for name, average in self.averages.items():
            average.copy_(state[name])
            _write(self.reference[name], average)

    def _policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.policy.named_parameters():
            if name in self.averages:
                yield name, _whole(parameter)  # sharded ones are gathered one at a time


class AdapterFollower:
    """A frozen copy of the policy's adapter that becomes it anew."""

    def __init__(self, policy: PeftModel) -> None:
        self.policy = policy
        self.copies = {
            name: parameter.data
            for name, parameter in self._parameters().items()
            if REFERENCE_ADAPTER in name.split(".")
        }
        """The copy's own tensors, unless the model is sharded."""

    @torch.no_grad()
    def move(self) -> None:
        """Reference ← policy."""
        _let_go(self.policy)
        held = self._parameters()
        for name, copy in self.copies.items():
            copy.copy_(_whole(held[renamed(name, REFERENCE_ADAPTER, POLICY_ADAPTER)]))
            _write(held[name], copy)

    def state(self) -> dict[str, Tensor]:
        """The copy."""
        return {name: copy.cpu() for name, copy in self.copies.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put the copy back."""
        _let_go(self.policy)
        held = self._parameters()
        for name, copy in self.copies.items():
            copy.copy_(state[name])
            _write(held[name], copy)

    def _parameters(self) -> dict[str, nn.Parameter]:
        # Sharding puts other parameters under the same names.
        return dict(self.policy.named_parameters(remove_duplicate=False))


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()


def _write(held: Tensor, whole: Tensor) -> None:
    """Put `whole` into a parameter: its share of it, where the model is sharded."""
    if isinstance(held, DTensor):
        # Every process has the whole: none is sent.
        share = distribute_tensor(
            whole.to(held.device), held.device_mesh, held.placements, src_data_rank=None
        )
        held.to_local().copy_(share.to_local())
    elif held.data_ptr() != whole.data_ptr():
        held.data.copy_(whole)


def _let_go(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def build_follower(policy: nn.Module, second: nn.Module | None, sync: Sync) -> Follower:
    """What moves the reference of a synced plan: a second model, or a copy of the adapter."""
    if second is not None:
        return ModelFollower(policy, second, sync)
    assert isinstance(policy, PeftModel), "only an adapter follows without a second model"
    return AdapterFollower(policy)


def save_follower(follower: Follower, folder: Path) -> None:
    """Keep the reference's weights in a checkpoint's `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in follower.state().items()}
    aside = folder / f".{STATE_FILE}"
    save_file(state, aside)
    aside.replace(folder / STATE_FILE)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Hash of every bit of what a follower keeps, and of its names."""
    lines = [f"{name} {hash_tensor(state[name])}" for name in sorted(state)]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def load_moved(follower: Follower, folder: Path, then: str = "") -> None:
    """Put back where the reference stood when a checkpoint, or the output folder of a run, was written.

    Raises:
        TrainingError: the folder does not hold it, or it is another one than `then`.
    """
    load_follower(follower, _folder_of_moved(folder), then)


def load_follower(follower: Follower, folder: Path, then: str = "") -> None:
    """Put the weights back that `save_follower` kept; `then` is their `state_digest`, if known.

    Raises:
        TrainingError: they are not there, not of this run's model, or others than `then`.
    """
    state = _read(folder, then)
    try:
        follower.load(state)
    except (KeyError, RuntimeError) as error:
        raise _not_there(folder, error) from error


def require_moved(folder: Path, then: str) -> None:
    """Raise `TrainingError` where `load_moved` would not find the weights with the digest `then`."""
    _read(_folder_of_moved(folder), then)


def _folder_of_moved(folder: Path) -> Path:
    at_end = folder / MOVED_FOLDER
    return at_end if (at_end / STATE_FILE).is_file() else folder


def _read(folder: Path, then: str) -> dict[str, Tensor]:
    try:
        state = load_file(folder / STATE_FILE)
    except (OSError, SafetensorError) as error:
        raise _not_there(folder, error) from error
    if then and state_digest(state) != then:
        raise TrainingError(
            f"the reference in {folder} is not the one this run had moved to when that was saved: its "
            f"weights are others. Put its {STATE_FILE} back, or name another checkpoint."
        )
    return state


def _not_there(folder: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{folder / STATE_FILE} does not hold the reference this run had moved to ({error}). Without it the "
        "run cannot be resumed or evaluated exactly; name another checkpoint, or start again."
    )
