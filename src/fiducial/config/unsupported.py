"""Keys of axolotl that Fiducial knows and does not act on: why, and what to write instead.

Such a key is an error, unless its value asks for what happens anyway (off, empty, the default); then it is
left out with a note. A key is never left out without a word.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a key is not acted on."""

    why: str
    """The reason and the remedy."""
    same: tuple[Any, ...] = ()
    """Values that ask for what happens anyway."""
    off: bool = True
    """Whether `false`, 0 and empty values ask for what happens anyway."""
    always: bool = False
    """Whether no value can change the result."""
    suffixes: tuple[str, ...] = ()
    """Endings of text, or of each in a list, that asks for what happens anyway."""

    def changes_nothing(self, value: Any) -> bool:
        """Whether leaving `value` out leads to the run it asks for."""
        values = value if isinstance(value, list) else [value]
        known = all(isinstance(each, str) and each.endswith(self.suffixes) for each in values)
        return (
            self.always
            or bool(self.suffixes and known)
            or (self.off and not value)
            or _is_any(value, self.same)
        )


def _is_any(value: Any, same: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in same)


def table(*rows: tuple[str, Unsupported]) -> dict[str, Unsupported]:
    """One entry a key; a row's keys are separated by spaces.

    Raises:
        AssertionError: a key stands in two rows.
    """
    entries = [(key, entry) for keys, entry in rows for key in keys.split()]
    assert len(dict(entries)) == len(entries), "a key is listed twice"
    return dict(entries)


def no(why: str, *same: Any, off: bool = True, suffixes: tuple[str, ...] = ()) -> Unsupported:
    """An error unless the value is one of `same`, ends in one of `suffixes`, or is off or empty."""
    return Unsupported(why, same, off, suffixes=suffixes)


def drop(why: str) -> Unsupported:
    """Never an error: no value can change the result."""
    return Unsupported(why, always=True)
