"""A live reference whose answers are kept: scored once, read afterwards, and never anything else."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import TrainingError
from fiducial.model.scoring import Scorer
from fiducial.reference import kept as kept_module
from fiducial.reference.cache import LogpStore
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.identity import Identity
from fiducial.reference.kept import Kept, measured, written_at_the_end
from fiducial.reference.sources import SeparateModel
from tiny import random_groups, tiny_model

IDENTITY = Identity("base", "0", "float32", "None")
GROUPS = random_groups(6)


class Counting:
    """A second model that counts what it is asked."""

    def __init__(self) -> None:
        self.inner = SeparateModel(Scorer(tiny_model(), layout="packed"))
        self.asked: list[tuple[str, ...]] = []

    def token_logps(self, batch):
        self.asked.append(batch.keys)
        return self.inner.token_logps(batch)


def kept(folder: Path, told: list[str] | None = None, **options: Any) -> tuple[Kept, Counting]:
    live, policy = Counting(), Scorer(tiny_model(seed=1), layout="packed")
    store = LogpStore(folder, IDENTITY)
    return Kept(live, policy, store, tell=[].append if told is None else told.append, **options), live


def ask(reference: Kept, groups: list[TokenizedGroup]) -> torch.Tensor:
    return reference.token_logps(reference.policy.pack(groups)).values


def test_a_row_is_scored_once_and_read_to_the_bit(tmp_path: Path) -> None:
    reference, live = kept(tmp_path)
    first = ask(reference, GROUPS[:3])
    alone = live.inner.token_logps(reference.policy.pack(GROUPS[:3])).values
    assert torch.equal(first, alone), "the pass is the one a live reference makes"
    assert torch.equal(ask(reference, GROUPS[:3]), first)
    assert live.asked == [tuple(key for group in GROUPS[:3] for key in group.keys)]
    reference.write()
    again, unasked = kept(tmp_path)
    assert torch.equal(ask(again, GROUPS[:3]), first)
    assert unasked.asked == []
    assert reference.scored == 6
    assert again.scored == 0


def test_only_what_is_new_is_scored(tmp_path: Path) -> None:
    reference, live = kept(tmp_path)
    before = ask(reference, GROUPS[:2])
    both = ask(reference, GROUPS[1:3])
    assert live.asked[1] == GROUPS[2].keys
    size = sum(map(len, GROUPS[1].completions))
    assert torch.equal(both[:size], before[-size:])
    expected = live.inner.token_logps(reference.policy.pack(GROUPS[1:3])).values
    torch.testing.assert_close(both, expected, atol=1e-4, rtol=0)
    swapped = ask(reference, [GROUPS[2], GROUPS[1]])
    assert swapped.shape != both.shape or (swapped - both).abs().max() > 0.1


def test_another_reference_s_records_are_not_read(tmp_path: Path) -> None:
    ask(reference := kept(tmp_path)[0], GROUPS)
    reference.write()
    live, policy = Counting(), Scorer(tiny_model(seed=1), layout="packed")
    other = LogpStore(tmp_path, Identity("base", "1", "float32", "None"))
    ask(Kept(live, policy, other, tell=print), GROUPS)
    assert len(live.asked) == 1


def test_it_is_written_on_the_way_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(kept_module.time, "monotonic", lambda: next(clock))
    reference, _ = kept(tmp_path, flush_seconds=10)
    found = []
    for group in GROUPS[:4]:
        ask(reference, [group])
        found.append(len(LogpStore(tmp_path, IDENTITY)))
    assert found[0] == 0
    assert 0 < found[-1] < 8
    with pytest.raises(KeyboardInterrupt), written_at_the_end(reference):
        raise KeyboardInterrupt
    assert len(LogpStore(tmp_path, IDENTITY)) == 8
    often, _ = kept(tmp_path / "often", flush_seconds=2)
    ask(often, GROUPS[:1])
    assert len(LogpStore(tmp_path / "often", IDENTITY)) == 2


def test_what_another_run_writes_meanwhile_is_read(tmp_path: Path) -> None:
    (first, _), (second, live) = kept(tmp_path), kept(tmp_path)
    ask(first, GROUPS)
    first.write()
    second.flush()
    assert len(second.store) == 0, "what is read stays as it is until others are looked at"
    second.write()
    ask(second, GROUPS)
    assert live.asked == []


def test_a_cache_that_cannot_be_written_costs_the_records_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    reference, live = kept(tmp_path, told)
    ask(reference, GROUPS[:2])
    reference.write()

    def full(self: RecordFolder, name: str, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordFolder, "write", full)
    for _ in range(2):
        values = ask(reference, GROUPS[2:])
        reference.write()
    assert torch.equal(values, live.inner.token_logps(reference.policy.pack(GROUPS[2:])).values)
    assert len(told) == 1
    assert "No space left" in told[0]
    assert "The run goes on" in told[0]
    assert len(reference.store) == 4, "what cannot be written is not heaped up in memory"
    asked = len(live.asked)
    ask(reference, GROUPS[:2])
    assert len(live.asked) == asked, "what was written before is read"


def test_log_probs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    reference, live = kept(tmp_path)
    torch.nn.init.constant_(live.inner.scorer.model.lm_head.weight, torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        ask(reference, GROUPS)
    assert len(reference.store) == 0


def test_the_reference_itself_is_what_is_measured(tmp_path: Path) -> None:
    reference, live = kept(tmp_path)
    assert measured(reference) is live
    assert measured(live) is live


def test_a_damaged_record_is_scored_again(tmp_path: Path) -> None:
    reference, _ = kept(tmp_path)
    values = ask(reference, GROUPS[:1])
    reference.write()
    [file] = reference.store.folder.glob("*.arrow")
    content = bytearray(file.read_bytes())
    at = content.index(np.float32(values[0].item()).tobytes())
    content[at + 2] ^= 4
    file.write_bytes(content)
    again, live = kept(tmp_path)
    torch.testing.assert_close(ask(again, GROUPS[:1]), values, atol=1e-4, rtol=0)
    assert live.asked == [GROUPS[0].keys[:1]]
