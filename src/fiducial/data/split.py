"""Which groups train and which are held out: exact duplicates, and a validation split that does not leak."""

import hashlib

import numpy as np

from fiducial.data.dataset import Indices, TokenizedDataset
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError


def first_occurrences(dataset: TokenizedDataset) -> Indices:
    """Indices of the items whose tokens, with the same labels or scores, no earlier item has."""
    seen: set[tuple[tuple[str, ...], bytes]] = set()
    kept: list[int] = []
    for index in range(len(dataset)):
        group = dataset[index]
        content = group.keys, np.array(group.scores).tobytes()
        if content not in seen:
            seen.add(content)
            kept.append(index)
    return np.array(kept, dtype=np.int64)


def hold_out(dataset: TokenizedDataset, size: float, *, seed: int) -> tuple[Indices, Indices]:
    """Indices to train on and to evaluate on; `size` below 1 is a share, from 1 a number of items.

    Whole prompts are drawn, in an order that `seed` alone decides: all items with the same prompt stand on
    one side, so no completion is ever both trained on and evaluated. A prompt with more items than are still
    wanted is passed over.

    Raises:
        DataError: nothing would be left to train on, or nothing can be held out.
    """
    wanted = round(size * len(dataset)) if size < 1 else int(size)
    if not 0 < wanted < len(dataset):
        raise DataError(
            f"val_set_size: {size:g} of {len(dataset)} rows is {wanted} rows to hold out, which must be at "
            f"least 1 and leave at least 1 to train on."
        )
    by_prompt: dict[bytes, list[int]] = {}
    for index in range(len(dataset)):
        by_prompt.setdefault(prompt_key(dataset[index]), []).append(index)
    held_out: list[int] = []
    prompts = list(by_prompt.values())
    for number in np.random.default_rng(seed).permutation(len(prompts)):
        if len(held_out) + len(prompts[number]) <= wanted:
            held_out += prompts[number]
    if not held_out:
        raise DataError(
            f"val_set_size: {wanted} rows cannot be held out without a prompt on both sides: every prompt "
            f"has more rows than that. Raise it, or name test_datasets."
        )
    evaluation = np.array(sorted(held_out), dtype=np.int64)
    return np.setdiff1d(np.arange(len(dataset)), evaluation), evaluation


def shared_prompts(train: TokenizedDataset, evaluation: TokenizedDataset) -> int:
    """How many evaluation items have a prompt that is also trained on."""
    trained = prompt_keys(train)
    return sum(prompt_key(evaluation[index]) in trained for index in range(len(evaluation)))


def contents(dataset: TokenizedDataset) -> str:
    """A hash of what the items hold, whatever their order."""
    keys = sorted("".join(dataset[index].keys) for index in range(len(dataset)))
    return hashlib.blake2b("\n".join(keys).encode(), digest_size=16).hexdigest()


def in_order(dataset: TokenizedDataset) -> str:
    """A hash of what the items hold and of their order, quick also for a million of them."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (dataset.tokens, dataset.bounds, dataset.starts, dataset.order, dataset.scores):
        if array is not None:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def prompt_keys(dataset: TokenizedDataset) -> frozenset[bytes]:
    """The keys of all prompts."""
    return frozenset(prompt_key(dataset[index]) for index in range(len(dataset)))


def prompt_key(group: TokenizedGroup) -> bytes:
    """Equal for equal prompts, and short enough to keep many."""
    return hashlib.blake2b(group.prompt.tobytes(), digest_size=16).digest()
