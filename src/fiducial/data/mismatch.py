"""Mismatched completions: each prompt with a completion that answers another one.

KTO estimates how far the policy has moved from its reference on pairs (x, y') that do not belong together
(Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, §4.1). Here y' is fixed before training: items are
put into an order that a hash of their content draws, equal prompts next to each other, and each takes the
completion of the item so many places on that no equal prompts meet, if that can be. So

- every completion is somebody's y' exactly once;
- neither the data's order, the seed nor the batch size changes who gets which, and a batch of one will do;
- the reference's log-probs of (x, y') can be scored once and kept, like those of any completion; of appended
  items those are new, and the few that stand before them in the order.
"""

from collections import Counter

import numpy as np

from fiducial.data.dataset import Indices, TokenizedDataset, from_groups
from fiducial.data.split import prompt_key
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError


def add_mismatched(dataset: TokenizedDataset, *, sequence_len: int, where: str) -> TokenizedDataset:
    """Items (x, (y,)) as (x, (y, y')); y' is cut where x + y' has more than `sequence_len` tokens.

    Args:
        dataset: items with one completion each, none longer than `sequence_len` with its prompt.
        sequence_len: most tokens of prompt + completion.
        where: what the items are, for the message.

    Raises:
        DataError: all items have the same prompt.
    """
    partners = derange(dataset, where=where)
    return from_groups(
        _with(dataset[index], dataset[int(partner)], sequence_len) for index, partner in enumerate(partners)
    )


def derange(dataset: TokenizedDataset, *, where: str) -> Indices:
    """For each item the index of the one whose completion it is given: a permutation without a fixed point.

    Two items with one prompt meet only where more than half of all items have that prompt, and then as few
    times as in any permutation.

    Raises:
        DataError: all items have the same prompt.
    """
    groups = [dataset[index] for index in range(len(dataset))]
    prompts = [prompt_key(group) for group in groups]
    blocks = Counter(prompts)
    if len(blocks) < 2:
        raise DataError(
            f"{where}: all {len(groups)} completions answer one prompt, and kto needs the answer to another "
            f"beside each. Give more prompts, or write kto_loss_type: apo_zero_unpaired."
        )
    places = sorted(range(len(groups)), key=lambda index: (prompts[index], groups[index].keys))
    # Equal prompts stand together, so a step as long as the longest run of them leads out of every run.
    partners = np.empty(len(groups), dtype=np.int64)
    partners[places] = np.roll(places, -max(blocks.values()))
    return partners


def _with(group: TokenizedGroup, other: TokenizedGroup, sequence_len: int) -> TokenizedGroup:
    mismatched = other.completions[0][: sequence_len - len(group.prompt)]
    return TokenizedGroup(group.prompt, (*group.completions, mismatched), (*group.scores, float("nan")))
