"""Do all processes see one cache? Asked before a pass at whose end they would miss each other's records."""

import secrets
import time

from fiducial.agreement import all_or_none
from fiducial.errors import CacheError
from fiducial.processes import from_first, num_processes, rank
from fiducial.reference.cache.store import LogpStore

PATIENCE_SECONDS = 10.0
"""How long a network disk may take to show one machine what another has written."""


def require_one_folder(store: LogpStore) -> None:
    """Look in every process for a file that the first one has written. A collective call.

    Raises:
        CacheError: It is not there: the processes are on several machines, and keep their records on
            different disks.
    """
    if num_processes() == 1 or store.is_mirror:
        return
    mark = from_first(lambda: _written(store))
    try:
        with all_or_none():
            if not _appears(store, mark):
                raise CacheError(
                    f"{store.home} is another folder here than in the first process, so reference log-probs "
                    "that another process scores would not be found. Nothing has been scored. Name a folder "
                    "that every machine sees as reference.cache."
                )
    finally:
        if rank() == 0:
            store.remove(mark)


def _written(store: LogpStore) -> str:
    name = f"mark-{secrets.token_hex(4)}"
    store.write(name, b"")
    return name


def _appears(store: LogpStore, name: str) -> bool:
    limit = time.monotonic() + PATIENCE_SECONDS
    while not store.holds(name):
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True
