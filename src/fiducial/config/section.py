"""What every part of the configuration has in common: it is frozen, and says no to what it does not know."""

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """One part of a run's configuration: frozen, with no unknown fields and no infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_not_one(cls, values: Any) -> Any:
        """Make pydantic refuse `true` for a number, which it would read as 1, by handing it over as text."""
        if not isinstance(values, dict):
            return values
        return {
            name: str(value) if cls._takes_no_bool(name, value) else value for name, value in values.items()
        }

    @classmethod
    def _takes_no_bool(cls, name: str, value: Any) -> bool:
        field = cls.model_fields.get(name)
        if field is None or not isinstance(value, bool):
            return False
        return _mentions(field.annotation, int, float) and not _mentions(field.annotation, bool, str, Any)


def _mentions(annotation: Any, *wanted: Any) -> bool:
    return annotation in wanted or any(_mentions(part, *wanted) for part in get_args(annotation))
