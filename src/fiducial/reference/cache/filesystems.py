"""Opening a cache by its address, with errors that say which address and what to do. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from fiducial.errors import CacheError
from fiducial.reference.cache.places import shown


def open_location(location: str) -> tuple[AbstractFileSystem, str]:
    """The file system a URL names, and the path in it.

    Raises:
        CacheError: fsspec does not know it, or the package that does is not installed.
    """
    try:
        filesystem, root = url_to_fs(location)
    except (ImportError, ValueError) as error:
        raise CacheError(f"reference.cache: {shown(location)} cannot be opened: {error}") from error
    except Exception as error:  # every protocol has exceptions of its own
        raise CacheError(_unreachable(shown(location), "opened", error)) from error
    return filesystem, str(root)


def put_whole(filesystem: AbstractFileSystem, path: str, content: bytes) -> None:
    """Write a file aside and move it into place, where the file system can move."""
    if type(filesystem).mv is AbstractFileSystem.mv:  # it would copy and delete; one put is as good
        filesystem.pipe_file(path, content)
        return
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}.part"
    filesystem.pipe_file(aside, content)
    filesystem.mv(aside, path)


@contextmanager
def explained(location: str, what: str) -> Iterator[None]:
    """Inside, whatever the file system raises becomes a CacheError: `location` cannot be `what`."""
    try:
        yield
    except CacheError:
        raise
    except Exception as error:  # every protocol has exceptions of its own
        raise CacheError(_unreachable(location, what, error)) from error


def _unreachable(location: str, what: str, error: Exception) -> str:
    return (
        f"reference.cache: {location} cannot be {what}: {type(error).__name__}: {error}. Check the address "
        "and fsspec's settings for it, or remove the key to use the cache on this machine."
    )
