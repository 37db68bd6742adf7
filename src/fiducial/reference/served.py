"""Filling a store from a server: every completion without a record is asked for, several at a time.

What was answered is kept, whatever happens to the rest.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from fiducial.agreement import all_or_none
from fiducial.data.tokenize import TokenizedGroup
from fiducial.processes import barrier, in_all, num_processes, rank
from fiducial.reference.cache.one_folder import require_one_folder
from fiducial.reference.cache.passes import Groups, look_up, require_all
from fiducial.reference.cache.shards import Logps
from fiducial.reference.cache.store import LogpStore
from fiducial.reference.endpoint import Endpoint

AT_ONCE = 8
"""Requests under way; servers batch them."""
SIGN_OF_LIFE_SECONDS = 60.0
"""How often other processes hear of the one that asks: none waits for hours, which `ddp_timeout` ends."""


@dataclass(frozen=True, slots=True)
class _Asked:
    group: TokenizedGroup
    position: int


def ask_for_missing(
    groups: Groups,
    endpoint: Endpoint,
    store: LogpStore,
    *,
    flush_every: float,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Bring every completion of `groups` into `store`, and return how many were asked for here.

    The first process asks, the others read. `progress(done, total)` counts completions.

    Raises:
        ModelError: The server does not answer, or not for these tokens. What it answered is in the store.
        CacheError: Records cannot be written or read.
    """
    barrier()
    require_one_folder(store)
    asking = _ask(groups, endpoint, store, flush_every, progress) if rank() == 0 else iter(())
    asked, going = 0, True
    while going:
        with all_or_none():
            asked_so_far = next(asking, None)
        asked = asked if asked_so_far is None else asked_so_far
        going = in_all(int(asked_so_far is not None)) > 0
    store.reload()
    if num_processes() > 1:
        with all_or_none():
            require_all(groups, store)
    return asked


def _ask(
    groups: Groups,
    endpoint: Endpoint,
    store: LogpStore,
    flush_every: float,
    progress: Callable[[int, int], None] | None,
) -> Iterator[int]:
    """Ask for all that is missing, and say now and then, and at the end, how many have been answered."""
    parts = look_up(groups, store).parts
    total = sum(len(positions) for _, positions in parts)
    items = (_Asked(groups[index], position) for index, positions in parts for position in positions)
    done, written = 0, time.monotonic()
    told = written
    try:
        for item, logps in _answers(items, endpoint):
            store.put(item.group.keys[item.position], logps, item.group)
            done += 1
            if time.monotonic() - written > flush_every:
                store.flush()
                written = time.monotonic()
            if progress is not None:
                progress(done, total)
            if time.monotonic() - told > SIGN_OF_LIFE_SECONDS:
                yield done
                told = time.monotonic()
    finally:
        store.flush()
    yield done


def _answers(items: Iterator[_Asked], endpoint: Endpoint) -> Iterator[tuple[_Asked, Logps]]:
    """Answers as they come; when one fails those under way are still given out, and then it is raised."""
    under_way: dict[Future[Logps], _Asked] = {}
    failed: Exception | None = None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        exhausted = False
        while not exhausted or under_way:
            while not exhausted and failed is None and len(under_way) < 2 * AT_ONCE:
                item = next(items, None)
                if item is None:
                    exhausted = True
                else:
                    prompt, completion = item.group.prompt, item.group.completions[item.position]
                    under_way[pool.submit(endpoint.logps, prompt.tolist(), completion.tolist())] = item
            exhausted = exhausted or failed is not None
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                item = under_way.pop(future)
                if (error := future.exception()) is None:
                    yield item, future.result()
                elif isinstance(error, Exception):
                    failed = failed or error
                    for waiting in [each for each in under_way if each.cancel()]:
                        del under_way[waiting]
                else:
                    raise error
    if failed is not None:
        raise failed
