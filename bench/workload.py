"""What contestants train on: token ids, in one fixed order.

Three data sets: `long` (chat pairs with long answers), `hh` (multi-turn pairs with short answers) and `kto`
(single completions, each desirable or not), the real ones of `bench.texts` or random tokens of such lengths.
A whole data set takes hours on a CPU, so a few examples stand for it: equally spaced quantiles of their
lengths, dealt into batches in the order whose padding comes closest to what random batches of the whole set
have, since padding is what a padded trainer pays for.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench import texts
from bench.texts import END_OF_TURN, MERGES, available

__all__ = ["BATCH_SIZE", "DATA", "Example", "Workload", "available", "make", "statistics"]


@dataclass(frozen=True)
class Example:
    """Token ids of one prompt and its completions: chosen and rejected, or one that is labelled."""

    prompt: list[int]
    completions: list[list[int]]
    desirable: bool | None = None
    """Of a single completion."""
    mismatched: list[int] = field(default_factory=list)
    """The completion of another example, which KTO scores after this prompt."""

    @property
    def shared_tokens(self) -> int:
        """Real tokens that are trained on, the prompt counted once."""
        return len(self.prompt) + self.scored_tokens

    @property
    def scored_tokens(self) -> int:
        """Tokens whose log-prob is trained."""
        return sum(map(len, self.completions))

    @property
    def visible_keys(self) -> int:
        """Keys seen by all queries of the example together, the prompt's queries counted once."""
        prompt = len(self.prompt)
        return _triangle(prompt) + sum(len(each) * prompt + _triangle(len(each)) for each in self.completions)

    @property
    def mismatched_keys(self) -> int:
        """Keys seen by the mismatched completion's queries."""
        return len(self.mismatched) * len(self.prompt) + _triangle(len(self.mismatched))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + completion."""
        return len(self.prompt) + max(map(len, self.completions))


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True)
class Workload:
    """Examples in training order: `warmup` steps that are not measured, then the measured ones."""

    name: str
    batch_size: int
    warmup: int
    max_length: int
    examples: list[Example]
    population: dict[str, float]
    """The same length statistics for the data set the examples stand for."""

    @property
    def steps(self) -> int:
        """Optimizer steps, warm-up included."""
        return len(self.examples) // self.batch_size

    @property
    def measured(self) -> list[Example]:
        """The examples of the measured steps."""
        return self.examples[self.warmup * self.batch_size :]

    @property
    def unit(self) -> str:
        """What an example is."""
        return "pairs" if self.examples[0].desirable is None else "completions"

    def save(self, path: Path) -> None:
        """Write as JSON, for the processes that measure."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        return cls(**(raw | {"examples": [Example(**example) for example in raw["examples"]]}))


@dataclass(frozen=True)
class DataSet:
    """How many examples of a data set make an optimizer step, and how long they are.

    Lengths are log-normal: median and spread (standard deviation of the logarithm), fitted to the real ones.
    """

    batch_size: int
    prompt: tuple[int, float]
    completions: tuple[tuple[int, float], ...]


DATA = {
    "long": DataSet(4, (186, 1.13), ((320, 0.92), (340, 0.76))),
    "hh": DataSet(8, (96, 0.75), ((27, 1.0), (36, 0.91))),
    "kto": DataSet(8, (111, 1.3), ((250, 0.6),)),
}
BATCH_SIZE = {name: data.batch_size for name, data in DATA.items()}


def make(
    name: str,
    *,
    generated: bool,
    vocab_size: int,
    max_length: int,
    warmup: int,
    steps: int,
    batch_size: int | None = None,
) -> Workload:
    """Examples for `warmup` + `steps` optimizer steps that stand for the whole of data set `name`.

    They are generated too where the vocabulary is too small for the real texts' tokens.
    """
    generated = generated or vocab_size < MERGES
    every = _generate(DATA[name], vocab_size) if generated else _tokenize(name)
    fitting = [example for example in every if example.longest <= max_length]
    batch_size = batch_size or BATCH_SIZE[name]
    population = statistics(fitting)
    population["padded_tokens"] = _expected_padding(fitting, batch_size, max_length)
    chosen = [
        example
        for count in (warmup, steps)
        for example in _representative(fitting, count, batch_size, max_length, population["padded_tokens"])
    ]
    label = f"{name} (generated)" if generated else name
    return Workload(label, batch_size, warmup, max_length, chosen, population)


def statistics(examples: Sequence[Example]) -> dict[str, float]:
    """Means per example, and medians of the parts; `median_rejected` only where there are pairs."""
    medians = {
        f"median_{part}": float(np.median([len(example.completions[index]) for example in examples]))
        for index, part in enumerate(("chosen", "rejected")[: len(examples[0].completions)])
    }
    return {
        "examples": len(examples),
        "shared_tokens": float(np.mean([example.shared_tokens for example in examples])),
        "scored_tokens": float(np.mean([example.scored_tokens for example in examples])),
        "mismatched_tokens": float(np.mean([len(example.mismatched) for example in examples])),
        "median_prompt": float(np.median([len(example.prompt) for example in examples])),
        **medians,
        "longest": max(example.longest for example in examples),
    }


def padded_tokens(examples: Sequence[Example], batch_size: int) -> float:
    """Tokens per example of batches padded to their longest sequence, a row a completion.

    Mismatched completions make rows of a batch of their own.
    """
    total = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        total += sum(len(each.completions) for each in batch) * max(each.longest for each in batch)
        if batch[0].mismatched:
            total += len(batch) * max(len(each.prompt) + len(each.mismatched) for each in batch)
    return total / len(examples)


def waste(examples: Sequence[Example], batch_size: int) -> dict[str, float]:
    """Shares of a padded trainer's tokens that are padding, and that are a prompt once more."""
    padded = padded_tokens(examples, batch_size) * len(examples)
    once = sum(example.shared_tokens + len(example.mismatched) for example in examples)
    rows = sum(sum(len(example.prompt) + len(each) for each in _sequences(example)) for example in examples)
    return {"padding": 1 - rows / padded, "repeated_prompts": (rows - once) / padded}


def _sequences(example: Example) -> Iterable[list[int]]:
    return [*example.completions, *([example.mismatched] if example.mismatched else [])]


def _expected_padding(examples: Sequence[Example], batch_size: int, max_length: int) -> float:
    rng = np.random.default_rng(0)
    shuffles = (_mismatch(_shuffled(examples, rng), batch_size, max_length) for _ in range(50))
    return float(np.mean([padded_tokens(order, batch_size) for order in shuffles]))


def _representative(
    examples: Sequence[Example], steps: int, batch_size: int, max_length: int, padding: float
) -> list[Example]:
    count = steps * batch_size
    if not count:
        return []
    by_length = sorted(examples, key=lambda example: (example.shared_tokens, example.prompt))
    chosen = [by_length[(2 * index + 1) * len(by_length) // (2 * count)] for index in range(count)]
    rng = np.random.default_rng(0)
    orders = [_mismatch(_shuffled(chosen, rng), batch_size, max_length) for _ in range(200)]
    return min(orders, key=lambda order: abs(padded_tokens(order, batch_size) - padding))


def _mismatch(examples: Sequence[Example], batch_size: int, max_length: int) -> list[Example]:
    """Give each labelled completion the one before it in its batch, as TRL does, cut to `max_length`."""
    if examples[0].desirable is None:
        return list(examples)
    return [
        replace(example, mismatched=other.completions[0][: max_length - len(example.prompt)])
        for start in range(0, len(examples), batch_size)
        for example, other in _with_previous(examples[start : start + batch_size])
    ]


def _with_previous(batch: Sequence[Example]) -> Iterable[tuple[Example, Example]]:
    return zip(batch, [batch[-1], *batch[:-1]], strict=True)


def _shuffled(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    return [examples[index] for index in rng.permutation(len(examples))]


def _generate(data: DataSet, vocab_size: int, count: int = 1000) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(median: int, spread: float) -> list[int]:
        length = max(2, round(median * float(np.exp(spread * rng.standard_normal()))))
        drawn: npt.NDArray[np.int64] = rng.integers(1, vocab_size, length)
        return [int(token) for token in drawn]

    def example(index: int) -> Example:
        completions = [[*ids(*lengths)[:-1], END_OF_TURN] for lengths in data.completions]
        return Example(ids(*data.prompt), completions, index % 2 == 0 if len(completions) == 1 else None)

    return [example(index) for index in range(count)]


def _tokenize(name: str) -> list[Example]:
    return [Example(*texts.token_ids(text), text.desirable) for text in texts.read(name)]
