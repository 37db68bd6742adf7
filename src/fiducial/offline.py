"""Where the hub cannot be reached, a run called from Python keeps to its cache for as long as it lasts."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from fiducial import compat
from fiducial.config.schema import RunConfig
from fiducial.hub import out_of_reach, remembered
from fiducial.reference.fill import warn


@contextmanager
def kept_to_cache(cfg: RunConfig, console: Console | None = None) -> Iterator[None]:
    """Inside, what `cfg` names on the hub is read from the cache if the hub does not answer.

    Its client would otherwise try for minutes. `console` is told.
    """
    reason = out_of_reach(cfg)
    if reason is None:
        yield
        return
    if console is not None:
        warn(console, f"the hub cannot be reached ({reason}): using what is cached.")
    with remembered(reason), compat.hub_offline():
        yield
