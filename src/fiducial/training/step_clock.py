"""How a run's time divides between training the policy and scoring its reference."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fiducial.data.batch import PackedBatch
from fiducial.logps import TokenLogps
from fiducial.model.divergence import Distribution
from fiducial.reference.one_pass import Answer, beside_policy
from fiducial.reference.sources import LiveReference, Reference


class TimedReference:
    """Answers as the reference it holds, and adds up the seconds that takes."""

    def __init__(self, reference: Reference, device: torch.device) -> None:
        self.reference = reference
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def token_logps(self, batch: PackedBatch) -> TokenLogps | None:
        """Log-probs of the batch."""
        with self._timed():
            return self.reference.token_logps(batch)

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs and distributions of the batch."""
        assert isinstance(self.reference, LiveReference), "the plan of such a loss is live"
        with self._timed():
            return self.reference.distribution(batch)

    @contextmanager
    def beside_policy(self, batch: PackedBatch) -> Iterator[Answer]:
        """Log-probs of the batch after the policy's pass, which is not counted, whatever else it computes."""
        with ExitStack() as stack:
            with self._timed():
                answer = stack.enter_context(beside_policy(self.reference, batch))

            def timed() -> TokenLogps | None:
                with self._timed():
                    return answer()

            yield timed

    @property
    def seconds(self) -> float:
        """Spent so far, as far as a GPU has got."""
        while self._pending and self._pending[0][1].query():  # type: ignore[no-untyped-call]  # torch types no event
            started, ended = self._pending.pop(0)
            self._seconds += started.elapsed_time(ended) / 1000
        return self._seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        if not self._on_gpu:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        # A GPU works behind the program: its own clock is asked, and nobody waits for it.
        events = _event(), _event()
        events[0].record()
        yield
        events[1].record()
        self._pending.append(events)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch types no event


class StepClock(TrainerCallback):
    """Seconds inside optimizer steps; evaluation, checkpoints and logs are outside of them."""

    def __init__(self, reference: TimedReference) -> None:
        self.reference = reference
        self.seconds = 0.0
        self.scoring = 0.0
        """Of `seconds`, those the reference took."""
        self._began = self._scored = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began, self._scored = time.perf_counter(), self.reference.seconds

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it."""
        self.seconds += time.perf_counter() - self._began
        self.scoring += self.reference.seconds - self._scored
