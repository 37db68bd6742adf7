"""What a field may hold, in the user's words: "a number > 0", "one of drop, truncate, raise".

The sentence comes from the field's own type, so that it is right for every field and for unions, where
pydantic would report each member.
"""

import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "any value",
}
_BOUNDS: dict[type, tuple[str, str]] = {
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Lt: ("lt", "<"),
    annotated_types.Le: ("le", "≤"),
}


def describe_field(field: FieldInfo) -> str:
    """What `field` may hold."""
    return describe(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)


def describe(annotation: Any) -> str:
    """What a value of type `annotation` is; null is not mentioned, because it means absent."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in _GENERIC:
        return _GENERIC[origin](arguments)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    return _WORDS.get(annotation, str(annotation))


def _union(members: tuple[Any, ...]) -> str:
    parts = sorted((part for part in members if part is not type(None)), key=_is_container)
    return _alternatives([describe(part) for part in parts])


def _is_container(annotation: Any) -> bool:
    return get_origin(annotation) in (tuple, dict)


def _literal(values: tuple[Any, ...]) -> str:
    words = [str(value) for value in values]
    return f"one of {_alternatives(words)}" if len(words) > 1 else words[0]


def _alternatives(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _mapping(arguments: tuple[Any, ...]) -> str:
    return f"a mapping, each value {describe(arguments[1])}"


def _sequence(arguments: tuple[Any, ...]) -> str:
    if arguments[-1] is Ellipsis:
        return f"a list, each item {describe(arguments[0])}"
    return f"a list of {len(arguments)}: {', '.join(describe(part) for part in arguments)}"


def _annotated(arguments: tuple[Any, ...]) -> str:
    if any(isinstance(item, annotated_types.MinLen) for item in arguments[1:]):
        return f"{describe(arguments[0])} that is not empty"
    bounds = []
    for item in arguments[1:]:
        for member in item.metadata if isinstance(item, FieldInfo) else [item]:
            if type(member) in _BOUNDS:
                name, sign = _BOUNDS[type(member)]
                bounds.append(f"{sign} {getattr(member, name)}")
    return f"{describe(arguments[0])} {' and '.join(bounds)}".strip()


_GENERIC: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    Annotated: _annotated,
    Literal: _literal,
    Union: _union,
    types.UnionType: _union,
    tuple: _sequence,
    dict: _mapping,
}
