"""Whether the hub can be reached, asked by one short request, before its client tries for minutes.

The hub's client waits 24 seconds for each file that is not cached before it gives up. One request with a
short limit decides; where it finds nobody, the command makes every library keep to its cache, as
HF_HUB_OFFLINE=1 does. Imports neither torch nor the client, which reads that variable when it is imported.
"""

import os
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, build_opener, getproxies, proxy_bypass

from fiducial.config.file_kinds import KINDS
from fiducial.config.schema import RunConfig

SECONDS = 3.0
"""Several times what a slow line needs; a name that the resolver waits for counts too."""
_HOLDS_SECONDS = 60.0
"""How long an answer holds."""
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FOUND: ContextVar[str | None] = ContextVar("found", default=None)
"""Why it was we who set HF_HUB_OFFLINE, and not the user."""


def keep_to_cache(cfg: RunConfig) -> str | None:
    """As `out_of_reach`; and where the hub is, its client is to keep to the cache.

    From then on libraries that are imported, and processes that are started, use only what is cached.
    """
    reason = out_of_reach(cfg)
    if reason is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        _FOUND.set(reason)
    return reason


@contextmanager
def remembered(reason: str) -> Iterator[None]:
    """Inside, HF_HUB_OFFLINE is set because of `reason`, and messages say so."""
    before = _FOUND.set(reason)
    try:
        yield
    finally:
        _FOUND.reset(before)


def lacks_hub(location: str, error: Exception) -> bool:
    """Whether a library that was to load `location` raised `error` because nothing can be fetched."""
    return isinstance(error, OSError) and is_hub_name(location) and unreachable() is not None


def not_at_hand(named: str, error: Exception) -> str:
    """What to tell of `named`, a YAML key and its value, that is not cached where the hub cannot be asked.

    `error` is the client's.
    """
    return (
        f"{named} is not here and not cached, and the hub cannot be reached to look it up "
        f"({unreachable() or error}). Check the path, or go online once so that it is cached. HF_ENDPOINT "
        "names a mirror; HF_HUB_OFFLINE=0 keeps trying."
    )


def out_of_reach(cfg: RunConfig) -> str | None:
    """Why the hub cannot be asked for what `cfg` names there.

    None where it can, where nothing of it is asked, and where the user has said whether to ask.
    """
    asked = _said() is None and any(is_hub_name(location) for location in _locations(cfg))
    return unreachable() if asked else None


def is_hub_name(location: str) -> bool:
    """Whether `location` can only be meant as a name on the hub: no path, no address, nothing that exists."""
    outside = location.startswith((".", "/", "~")) or location.count("/") > 1 or "://" in location
    return not outside and not Path(location).expanduser().exists()


def unreachable() -> str | None:
    """Why the hub cannot be asked: it is switched off, or does not answer. None where it can.

    HF_HUB_OFFLINE=0 means that the user knows better, and nothing is tried. The answer holds for a minute, so
    that who goes online need not restart a notebook.
    """
    asked, answer = _last_answer()
    if time.monotonic() - asked > _HOLDS_SECONDS:
        _last_answer.cache_clear()
        _, answer = _last_answer()
    return answer


@cache
def _last_answer() -> tuple[float, str | None]:
    """When it was asked, and what came of it."""
    return time.monotonic(), _ask_or_be_told()


def _ask_or_be_told() -> str | None:
    if (said := _said()) is not None:
        switched_off = said.upper() in ("1", "ON", "YES", "TRUE")
        return (_FOUND.get() or "HF_HUB_OFFLINE is set") if switched_off else None
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if _through_socks(endpoint):
        return None
    answers: Queue[str | None] = Queue()
    # A thread, because no limit of a socket counts while the resolver waits for a name.
    threading.Thread(target=lambda: answers.put(_ask(endpoint)), daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except Empty:
        return f"{endpoint} does not answer within {SECONDS:.0f} seconds"


def _said() -> str | None:
    return next((os.environ[name] for name in _OFFLINE if os.environ.get(name)), None)


def _through_socks(endpoint: str) -> bool:
    """Whether a proxy leads there that only the client can speak to."""
    address = urlsplit(endpoint)
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all") or ""
    return proxy.startswith("socks") and not proxy_bypass(address.netloc)


def _ask(endpoint: str) -> str | None:
    """What went wrong on the way to `endpoint`; any answer at all is an answer."""
    try:
        with build_opener().open(Request(endpoint, method="HEAD"), timeout=SECONDS):
            return None
    except HTTPError:
        return None
    except URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return None  # somebody is there; the client may know other certificates
        return f"{endpoint}: {getattr(error.reason, 'strerror', None) or error.reason}"
    except (OSError, ValueError) as error:  # it hung up; HF_ENDPOINT is no address
        return f"{endpoint}: {error}"


def _locations(cfg: RunConfig) -> list[str]:
    """Whatever of the run may be a name on the hub."""
    reference = cfg.reference
    named = [cfg.model.base_model, cfg.tokenizer.path, reference.adapter, cfg.output.hub_model_id]
    if reference.endpoint is None:  # or else it is a name on that server
        named.append(reference.model)
    if cfg.adapter is not None:
        named.append(cfg.adapter.path)
    if cfg.data is not None:
        sets = (*cfg.data.datasets, *cfg.data.test_datasets)
        named += [each.path for each in sets if not (each.data_files and each.path in KINDS)]
    return [location for location in named if location is not None]
