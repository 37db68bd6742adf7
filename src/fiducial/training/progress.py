"""Progress for people: a bar in a terminal, a line a log elsewhere."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class ProgressBar(TrainerCallback):
    """Steps done, time left, and the loss, reward accuracy and margin of the last log."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.last: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the bar, where there is a terminal to draw it in."""
        if not (state.is_world_process_zero and self.console.is_terminal):
            return
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
        )
        self.bar.add_task("train", total=state.max_steps, completed=state.global_step, metrics="")
        self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest metrics; those of held-out data get their own line."""
        if not state.is_world_process_zero or logs is None:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        if evaluated := describe(logs, "eval_"):
            self.console.print(f"{step}  held out: {evaluated}")
        elif trained := describe(logs, ""):
            if self.bar is not None:
                self.bar.update(self.bar.task_ids[0], metrics=trained)
            else:
                self.console.print(f"{step}  {trained}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the finished bar behind."""
        self.close()

    def close(self) -> None:
        """Stop drawing, also where training failed: an open bar hides what is printed after it."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(logs: dict[str, float], prefix: str) -> str:
    """The few metrics a person follows, in words."""
    return "  ".join(
        f"{word} {logs[prefix + name]:.4g}" for name, word in _SHOWN.items() if prefix + name in logs
    )
