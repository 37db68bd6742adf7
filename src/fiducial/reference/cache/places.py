"""Where caches are: the folder or URL a run names, the user's own by default. Imports no torch.

One folder serves all runs of a user, because records are found by content: nothing in it belongs to a run.
"""

import hashlib
import os
import re
from pathlib import Path

ENVIRONMENT = "FIDUCIAL_CACHE"
"""Where the default cache is, for a machine or a container that has no lasting home."""
MANIFEST = "identity.json"
"""In each reference's folder: which reference its records are of."""
MIRRORS = "mirrors"
"""In the user's own cache: copies of what caches at URLs hold, a folder for each of these caches."""

_IDENTITY = re.compile(r"[0-9a-f]{32}")


def default_cache() -> Path:
    """`$FIDUCIAL_CACHE`, or else `fiducial/references` in the user's cache folder (XDG)."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "fiducial" / "references"


def is_remote(location: str) -> bool:
    """Whether `location` is a URL that only fsspec can open."""
    return "://" in location and not location.startswith("file://")


def local_folder(location: str | None) -> Path:
    """The folder a cache's files are read from: the cache itself, or the mirror of a remote one."""
    if location is None:
        return default_cache()
    if is_remote(location):
        name = hashlib.blake2b(location.rstrip("/").encode(), digest_size=8).hexdigest()
        return default_cache() / MIRRORS / name
    return Path(location.removeprefix("file://")).expanduser()


def shown(location: str | None) -> str:
    """`location` for people: without a password."""
    return re.sub(r"(?<=://)[^/@]*@", "", location) if location else str(default_cache())


def is_identity(name: str) -> bool:
    """Whether a folder's name is a reference's identity; a cache may lie beside other folders."""
    return _IDENTITY.fullmatch(name) is not None
