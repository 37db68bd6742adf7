"""Do the records still say what the reference says? A few of them are scored again before they are used.

An identity promises equal answers. What can break the promise and no checksum sees: records that were written
by something else, other hardware, other libraries. More than rounding apart, a file of records is not used
again, and everything in it is scored anew.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.scoring import Scorer
from fiducial.processes import from_first
from fiducial.reference.cache.passes import Groups
from fiducial.reference.cache.scoring import ScoringReference
from fiducial.reference.cache.store import LogpStore
from fiducial.reference.noise import ALLOWANCE, NOISE_FACTOR, SERVED_ALLOWANCE
from fiducial.reference.sources import Served

GROUPS_CHECKED = 4

_Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """How records compare with the reference that is said to have made them, in nats a token."""

    completions: int
    max_difference: float
    tolerance: float
    distrusted: tuple[Path, ...]
    """Files whose records differ by more, and are not used."""


def spot_check(
    groups: Groups,
    reference: ScoringReference,
    scorer: Scorer,
    store: LogpStore,
    *,
    seed: int | None = None,
) -> SpotCheck:
    """Score the records of a few random groups again, until none of those looked at differs.

    What a group's log-probs change by when its completions are scored alone counts as rounding, and so does
    the allowance of the scorer's precision, or that of a server.
    """
    rng = np.random.default_rng(seed)
    distrusted: list[Path] = []
    checked, largest = 0, 0.0
    noise = 0.0
    served = isinstance(reference, Served)
    floor = SERVED_ALLOWANCE if served else ALLOWANCE[scorer.autocast or scorer.model.dtype]
    while True:
        measured = from_first(lambda: list(_measure(_sample(groups, store, rng), reference, scorer, store)))
        noise = max([noise, *(each.noise for each in measured)])
        tolerance = max(NOISE_FACTOR * noise, floor)
        wrong = {each.path for each in measured if not each.difference <= tolerance}
        good = [each.difference for each in measured if each.path not in wrong]
        checked += len(good)
        largest = max([largest, *good])
        if not wrong:
            return SpotCheck(checked, largest, tolerance, tuple(distrusted))
        for path in sorted(wrong):
            store.distrust(path)
        distrusted += sorted(wrong)


@dataclass(frozen=True, slots=True)
class _Measured:
    path: Path
    difference: float
    noise: float


def _measure(
    sample: list[TokenizedGroup], reference: ScoringReference, scorer: Scorer, store: LogpStore
) -> Iterator[_Measured]:
    for group in sample:
        together = _score(group, reference, scorer)
        for number, (key, completion) in enumerate(zip(group.keys, group.completions, strict=True)):
            path, stored = store.origin(key), store.get(key)
            if path is None or stored is None:
                continue
            [alone] = _score(TokenizedGroup(group.prompt, (completion,)), reference, scorer)
            same_length = len(stored) == len(completion)
            difference = np.abs(stored - together[number]).max() if same_length else np.inf
            yield _Measured(path, float(difference), float(np.abs(alone - together[number]).max()))


def _score(group: TokenizedGroup, reference: ScoringReference, scorer: Scorer) -> list[_Values]:
    logps = reference.token_logps(scorer.pack([group]))
    assert logps is not None, "there is no reference to score"
    ends = np.cumsum([len(completion) for completion in group.completions])
    return np.split(logps.values.float().cpu().numpy(), ends[:-1])


def _sample(groups: Groups, store: LogpStore, rng: np.random.Generator) -> list[TokenizedGroup]:
    """A few groups that have a written record, drawn at random."""
    sample: list[TokenizedGroup] = []
    if not len(store):
        return sample
    for index in rng.permutation(len(groups)):
        group = groups[int(index)]
        lacking = store.missing(group)
        if lacking is None or len(lacking.completions) < len(group.completions):
            sample.append(group)
        if len(sample) == GROUPS_CHECKED:
            break
    return sample
