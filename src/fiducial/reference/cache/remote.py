"""A cache on another machine, through fsspec: files are mirrored here once, and sent when written.

Files never change, so a mirror is never stale. On a store that cannot rename, a file may be seen half
written; it does not hold what its name says, and is fetched again later.
"""

from fiducial.reference.cache.filesystems import explained, open_location, put_whole
from fiducial.reference.cache.folder import RecordFolder
from fiducial.reference.cache.names import ShardName, checksum
from fiducial.reference.cache.places import MANIFEST, shown

UNSENT = ".unsent"
"""Beside a file that was written here and has not reached the other machine yet."""


class RemoteFolder:
    """One reference's folder in a cache at a URL, and its mirror."""

    def __init__(self, location: str, identity: str) -> None:
        self.location = shown(location)
        self._fs, root = open_location(location)
        self._identity = identity
        self._path = f"{root.rstrip('/')}/{identity}"
        self._there: set[str] = set()
        self.passed_over: list[str] = []
        """Files that did not hold what their names say when they were last fetched."""

    def pull(self, mirror: RecordFolder) -> None:
        """Fetch what the mirror lacks, and send what an earlier process could not.

        Raises:
            CacheError: The other machine does not answer.
        """
        with explained(self.location, "read"):
            while not self._fetch(mirror):
                pass  # what has gone since it was listed may have been merged into a file that the list lacks
        for marker in mirror.path.glob(f"*{UNSENT}"):
            self.push(mirror, marker.name.removesuffix(UNSENT))

    def _fetch(self, mirror: RecordFolder) -> bool:
        """Fetch the files that the mirror lacks; False if one of them was gone by then."""
        self._there = self._names()
        self.passed_over = []
        all_there = True
        for name in self._there - set(mirror.names()):
            try:
                content: bytes = self._fs.cat_file(f"{self._path}/{name}")
            except FileNotFoundError:
                all_there = False
                continue
            parsed = ShardName.parse(name)
            if parsed is None or checksum(content) != parsed.checksum:
                self.passed_over.append(f"{self.location}/{self._identity}/{name}")
                continue
            mirror.path.mkdir(parents=True, exist_ok=True)  # it may have been deleted under the run
            mirror.write(name, content)
        return all_there

    def push(self, mirror: RecordFolder, name: str) -> None:
        """Send a file of the mirror; the manifest goes first, which says whose the records are.

        Raises:
            CacheError: The other machine does not take it. The next run that opens the cache sends it.
        """
        path, marker = mirror.path / name, mirror.path / f"{name}{UNSENT}"
        if path.exists() and name not in self._there:
            with explained(self.location, "written"):
                self._fs.makedirs(self._path, exist_ok=True)
                if not self._fs.exists(f"{self._path}/{MANIFEST}"):
                    put_whole(self._fs, f"{self._path}/{MANIFEST}", (mirror.path / MANIFEST).read_bytes())
                put_whole(self._fs, f"{self._path}/{name}", path.read_bytes())
        self._there.add(name)
        marker.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Delete a file that was found unusable, so that nobody fetches it again.

        Raises:
            CacheError: The other machine does not let go of it.
        """
        with explained(self.location, "written"):
            if self._fs.exists(f"{self._path}/{name}"):
                self._fs.rm_file(f"{self._path}/{name}")

    def _names(self) -> set[str]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path, detail=False)
        except FileNotFoundError:
            return set()
        return {str(name) for path in found if (name := ShardName.parse(path))}
