"""Both layouts hold the same scored tokens, each predicted from what stands before it in its sequence."""

from itertools import pairwise

import pytest
import torch

from fiducial.data.batch import PackedBatch, pack
from fiducial.data.tokenize import TokenizedGroup
from tiny import random_groups

CASES = [(count, completions, seed) for count in (1, 2, 5) for completions in (1, 2, 3) for seed in (0, 1)]


def prefixes(batch: PackedBatch) -> list[list[int]]:
    """For each scored token, the ids its source position may look at, itself included."""
    flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    length = batch.input_ids.shape[1]
    seen = []
    for source in batch.source.tolist():
        if batch.segments is None:
            visible = list(range(source - source % length, source + 1))
        else:
            [segment] = [each for each in batch.segments if each.start <= source < each.stop]
            visible = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, source + 1)]
        assert flat_positions[visible].tolist() == list(range(len(visible)))
        seen.append(flat_ids[visible].tolist())
    return seen


def expected(groups: list[TokenizedGroup]) -> list[tuple[int, int, list[int]]]:
    """(sequence, target, everything before the target), one completion after the other."""
    wholes = [
        (len(group.prompt), [*group.prompt.tolist(), *completion.tolist()])
        for group in groups
        for completion in group.completions
    ]
    return [
        (sequence, whole[place], whole[:place])
        for sequence, (start, whole) in enumerate(wholes)
        for place in range(start, len(whole))
    ]


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(("count", "completions", "seed"), CASES)
def test_every_token_is_predicted_from_its_own_sequence(
    layout: str, count: int, completions: int, seed: int
) -> None:
    groups = random_groups(count, seed=seed, completions=completions)
    batch = pack(groups, layout=layout, pad_token_id=258)
    found = zip(batch.sequence.tolist(), batch.target.tolist(), prefixes(batch), strict=True)
    assert list(found) == expected(groups)
    assert batch.num_sequences == count * completions
    assert batch.keys == tuple(key for group in groups for key in group.keys)


@pytest.mark.parametrize(("count", "completions", "seed"), CASES)
def test_layouts_agree(count: int, completions: int, seed: int) -> None:
    groups = random_groups(count, seed=seed, completions=completions)
    packed, padded = (pack(groups, layout=layout, pad_token_id=258) for layout in ("packed", "padded"))
    assert torch.equal(packed.target, padded.target)
    assert torch.equal(packed.sequence, padded.sequence)
    assert packed.input_ids.numel() == sum(group.num_tokens for group in groups)
    assert padded.attention_mask is not None
    assert padded.attention_mask.sum() == sum(
        len(group.prompt) + len(completion) for group in groups for completion in group.completions
    )
    assert (padded.input_ids[padded.attention_mask == 0] == 258).all()


@pytest.mark.parametrize("completions", [1, 2, 3])
def test_segments_tile_the_row(completions: int) -> None:
    batch = pack(random_groups(4, completions=completions), layout="packed")
    assert batch.segments is not None
    assert batch.segments[0].start == 0
    assert batch.segments[-1].stop == batch.input_ids.shape[1]
    assert all(left.stop == right.start for left, right in pairwise(batch.segments))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_without_groups_nothing_is_scored(layout: str) -> None:
    batch = pack([], layout=layout, pad_token_id=258)
    assert batch.input_ids.tolist() == [[258]]
    assert batch.position_ids.shape == (1, 1)
    assert batch.source.numel() == batch.target.numel() == batch.sequence.numel() == 0
    assert batch.num_sequences == 0
    assert batch.attention_mask is None or batch.attention_mask.all(), "attention to nothing is not a number"


def test_where_the_data_has_no_scores_none_is_made_up() -> None:
    (scored,) = random_groups(1, seed=1)
    scored = TokenizedGroup(scored.prompt, scored.completions, (2.0, -0.5))
    score = pack([*random_groups(1), scored], layout="packed").completions.score
    assert score.isnan().tolist() == [True, True, False, False]
    assert score[2:].tolist() == [2.0, -0.5]


def test_a_shifted_source_is_noticed() -> None:
    """The check above has teeth: predicting a completion's first token from its own position fails it."""
    groups = random_groups(2, completions=2)
    batch = pack(groups, layout="packed")
    wrong = batch.source.clone()
    wrong[0] += 1
    broken = PackedBatch(
        batch.input_ids,
        batch.position_ids,
        None,
        batch.segments,
        wrong,
        batch.target,
        batch.sequence,
        batch.groups,
    )
    assert prefixes(broken)[0] != expected(groups)[0][2]


def test_moving_a_batch_keeps_what_is_no_tensor() -> None:
    batch = pack(random_groups(2), layout="packed")
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.target.device.type == "meta"
    assert moved.segments == batch.segments
    assert moved.groups is batch.groups
