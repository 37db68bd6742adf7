"""`DictDefault`: the mapping people who drive a run from Python hold their settings in."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self


class DictDefault(dict[str, Any]):
    """A dict whose keys are also attributes, and whose missing keys read as `None`.

    Nested dicts, also inside lists and tuples, become `DictDefault` whenever they are put in: by the
    constructor, an assignment, `update`, `setdefault` or `|`. `in` and `get` tell a missing key from one that
    is set. `hasattr` is true for every public name, because reading one gives `None`; names with a leading
    underscore are never keys read as attributes, so that protocols (`copy`, `pickle`, display hooks) work.
    A key named like a dict method is read with brackets, and assigning it as an attribute is an error.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.update(*args, **kwargs)

    def __missing__(self, key: str) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or hasattr(dict, name) or name in type(self).__dict__:
            raise AttributeError(f"{name!r} cannot be set as an attribute; write cfg[{name!r}] = ...")
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise AttributeError(f"{type(self).__name__} has no key {name!r}")
        del self[name]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _with_attributes(value))

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Set every given key, as `dict.update` does."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """The value of `key`, which is set to `default` first where it is missing."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> Self:
        """A new mapping with the same values; nested mappings are new, other values are shared."""
        return type(self)(self)

    def __or__(self, other: Mapping[str, Any]) -> Self:  # type: ignore[override]  # dict's has overloads by value type
        merged = self.copy()
        merged.update(other)
        return merged

    def __ror__(self, other: Mapping[str, Any]) -> Self:  # type: ignore[override]  # dict's has overloads by value type
        merged = type(self)(other)
        merged.update(self)
        return merged

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]  # dict's has overloads by value type
        self.update(other)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)({key: deepcopy(value, memo) for key, value in self.items()})

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def to_dict(self) -> dict[str, Any]:
        """The same values in plain dicts, lists and tuples, at every depth."""
        return {key: _plain(value) for key, value in self.items()}


def _with_attributes(value: Any) -> Any:
    if isinstance(value, dict):
        return DictDefault(value)
    return _in_containers(value, _with_attributes)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return _in_containers(value, _plain)


def _in_containers(value: Any, convert: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(convert(item) for item in value)
    return value
