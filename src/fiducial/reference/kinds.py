"""The words a reference plan is written in: sources, schedules, and which go together."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Source(StrEnum):
    """Which policy is the reference."""

    NONE = "none"
    """The loss needs none."""
    ADAPTER_OFF = "adapter_off"
    """The policy with its adapter switched off, where that is the starting policy."""
    FROZEN_ADAPTER = "frozen_adapter"
    """The base with a frozen copy of the adapter the run starts from, or with the one named for it."""
    SEPARATE_MODEL = "separate_model"
    """A second model."""
    INITIAL_POLICY = "initial_policy"
    """The policy's own weights before step 1; only precomputed."""
    ENDPOINT = "endpoint"
    """A server that answers with log-probs; only precomputed."""


class Schedule(StrEnum):
    """When the reference's log-probs are computed."""

    LIVE = "live"
    """Beside the policy, at every step."""
    PRECOMPUTED = "precomputed"
    """Once before training, then read. The starting policy is then the policy itself before step 1, and no
    copy is kept."""

    SYNCED = "synced"
    """Beside the policy, towards which it moves every few steps (TR-DPO)."""

    @property
    def beside_policy(self) -> bool:
        """Whether the reference is there while the policy trains."""
        return self is not Schedule.PRECOMPUTED


VALID: Mapping[Source, frozenset[Schedule | None]] = MappingProxyType(
    {
        Source.NONE: frozenset({None}),
        Source.ADAPTER_OFF: frozenset({Schedule.LIVE, Schedule.PRECOMPUTED}),
        Source.FROZEN_ADAPTER: frozenset({Schedule.LIVE, Schedule.PRECOMPUTED, Schedule.SYNCED}),
        Source.SEPARATE_MODEL: frozenset({Schedule.LIVE, Schedule.PRECOMPUTED, Schedule.SYNCED}),
        Source.INITIAL_POLICY: frozenset({Schedule.PRECOMPUTED}),
        Source.ENDPOINT: frozenset({Schedule.PRECOMPUTED}),
    }
)
"""Which schedules make sense for each source."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the reference's weights come from."""

    path: str
    revision: str | None = None
    adapter: str | None = None
    """An adapter that belongs to the reference: the one the run resumes, or the one named for it."""
    endpoint: str | None = None
    """The server that answers for it; `path` is then its name there."""


@dataclass(frozen=True, slots=True)
class Sync:
    """How a reference moves: every `steps` optimizer steps it becomes α·policy + (1 − α)·reference."""

    steps: int
    mixup_alpha: float

    @property
    def copies(self) -> bool:
        """Whether the reference becomes the policy of that moment."""
        return self.mixup_alpha == 1


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """The decision everything later obeys."""

    source: Source
    schedule: Schedule | None
    """None where there is no reference."""
    checkpoint: Checkpoint | None
    why: str
    notes: tuple[str, ...] = ()
    equals_starting_policy: bool = True
    """False only where another policy was named: then the rewards at step 0 need not be zero."""
    approximate: str | None = None
    """How it is held otherwise than the policy, so that it answers only almost the same; None if exactly."""

    sync: Sync | None = None
    """How it moves, where it does."""

    writes_through: bool = False
    """Whether a reference beside the policy scores a row once, and keeps it for as long as it stands still:
    streamed rows in the cache, those of a reference that moves in the run's own folder until it does."""

    shared_layers: int = 0
    """How many of the lowest layers a live reference has computed by the policy's own pass."""

    gathered_once: bool = False
    """Whether sharded weights of each layer above these are gathered once for policy and reference."""

    frozen_held_once: bool = False
    """Whether a second model holds only the weights that are trained, and shares the others."""

    def __post_init__(self) -> None:
        assert (self.schedule is Schedule.SYNCED) == (self.sync is not None)
        assert self.schedule in VALID[self.source], (self.source, self.schedule)
        assert not self.writes_through or (self.schedule is not None and self.schedule.beside_policy)

    @property
    def kept(self) -> bool:
        """Whether its log-probs go into the cache, and are read from there."""
        if self.schedule is Schedule.LIVE:
            return self.writes_through
        return self.schedule is Schedule.PRECOMPUTED
