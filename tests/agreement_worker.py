"""Two processes, started by torchrun: one fails in one round, and both write how each round ended."""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from fiducial.agreement import all_or_none
from fiducial.data.batch import PackedBatch
from fiducial.errors import CacheError, TrainingError
from fiducial.logps import TokenLogps
from fiducial.model.scoring import Scorer
from fiducial.processes import from_first
from fiducial.reference.cache import LogpStore, one_folder, score_reference
from fiducial.reference.identity import Identity
from fiducial.reference.sources import InitialPolicy
from fiducial.reference.verify import check_unmoved, prove_reference
from tiny import random_groups, tiny_model

FAILURES = {
    "nobody": {},
    "user": {1: TrainingError("log-probs are not finite")},
    "disk": {1: OSError(errno.ENOSPC, "No space left on device")},
    "memory": {1: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")},
    "both": {0: TrainingError("first"), 1: TrainingError("second")},
}


def refuse() -> None:
    raise CacheError("there is nowhere to write")


class FailsIn:
    """A reference whose log-probs are not finite in one process."""

    def __init__(self, rank: int, scorer: Scorer) -> None:
        self.rank, self.scorer = rank, scorer

    def token_logps(self, batch: PackedBatch) -> TokenLogps:
        logps = InitialPolicy(self.scorer).token_logps(batch)
        return replace(logps, values=logps.values * torch.nan) if dist.get_rank() == self.rank else logps


def score(folder: Path, *, failing: int | None) -> int:
    """A scoring pass that fails in one process, if any; how many completions it scored."""
    scorer = Scorer(tiny_model(), layout="packed")
    store = LogpStore(folder, Identity("base", "0", "float32", "None"))
    reference = InitialPolicy(scorer) if failing is None else FailsIn(failing, scorer)
    return score_reference(random_groups(6), reference, scorer, store, token_budget=40)


def look_for_a_move(*, failing: int) -> None:
    """The proof's reference, which answers otherwise now in one process."""
    scorer = Scorer(tiny_model(), layout="packed")
    groups = random_groups(2)
    proof = prove_reference(scorer, InitialPolicy(scorer), groups, expected_equal=True)
    if dist.get_rank() == failing:
        proof = replace(proof, reference_logps=proof.reference_logps + 1)
    check_unmoved(proof, scorer, InitialPolicy(scorer), groups)


if __name__ == "__main__":
    one_folder.PATIENCE_SECONDS = 0.5
    dist.init_process_group("gloo")
    ended = {}
    for name, failures in FAILURES.items():
        try:
            with all_or_none():
                if dist.get_rank() in failures:
                    raise failures[dist.get_rank()]
            ended[name] = None
        except (TrainingError, OSError, RuntimeError) as error:
            ended[name] = [type(error).__name__, str(error)]
    try:
        from_first(refuse)
    except CacheError as error:
        ended["first"] = str(error)
    ended["scored"] = score(Path(sys.argv[1], "good"), failing=None)
    try:
        score(Path(sys.argv[1], "records"), failing=1)
    except TrainingError as error:
        ended["scoring"] = str(error)
    try:
        score(Path(sys.argv[1], f"disk-{dist.get_rank()}"), failing=0)
    except (CacheError, TrainingError) as error:
        ended["disks"] = [type(error).__name__, str(error)]
    try:
        look_for_a_move(failing=1)
    except TrainingError as error:
        ended["moved"] = str(error)
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(ended), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
