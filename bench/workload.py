"""The pairs that contestants train on: token ids, in one fixed order.

Three sources. `long` (chat pairs with long answers) and `hh` (multi-turn pairs with short answers) come from
`../shared/data`; `generated` draws random tokens with the lengths of either. A whole data set takes hours on
a CPU, so a few pairs stand for it: equally spaced quantiles of the pairs' lengths, dealt into batches in the
order whose padding comes closest to what random batches of the whole set have, since padding is what a padded
trainer pays for.

Tokens: byte-level BPE with 16 000 merges trained on the texts themselves, which gives the lengths a general
tokenizer twice as large gives.
"""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
MERGES = 16_000
END_OF_TURN = 0
"""Token id that ends every completion."""

Text = tuple[str, str, str]


@dataclass(frozen=True)
class Pair:
    """Token ids of one prompt and its two completions."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def shared_tokens(self) -> int:
        """Real tokens, the prompt counted once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def scored_tokens(self) -> int:
        """Tokens whose log-prob is needed."""
        return len(self.chosen) + len(self.rejected)

    @property
    def visible_keys(self) -> int:
        """Keys seen by all queries of the pair together, the prompt's queries counted once."""
        prompt, chosen, rejected = len(self.prompt), len(self.chosen), len(self.rejected)
        first = prompt + chosen
        return first * (first + 1) // 2 + rejected * prompt + rejected * (rejected + 1) // 2

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Workload:
    """Pairs in training order: `warmup` steps that are not measured, then the measured ones."""

    name: str
    batch_size: int
    warmup: int
    max_length: int
    pairs: list[Pair]
    population: dict[str, float]
    """The same length statistics for the data set the pairs stand for."""

    @property
    def steps(self) -> int:
        """Optimizer steps, warm-up included."""
        return len(self.pairs) // self.batch_size

    @property
    def measured(self) -> list[Pair]:
        """The pairs of the measured steps."""
        return self.pairs[self.warmup * self.batch_size :]

    def save(self, path: Path) -> None:
        """Write as JSON, for the processes that measure."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Workload":
        """Read what `save` wrote."""
        raw = json.loads(path.read_text())
        return cls(**(raw | {"pairs": [Pair(**pair) for pair in raw["pairs"]]}))


@dataclass(frozen=True)
class Lengths:
    """Log-normal lengths: median and spread (standard deviation of the logarithm) of each part."""

    prompt: tuple[int, float]
    chosen: tuple[int, float]
    rejected: tuple[int, float]


BATCH_SIZE = {"long": 4, "hh": 8}
GENERATED = {
    "long": Lengths((186, 1.13), (320, 0.92), (340, 0.76)),
    "hh": Lengths((96, 0.75), (27, 1.0), (36, 0.91)),
}
"""Fitted to the two real sets."""


def available() -> bool:
    """Whether the real pairs are there."""
    return SHARED_DATA.is_dir()


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
    """Pairs for `warmup` + `steps` optimizer steps that stand for the whole of data set `name`."""
    pairs = _generate(GENERATED[name], vocab_size) if generated else _tokenize(READERS[name]())
    pairs = [pair for pair in pairs if pair.longest <= max_length]
    batch_size = batch_size or BATCH_SIZE[name]
    population = statistics(pairs)
    population["padded_tokens"] = _expected_padding(pairs, batch_size)
    measured = _representative(pairs, steps * batch_size, batch_size, population["padded_tokens"])
    warm = _representative(pairs, warmup * batch_size, batch_size, population["padded_tokens"])
    label = f"{name} (generated)" if generated else name
    return Workload(label, batch_size, warmup, max_length, warm + measured, population)


def statistics(pairs: Sequence[Pair]) -> dict[str, float]:
    """Means per pair and medians of the parts."""
    return {
        "pairs": len(pairs),
        "shared_tokens": float(np.mean([pair.shared_tokens for pair in pairs])),
        "scored_tokens": float(np.mean([pair.scored_tokens for pair in pairs])),
        "median_prompt": float(np.median([len(pair.prompt) for pair in pairs])),
        "median_chosen": float(np.median([len(pair.chosen) for pair in pairs])),
        "median_rejected": float(np.median([len(pair.rejected) for pair in pairs])),
        "longest": max(pair.longest for pair in pairs),
    }


def padded_tokens(pairs: Sequence[Pair], batch_size: int) -> float:
    """Tokens per pair of batches padded to their longest sequence, two rows a pair."""
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    total = sum(2 * len(batch) * max(pair.longest for pair in batch) for batch in batches)
    return total / len(pairs)


def _expected_padding(pairs: Sequence[Pair], batch_size: int) -> float:
    rng = np.random.default_rng(0)
    shuffles = (_shuffled(pairs, rng) for _ in range(50))
    return float(np.mean([padded_tokens(order, batch_size) for order in shuffles]))


def _representative(pairs: Sequence[Pair], count: int, batch_size: int, padding: float) -> list[Pair]:
    by_length = sorted(pairs, key=lambda pair: (pair.shared_tokens, pair.prompt))
    chosen = [by_length[(2 * index + 1) * len(by_length) // (2 * count)] for index in range(count)]
    rng = np.random.default_rng(0)
    orders = [_shuffled(chosen, rng) for _ in range(200)]
    return min(orders, key=lambda order: abs(padded_tokens(order, batch_size) - padding)) if count else []


def _shuffled(pairs: Sequence[Pair], rng: np.random.Generator) -> list[Pair]:
    return [pairs[index] for index in rng.permutation(len(pairs))]


def _generate(lengths: Lengths, vocab_size: int, count: int = 1000) -> list[Pair]:
    rng = np.random.default_rng(0)

    def ids(median: int, spread: float) -> list[int]:
        length = max(2, round(median * float(np.exp(spread * rng.standard_normal()))))
        drawn: npt.NDArray[np.int64] = rng.integers(1, vocab_size, length)
        return [int(token) for token in drawn]

    def pair() -> Pair:
        chosen, rejected = ids(*lengths.chosen), ids(*lengths.rejected)
        return Pair(ids(*lengths.prompt), [*chosen[:-1], END_OF_TURN], [*rejected[:-1], END_OF_TURN])

    return [pair() for _ in range(count)]


def _tokenize(texts: Sequence[Text]) -> list[Pair]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MERGES,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (part for read in READERS.values() for text in read() for part in text), trainer
    )

    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    return [
        Pair(ids(prompt), [*ids(chosen), END_OF_TURN], [*ids(rejected), END_OF_TURN])
        for prompt, chosen, rejected in texts
    ]


def _read_long() -> list[Text]:
    rows = json.loads((SHARED_DATA / "dpo_en_demo.json").read_text())
    return [
        (
            "".join(f"{turn['from']}: {turn['value']}\n" for turn in row["conversations"]),
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for row in rows
    ]


def _read_hh() -> list[Text]:
    """Transcripts whose last assistant turn differs; the few whose prompts differ are left out."""
    with gzip.open(SHARED_DATA / "hh_harmless_test.jsonl.gz", "rt") as lines:
        rows = [_split_hh(json.loads(line)) for line in lines]
    return [row for row in rows if row is not None]


def _split_hh(row: dict[str, Any]) -> Text | None:
    marker = "\n\nAssistant:"
    prompts, answers = zip(*(row[side].rsplit(marker, 1) for side in ("chosen", "rejected")), strict=True)
    if prompts[0] != prompts[1] or "" in answers:
        return None
    return prompts[0] + marker, answers[0], answers[1]


READERS: dict[str, Callable[[], list[Text]]] = {"long": _read_long, "hh": _read_hh}
