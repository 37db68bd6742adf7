"""Records whose checksums are right and whose numbers are wrong are found, named, and scored again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from fiducial.data.batch import PackedBatch
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import TokenLogps
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.fill import fill
from fiducial.reference.identity import Identity
from fiducial.reference.sources import InitialPolicy
from fiducial.reference.spot_check import spot_check
from tiny import random_groups, tiny_model

IDENTITY = Identity("base", "0", "float32", "None")
GROUPS = random_groups(6)


def scored_by(seed: int, folder: Path, groups: list[TokenizedGroup] = GROUPS) -> LogpStore:
    scorer = Scorer(tiny_model(seed=seed), layout="padded")
    store = LogpStore(folder, IDENTITY)
    score_reference(groups, InitialPolicy(scorer), scorer, store, token_budget=300)
    return LogpStore(folder, IDENTITY)


def policy() -> Scorer:
    return Scorer(tiny_model(), layout="padded")


def test_true_records_pass_within_rounding(tmp_path: Path) -> None:
    store, scorer = scored_by(0, tmp_path), policy()
    found = spot_check(GROUPS, InitialPolicy(scorer), scorer, store, seed=0)
    assert found.completions == 8
    assert found.max_difference <= found.tolerance < 1e-3
    assert found.distrusted == ()
    assert len(store) == 12


def test_an_empty_store_costs_nothing(tmp_path: Path) -> None:
    scorer = policy()

    class Never:
        def token_logps(self, batch):
            raise AssertionError("there is nothing to compare with")

    assert spot_check(GROUPS, Never(), scorer, LogpStore(tmp_path, IDENTITY)).completions == 0


def test_another_model_s_numbers_are_found_and_their_file_is_not_used(tmp_path: Path) -> None:
    scored_by(0, tmp_path, GROUPS[:3])
    store, scorer = scored_by(1, tmp_path, GROUPS), policy()
    wrong = store.origin(GROUPS[5].keys[0])
    found = spot_check(GROUPS, InitialPolicy(scorer), scorer, store, seed=0)
    assert found.distrusted == (wrong,)
    assert [store.missing(group) is None for group in GROUPS] == [True] * 3 + [False] * 3
    assert len(LogpStore(tmp_path, IDENTITY)) == 6, "it is set aside for every run"


def test_a_small_shift_of_one_token_is_no_rounding(tmp_path: Path) -> None:
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()
    true = scored_by(0, tmp_path / "true")
    for group in GROUPS:
        for key in group.keys:
            shifted = true.get(key).copy()
            shifted[-1] += 1e-3
            store.put(key, shifted, group)
    store.flush()
    assert len(spot_check(GROUPS, InitialPolicy(scorer), scorer, store).distrusted) == 1


def test_every_wrong_file_is_found_though_a_few_groups_are_looked_at(tmp_path: Path) -> None:
    for group in GROUPS:
        scored_by(1, tmp_path, [group])
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()
    found = spot_check(GROUPS, InitialPolicy(scorer), scorer, store)
    assert (len(found.distrusted), len(store)) == (6, 0)
    assert (found.completions, found.max_difference) == (0, 0), "what is not used says nothing of what is"


def test_it_is_the_file_of_each_record_that_is_distrusted(tmp_path: Path) -> None:
    firsts = [TokenizedGroup(group.prompt, group.completions[:1]) for group in GROUPS]
    scored_by(0, tmp_path, firsts)
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()
    found = spot_check(GROUPS, InitialPolicy(scorer), scorer, store)
    assert (found.completions, found.distrusted) == (4, ()), "of groups with some records these are compared"
    [right] = store.folder.glob("*.arrow")
    scored_by(1, tmp_path, GROUPS)
    store = LogpStore(tmp_path, IDENTITY)
    found = spot_check(GROUPS, InitialPolicy(scorer), scorer, store)
    assert [path == right for path in found.distrusted] == [False]


def test_any_group_may_be_looked_at(tmp_path: Path) -> None:
    scored_by(0, tmp_path, GROUPS[:5])
    scored_by(1, tmp_path, GROUPS[5:])
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()
    checks = (spot_check(GROUPS, InitialPolicy(scorer), scorer, store, seed=seed) for seed in range(20))
    assert any(found.distrusted for found in checks)


def test_a_record_of_another_length_is_wrong(tmp_path: Path) -> None:
    true, store, scorer = scored_by(0, tmp_path / "true"), LogpStore(tmp_path, IDENTITY), policy()
    for group in GROUPS:
        for key in group.keys:
            store.put(key, np.append(true.get(key), np.float32(-1)))
    store.flush()
    assert spot_check(GROUPS, InitialPolicy(scorer), scorer, store).distrusted


def test_what_changes_with_the_shape_of_a_pass_is_rounding(tmp_path: Path) -> None:
    scored_by(0, tmp_path)
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()

    class DependsOnShape:
        def token_logps(self, batch: PackedBatch) -> TokenLogps:
            logps = InitialPolicy(scorer).token_logps(batch)
            return replace(logps, values=logps.values + 1e-3 * batch.num_sequences)

    found = spot_check(GROUPS, DependsOnShape(), scorer, store)
    assert found.distrusted == ()
    assert found.tolerance == pytest.approx(4e-3, rel=0.1)


def test_records_cut_short_are_compared_too(tmp_path: Path) -> None:
    scored_by(0, tmp_path)
    cut = [TokenizedGroup(group.prompt, tuple(c[:2] for c in group.completions)) for group in GROUPS]
    store, scorer = LogpStore(tmp_path, IDENTITY), policy()
    found = spot_check(cut, InitialPolicy(scorer), scorer, store)
    assert found.completions == 8
    assert found.distrusted == ()


def test_filling_scores_again_what_was_wrong_and_says_so(tmp_path: Path) -> None:
    scorer, console = policy(), Console(record=True, width=200, force_terminal=False)
    store = scored_by(1, tmp_path)
    fill(
        store,
        {"training": GROUPS},
        InitialPolicy(scorer),
        scorer,
        token_budget=300,
        console=console,
    )
    said = console.export_text()
    assert "does not hold what this reference answers" in said
    assert "12 completions scored" in said
    true = scored_by(0, tmp_path / "true")
    for group in GROUPS:
        for key in group.keys:
            np.testing.assert_allclose(store.get(key), true.get(key), atol=1e-5)
    fill(store, {"training": GROUPS}, InitialPolicy(scorer), scorer, token_budget=300, console=console)
    assert "known from an earlier run; 8 records scored again" in console.export_text()


def test_a_file_that_fails_for_one_dataset_is_not_missed_by_another(tmp_path: Path) -> None:
    scorer, console = policy(), Console(quiet=True)
    scored_by(0, tmp_path, GROUPS[:3])
    scored_by(1, tmp_path, GROUPS)
    store = LogpStore(tmp_path, IDENTITY)
    cut = [TokenizedGroup(group.prompt, tuple(c[:2] for c in group.completions)) for group in GROUPS[:3]]
    datasets = {"training": cut, "held-out": GROUPS[3:]}
    fill(store, datasets, InitialPolicy(scorer), scorer, token_budget=300, console=console)
    assert all(
        store.get(key) is not None for groups in datasets.values() for group in groups for key in group.keys
    )


def test_half_precision_is_given_its_rounding(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    scorer = Scorer(model, layout="padded")
    store = LogpStore(tmp_path, IDENTITY)
    score_reference(GROUPS, InitialPolicy(scorer), scorer, store, token_budget=300)
    again = spot_check(GROUPS, InitialPolicy(scorer), scorer, LogpStore(tmp_path, IDENTITY))
    assert again.tolerance >= 5e-2
    assert again.distrusted == ()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert spot_check(GROUPS, InitialPolicy(scorer), scorer, LogpStore(tmp_path, IDENTITY)).distrusted
