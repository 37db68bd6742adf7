"""Which policy is the reference, and when it is scored: decided once, purely, before weights are touched."""

from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """Which policy is the reference."""

    NONE = "none"
    """The loss needs none."""
    ADAPTER_OFF = "adapter_off"
    """The policy with its adapter switched off, where that is the starting policy."""
    FROZEN_ADAPTER = "frozen_adapter"
    """The base with a frozen copy of the adapter the run starts from."""
    SEPARATE_MODEL = "separate_model"
    """A second model."""
    INITIAL_POLICY = "initial_policy"
    """The policy's own weights before step 1; only precomputed."""


class Schedule(StrEnum):
    """When the reference's log-probs are computed."""

    LIVE = "live"
    """Beside the policy, at every step."""
    PRECOMPUTED = "precomputed"
    """Once before training, then read."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the reference's weights come from."""

    path: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The decision everything later obeys."""

    source: Source
    schedule: Schedule | None
    """None where there is no reference."""
    checkpoint: Checkpoint | None
    why: str
    notes: tuple[str, ...] = ()
