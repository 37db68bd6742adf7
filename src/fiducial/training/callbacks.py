"""What happens beside the optimizer steps: metrics are kept and written, and what else checkpoints hold."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from fiducial.errors import ConfigError
from fiducial.model.generation import make_savable
from fiducial.processes import num_processes
from fiducial.training.checkpoints import NUM_PROCESSES, saved_callback_states
from fiducial.training.metrics import MetricSums, Stopwatch, peak_memory
from fiducial.training.objective import Objective


@runtime_checkable
class KeepsFiles(Protocol):
    """A callback with files of its own in each checkpoint."""

    def save_files(self, folder: Path) -> None:
        """Write them into a checkpoint's folder."""
        ...


@runtime_checkable
class WritesFirst(Protocol):
    """A callback with something beside the checkpoints that a resumed run counts on."""

    def before_checkpoint(self) -> None:
        """Write it, in every process."""
        ...


class SavableGeneration(TrainerCallback):
    """Sees to it that generation settings can be saved, once the trainer has set their tokens."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.model, self.path = model, path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before step 1: after the last one the model would be lost."""
        make_savable(self.model, self.path)


class RunningMetrics(TrainerCallback, ExportableState):
    """Metrics since the last log, the token budget, and how many processes there are: kept in checkpoints."""

    def __init__(self, device: torch.device, micro_batch_tokens: int) -> None:
        self.device = device
        self.micro_batch_tokens = micro_batch_tokens
        self.sums = MetricSums(device)
        self.stopwatch = Stopwatch()
        self.seconds = 0.0
        """Trained since the last log before the run was resumed."""

    def take(self) -> dict[str, float]:
        """Means and throughput since the last log; starts anew."""
        seconds = self.stopwatch.restart()
        metrics = self.sums.means() | {
            "tokens_per_second": self.sums.num_tokens / seconds,
            "pairs_per_second": self.sums.num_pairs / seconds,
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }
        self.sums = MetricSums(self.device)
        return metrics

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        attributes = {"totals": self.totals, "seconds": self.stopwatch.elapsed}
        launched = {"micro_batch_tokens": self.micro_batch_tokens, NUM_PROCESSES: num_processes()}
        return {"args": launched, "attributes": attributes}

    @property
    def totals(self) -> dict[str, list[float]]:
        """The sums and counts, as a checkpoint keeps them."""
        return self.sums.state()

    @totals.setter
    def totals(self, rows: dict[str, list[float]]) -> None:
        self.sums.restore(rows)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Time starts at the first step, not while the model is wrapped."""
        self.stopwatch.restart(already=self.seconds)


class LossMemory(TrainerCallback, ExportableState):
    """What a loss carries from step to step, kept in checkpoints."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"running": dict(self.running)}}

    @property
    def running(self) -> dict[str, float]:
        """The numbers by name."""
        return self.objective.running

    @running.setter
    def running(self, numbers: dict[str, float]) -> None:
        self.objective.running = dict(numbers)


def saved_micro_batch_tokens(checkpoint: Path) -> int | None:
    """The token budget the run that wrote `checkpoint` had reached: dropout masks depend on it."""
    state = saved_callback_states(checkpoint).get(RunningMetrics.__name__)
    return int(state["args"]["micro_batch_tokens"]) if state is not None else None


def restore_callbacks(callbacks: Iterable[TrainerCallback], checkpoint: Path) -> None:
    """Give every callback that keeps state (early stopping's patience, say) what `checkpoint` has of it."""
    states = saved_callback_states(checkpoint)
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            for name, value in states.get(type(callback).__name__, {}).get("attributes", {}).items():
                setattr(callback, name, value)


class MetricsFile(TrainerCallback):
    """Appends every log to a file, one JSON object a line; after a resume it is that of an unbroken run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop what the resumed checkpoint does not know of; a new run puts an older run's file aside."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step > 0:
            self._keep_until(state.global_step)
        elif self.path.exists():
            self.path.replace(self.path.with_suffix(".previous.jsonl"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line; a number JSON has no name for becomes null."""
        if not state.is_world_process_zero:
            return
        record = {"step": state.global_step} | {
            name: _jsonable(value) for name, value in (logs or {}).items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _keep_until(self, step: int) -> None:
        kept = [
            line
            for line, record in read_metrics_lines(self.path)
            if record["step"] <= step
            and "train_runtime" not in record  # the summary of a run that stopped here
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)


class LastEvaluation(TrainerCallback):
    """Evaluates at the last step where `eval_strategy` is `no`: after it, loggers have ended their run."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """With any other strategy transformers evaluates at the end by itself."""
        if args.eval_strategy == IntervalStrategy.NO and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control


def read_metrics_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each complete line of a metrics file and what it holds; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            records.append((line, json.loads(line)))
        except ValueError:
            continue
    return records


def _jsonable(value: Any) -> Any:
    number = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


class BestMetricIsMeasured(TrainerCallback):
    """Looks for `metric_for_best_model` at the first evaluation, which is before step 1."""

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Raise `ConfigError` where it is not among `metrics`."""
        name = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if metrics is not None and name not in metrics:
            known = ", ".join(each.removeprefix("eval_") for each in metrics)
            raise ConfigError(
                f"metric_for_best_model: {args.metric_for_best_model} is not measured here; write one of "
                f"{known}"
            )
