"""The trainer: transformers' loop around an optimizer step that is exact however it is cut.

It knows no loss, no kind of reference and no data format; it is handed finished objects. What it changes in
`transformers.Trainer` is what one step and one evaluation mean:

- A dataloader item is the list of all groups of one optimizer step on this process, its
  `gradient_accumulation_steps` included. `training_step` cuts it by a token budget and scales every loss by
  (processes / groups of the step in all processes), because DDP and FSDP average over processes: the gradient
  is the mean over the step's groups, whatever the cut.
- An evaluation is one step that is not taken: its loss is that of the whole evaluation set at once.
- Metrics are sums and counts, added up over processes once per step.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from fiducial.agreement import all_or_none
from fiducial.data.micro_batches import Load
from fiducial.data.tokenize import TokenizedGroup
from fiducial.training.adapter_trainer import AdapterTrainer
from fiducial.training.callbacks import (
    KeepsFiles,
    LossMemory,
    RunningMetrics,
    WritesFirst,
    restore_callbacks,
)
from fiducial.training.dataloader import Process, StepSampler, step_dataloader
from fiducial.training.evaluation import Evaluation
from fiducial.training.failures import (
    budget_too_large,
    gradient_not_finite,
    group_does_not_fit,
    loss_not_finite,
)
from fiducial.training.metrics import MetricSums
from fiducial.training.objective import Objective, Scored, Step
from fiducial.training.passes import Passes, cut_step, floating_point_ops

logger = logging.getLogger(__name__)

Groups = Sequence[TokenizedGroup]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is trained on and, if anything, what is evaluated."""

    train: Dataset[TokenizedGroup]
    evaluation: Dataset[TokenizedGroup] | None = None
    shuffle: bool = True


@dataclass(frozen=True, slots=True)
class _Taken:
    """The passes of one optimizer step, whose gradients are there and whose update is not made yet."""

    loss: Tensor
    """This process's share of the step's mean loss."""
    sums: MetricSums
    score: Step
    micro_batches: Sequence[Groups]
    losses: Sequence[Tensor]
    """Of each micro-batch, one for a group."""


class PreferenceTrainer(AdapterTrainer):
    """Minimises an objective over groups."""

    model: PreTrainedModel
    objective: Objective

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        objective: Objective,
        data: TrainingData,
        *,
        micro_batch_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        args = _whole_steps(args)
        self.objective = objective
        self.shuffle = data.shuffle
        self.running = RunningMetrics(args.device, micro_batch_tokens)
        with _own_use_cache(model.config):
            super().__init__(
                model=model,
                args=args,
                train_dataset=data.train,
                eval_dataset=data.evaluation,
                processing_class=tokenizer,
                callbacks=[self.running, LossMemory(objective), *callbacks],
            )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint folder."""
        if isinstance(resume_from_checkpoint, str):
            restore_callbacks(self.callback_handler.callbacks, Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Gradients of the mean loss over the step's groups; returns this process's share of that mean.

        Raises:
            TrainingError: the loss is not a number (in any process), or not even one group at a time fits
                into memory.
        """
        model.train()
        self._optimizer_mode("train")
        self.objective.scorer.module = model
        taken = self._shrinking(inputs, partial(self._forward_backward, model))
        taken.sums.reduce()
        self._require_finite(taken)
        taken.score.finish()
        self.running.sums.merge(taken.sums)
        return taken.loss

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Every metric of the whole evaluation set as one step, whatever the batches and processes."""
        self.model.train(False)
        self._optimizer_mode("eval")
        self.objective.scorer.module = self.model
        self.callback_handler.eval_dataloader = dataloader
        evaluation = Evaluation(self.objective)
        for groups in dataloader:
            self._shrinking(groups, partial(self._score, evaluation))
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums = MetricSums(self.args.device)
        _count(sums, evaluation.finish(), [])
        sums.reduce()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in sums.means().items()}
        return EvalLoopOutput(np.empty(0), None, metrics, sums.num_pairs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time it takes does not count towards training's throughput."""
        with self.running.stopwatch.paused():
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics of all pairs since the last log where it is training that is logged."""
        if "loss" in logs:
            logs.update(self.running.take())
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One item an optimizer step: the list of this process's groups."""
        return self._dataloader(self.train_dataset, self.args.per_device_train_batch_size, self.shuffle)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Lists of groups in the data's order, dealt out to processes without repeating any."""
        if isinstance(eval_dataset, str):
            assert isinstance(self.eval_dataset, dict)
            eval_dataset = self.eval_dataset[eval_dataset]
        chosen = eval_dataset if eval_dataset is not None else self.eval_dataset
        return self._dataloader(chosen, self.args.per_device_eval_batch_size, shuffle=False)

    def asked(self, first: int, stop: int) -> list[TokenizedGroup]:
        """What the reference will be asked from one optimizer step up to another, as far as it is known.

        Rows of a stream are not known before they come.
        """
        data: Any = self.train_dataset
        stop = min(stop, self.state.max_steps)
        if isinstance(data, IterableDataset) or first >= stop:
            return []
        process = Process(0, self.accelerator.num_processes)
        seed = self.args.seed if self.shuffle else None
        sampler = StepSampler(len(data), self.args.per_device_train_batch_size, process, shuffle_seed=seed)
        trained, ahead = self.objective.parts([data[row] for row in sampler.of_steps(first, stop)])
        return trained + ahead

    def floating_point_ops(self, inputs: Any) -> int:
        """Of one step's products with weights."""
        return floating_point_ops(inputs, self.objective)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the whole gradient, before it is clipped, known to be a number.

        Raises:
            TrainingError: it is none (in any process), and the update would make all weights such.
        """
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]  # as transformers has it
        # The scaler of float16 passes over such a step, and takes a smaller scale.
        if not (self.args.fp16 or math.isfinite(norm.item() if isinstance(norm, Tensor) else norm)):
            raise gradient_not_finite(step=self.state.global_step + 1)
        return norm

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, and with them what the loss carried then."""
        super()._load_best_model()
        restore_callbacks([LossMemory(self.objective)], Path(self.state.best_model_checkpoint or ""))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.running.stopwatch.paused():
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, WritesFirst):
                    callback.before_checkpoint()
            if (
                self.is_world_process_zero()
            ):  # first: transformers' own files end with the one that says "complete"
                self._save_callbacks_files(trial)
            super()._save_checkpoint(model, trial)

    def _save_callbacks_files(self, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, KeepsFiles):
                callback.save_files(folder)

    def _dataloader(self, dataset: Any, groups_per_step: int, shuffle: bool) -> DataLoader[Any]:
        process = Process(self.accelerator.process_index, self.accelerator.num_processes)
        seed = self.args.seed if shuffle else None
        workers = self.args.dataloader_num_workers
        return step_dataloader(dataset, groups_per_step, process, shuffle_seed=seed, num_workers=workers)

    def _optimizer_mode(self, mode: str) -> None:
        """Schedule-free optimizers keep two sets of weights and are told which one is wanted."""
        if callable(switch := getattr(self.optimizer, mode, None)):
            switch()

    def _forward_backward(self, model: nn.Module, passes: Passes) -> _Taken:
        model.zero_grad()  # of what an attempt that ran out of memory left behind
        weight = self.accelerator.num_processes / max(passes.num_groups, 1)
        total, sums = torch.zeros((), device=self.args.device), MetricSums(self.args.device)
        losses: list[Tensor] = []
        score = self.objective.step(passes.trained, passes.ahead)
        for index, micro_batch in enumerate(passes.trained):
            # Until they are reduced, gradients of sharded weights are whole, and as large as all of these.
            reduces = self.is_fsdp_enabled or index == len(passes.trained) - 1
            with nullcontext() if reduces else self.accelerator.no_sync(model):
                scored = score(index)
                loss = scored.output.loss.sum() * weight
                self.accelerator.backward(loss)
            total += loss.detach()
            losses.append(scored.output.loss.detach())
            _count(sums, scored, micro_batch)
        return _Taken(total, sums, score, passes.trained, losses)

    def _require_finite(self, taken: _Taken) -> None:
        """End all processes where the loss of one is not a number, which the shared sums show to all."""
        if taken.sums.is_finite("loss"):
            return
        with all_or_none():
            if not all(loss.isfinite().all() for loss in taken.losses):
                step, learning_rate = self.state.global_step + 1, self._get_learning_rate()
                raise loss_not_finite(
                    taken.micro_batches, taken.losses, step=step, learning_rate=learning_rate
                )

    def _score(self, evaluation: Evaluation, passes: Passes) -> None:
        evaluation.score(passes.trained, passes.ahead)

    def _cut(self, groups: Groups) -> Passes:
        return cut_step(groups, self.objective, self.running.micro_batch_tokens)

    def _shrinking(self, groups: Groups, attempt: Callable[[Passes], T]) -> T:
        """Repeat the whole `attempt` with half the token budget as long as memory runs out."""
        while True:
            passes = self._cut(groups)
            try:
                return attempt(passes)
            except torch.OutOfMemoryError as error:
                self._halve_budget(passes, error)
            torch.cuda.empty_cache()  # not in the handler: the traceback still holds the tensors there

    def _halve_budget(self, passes: Passes, error: torch.OutOfMemoryError) -> None:
        tokens, singly = passes.costliest(self.objective.scorer.layout)
        step = self.state.global_step + 1
        if singly:
            raise group_does_not_fit(tokens, step=step) from error
        smaller = min(self.running.micro_batch_tokens, tokens) // 2
        if self.accelerator.num_processes > 1:
            rank = self.accelerator.process_index
            raise budget_too_large(tokens, step=step, rank=rank, smaller=smaller) from error
        logger.warning("Out of memory with %d tokens in a forward pass: going on with %d.", tokens, smaller)
        self.running.micro_batch_tokens = smaller


def _whole_steps(args: TrainingArguments) -> TrainingArguments:
    """`args` with the groups of a whole optimizer step in one dataloader item, and nothing to accumulate.

    Were it left to transformers, it would call `training_step` for each part of a step, and each call would
    drop the gradient of the one before.
    """
    if args.gradient_accumulation_steps == 1:
        return args
    whole = copy.copy(args)
    whole.per_device_train_batch_size *= args.gradient_accumulation_steps
    whole.gradient_accumulation_steps = 1
    return whole


@contextmanager
def _own_use_cache(config: PreTrainedConfig) -> Iterator[None]:
    """Keep what the checkpoint says: transformers writes its own, which would be saved with the model."""
    own = vars(config).get("use_cache")
    yield
    if own is None:
        vars(config).pop("use_cache", None)
    else:
        config.use_cache = own


def _count(sums: MetricSums, scored: Scored, groups: Groups) -> None:
    sums.add(scored.comparison, scored.output, tokens=Load.of(groups).tokens)
