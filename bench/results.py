"""One file of comparisons that grows as they finish, so that a failed one loses none."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.arena import CONSOLE, report, write

KEY = ("method", "data", "precision", "batch_size")
CONDITIONS = ("machine", "versions", "shape")


class Results:
    """Comparisons made under the same conditions, each with the command that made it."""

    def __init__(self, path: Path, command: Sequence[str], shape: str) -> None:
        self.path = path
        self._foreign = False
        """Whether the file holds what was measured on another machine, or with other versions."""
        self.report = report(command, shape, comparisons=self._earlier(report(command, shape)))

    def has(self, **key: object) -> bool:
        """Whether the file holds the comparison with this `KEY`."""
        return self.held(**key) is not None

    def held(self, **key: object) -> dict[str, Any] | None:
        """The comparison with this `KEY`, if the file holds it."""
        wanted = tuple(key[name] for name in KEY)
        return next((each for each in self.report["comparisons"] if _key(each) == wanted), None)

    def add(self, comparison: dict[str, Any]) -> None:
        """Keep a comparison, in place of an earlier one with the same `KEY`, and write the file."""
        others = [each for each in self.report["comparisons"] if _key(each) != _key(comparison)]
        made = comparison | {"command": self.report["command"]}
        if self._foreign:
            self._put_aside()
        write(self.path, self.report | {"comparisons": [*others, made]})
        self.report["comparisons"] = [*others, made]

    def _earlier(self, now: dict[str, Any]) -> list[dict[str, Any]]:
        """What the file holds, if it was measured on the same machine with the same versions."""
        if not self.path.exists():
            return []
        earlier = json.loads(self.path.read_text())
        self._foreign = any(earlier.get(name) != now[name] for name in CONDITIONS)
        comparisons: list[dict[str, Any]] = [] if self._foreign else earlier["comparisons"]
        return comparisons

    def _put_aside(self) -> None:
        aside = self.path.with_suffix(".elsewhere.json")
        self.path.replace(aside)
        self._foreign = False
        CONSOLE.print(f"what was measured on another machine, or with other versions, is now {aside}")


def _key(comparison: dict[str, Any]) -> tuple[object, ...]:
    return tuple(comparison[name] for name in KEY)
