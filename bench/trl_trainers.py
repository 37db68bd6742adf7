"""TRL's trainers, handed token ids instead of text, with a watch on their scoring pass.

`row` gives a workload's example the columns that the trainer's own tokenization would have made.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from datasets import Dataset

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns that ORPO and CPO may change

from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from bench.measure import Stopwatch
from bench.workload import Example

Row = dict[str, Any]


class ScoringWatched:
    """Mixed into a trainer that may score its reference before training: the seconds of each such batch.

    The model's pass alone: neither collating the batch nor writing the results, which is in TRL's favour.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.scoring_seconds: list[float] = []
        self._before_training = False
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        self._before_training = True
        scored: Dataset = super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]  # the trainer's
        self._before_training = False
        return scored

    def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's own, watched."""
        watch = Stopwatch()
        with watch.running() if self._before_training else nullcontext():
            logps = super().compute_ref_log_probs(*args, **kwargs)  # type: ignore[misc]  # the trainer's
        if self._before_training:
            self.scoring_seconds.append(watch.seconds)
        return logps


class TokenIdsDPOTrainer(ScoringWatched, DPOTrainer):
    """Takes the ids of prompt, chosen and rejected completion."""

    @staticmethod
    def row(example: Example) -> Row:
        """Its columns."""
        chosen, rejected = example.completions
        return {"prompt_ids": example.prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TokenIdsKTOTrainer(ScoringWatched, KTOTrainer):
    """Takes the ids of prompt and completion, the completion's label, and the mismatched completion."""

    @staticmethod
    def row(example: Example) -> Row:
        """Its columns."""
        return {
            "prompt_ids": example.prompt,
            "completion_ids": example.completions[0],
            "KL_completion_ids": example.mismatched,
            "label": example.desirable,
        }

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


class TokenIdsCPOTrainer(CPOTrainer):
    """Takes ids, masks and labels of the two sequences."""

    scoring_seconds: Sequence[float] = ()
    """Nothing is scored before training."""

    @staticmethod
    def row(example: Example) -> Row:
        """Its columns."""
        return _labelled_sequences(example)

    @staticmethod
    def tokenize_row(feature: Row, model: Any = None) -> Row:
        """The row as it is."""
        return feature


class TokenIdsORPOTrainer(ORPOTrainer):
    """Takes ids, masks and labels of the two sequences, and minimises the paper's loss.

    TRL's supervised term is another one: it scores the prompt too, and is a mean over the batch's tokens. Its
    products stay, forward and backward, and only its value is replaced by the mean of the pairs' means over
    completion tokens, so that what is compared is equal and what is timed is TRL's.
    """

    scoring_seconds: Sequence[float] = ()
    """Nothing is scored before training."""

    @staticmethod
    def row(example: Example) -> Row:
        """Its columns."""
        return _labelled_sequences(example)

    @staticmethod
    def tokenize_row(feature: Row, model: Any = None) -> Row:
        """The row as it is."""
        return feature

    def concatenated_forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """TRL's forward pass, its last number replaced."""
        *results, supervised = super().concatenated_forward(*args, **kwargs)
        chosen = results[0]
        return (*results, 0 * supervised - chosen.mean())


def _labelled_sequences(example: Example) -> Row:
    columns: Row = {"prompt_input_ids": example.prompt, "prompt_attention_mask": [1] * len(example.prompt)}
    for name, completion in zip(("chosen", "rejected"), example.completions, strict=True):
        ids = example.prompt + completion
        columns |= {
            f"{name}_input_ids": ids,
            f"{name}_attention_mask": [1] * len(ids),
            f"{name}_labels": [-100] * len(example.prompt) + completion,
        }
    return columns
