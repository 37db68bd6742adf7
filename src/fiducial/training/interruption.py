"""A run that is asked to stop: it finishes the step, saves a checkpoint, and says how to go on."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fiducial.processes import any_process, is_first_process


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so after saving a checkpoint."""


_STOPPING = b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once, without one.\n"


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM saves a checkpoint after the current step and stops; Ctrl-C after that acts at once.

    SIGTERM after SIGTERM is the same request: a cluster sends it to every process of a job, and the launcher,
    which is one of them, sends it on to the others.
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped_at: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Listen, where Python lets us: signals reach only the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Every process stops at the same step, though the signal may reach them at different ones."""
        if any_process(self.requested, args.device):
            self.stopped_at = state.global_step
            control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Undo what transformers does at an epoch's end where it only stops; the resumed run has a real one.

        Its best checkpoint and early stopping would otherwise depend on when it was interrupted.
        """
        if self.stopped_at is not None and not float(state.epoch or 0).is_integer():
            control.should_evaluate = control.should_save = False
        return control

    def release(self) -> None:
        """Give the signals back to whoever had them."""
        self._give_back(*self._previous)

    def _give_back(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.requested = True
        # After Ctrl-C SIGTERM is given back as well: a launcher that is sent Ctrl-C again sends that on.
        self._give_back(signal.SIGINT, *([] if number == signal.SIGTERM else [signal.SIGTERM]))
        if is_first_process():
            # Not by `print`: the signal may have come while Python was writing, and cannot write in between.
            with suppress(OSError):  # nobody reads it
                os.write(2, _STOPPING)
