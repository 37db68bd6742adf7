"""What a format is, and where in a dataset's rows its parts are.

`Format.columns` names the options a format reads (`prompt`, `chosen`, …) and, for each, the column names it
expects, in order of preference. `field_<option>` in the YAML replaces them. An option the format does not
read is an error: it would silently do nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fiducial.config.schema import DatasetConfig
from fiducial.data.example import Content
from fiducial.data.formats.shape import Shape
from fiducial.errors import ConfigError, DataError

Row = Mapping[str, Any]
Preference = tuple[Content, tuple[Content, ...]]
"""A prompt and its completions, best first."""

OPTIONS = (
    *("prompt", "chosen", "rejected", "completion", "label", "system", "tools", "messages"),
    *("completions", "scores", "chosen_score", "rejected_score"),
)

ROLES: Mapping[str, str] = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}


@dataclass(frozen=True, slots=True)
class Fields:
    """One dataset's answer to where things are."""

    columns: Mapping[str, str]
    """Option to column; an optional column the dataset lacks is absent."""
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    """The rows' role names to ours."""
    properties: Mapping[str, str] = field(default_factory=dict)
    """Our message keys to the rows'."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """`prompt_format` and its kin, for user-defined types."""


Reader = Callable[[Row, Fields], Preference]
ScoreReader = Callable[[Row, Fields], tuple[float, ...]]
"""One row to a number for each completion, or to none."""
SCORES_BY_NAME: Mapping[str, tuple[str, ...]] = {"chosen_score": (), "rejected_score": ()}
"""A pair's scores are read only where field_chosen_score and field_rejected_score name them."""


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write preferences into rows."""

    read: Reader
    """One row to one preference; raises `OddRow`."""
    columns: Mapping[str, tuple[str, ...]]
    """Options that must be there, and the columns they are usually called."""
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    detect: Callable[[Shape], bool] | None = None
    """Whether `type: auto` takes a dataset for this format; None: only by name."""
    scores: ScoreReader | None = None
    """Where it is not a label or a pair's scores that rows say of completions."""
    reads_messages: bool = False
    """Whether `roles` and `message_property_mappings` mean anything here."""

    @property
    def is_paired(self) -> bool:
        """Whether rows hold a chosen and a rejected completion by name."""
        return {"chosen", "rejected"} <= self.columns.keys()


def resolve_fields(
    name: str, format_: Format, config: DatasetConfig, *, where: str, columns: Sequence[str]
) -> Fields:
    """Find every part of `format_` among the dataset's `columns`.

    Raises:
        ConfigError: an option has no effect on this format.
        DataError: a column is not there.
    """
    given, templates = _given(config, where)
    readable = {**format_.columns, **format_.optional, **(SCORES_BY_NAME if format_.is_paired else {})}
    for option in given:
        if option not in readable:
            raise ConfigError(
                f"{where}.field_{option}: has no effect on type '{name}', which reads {', '.join(readable)}. "
                f"Remove it, or choose another type."
            )
    for option in ("roles", "message_property_mappings"):
        if getattr(config, option) and not format_.reads_messages:
            raise ConfigError(
                f"{where}.{option}: has no effect on type '{name}', which reads plain text. Remove it."
            )
    found: dict[str, str] = {}
    for option, usual in readable.items():
        candidates = (given[option],) if option in given else usual
        column = next((candidate for candidate in candidates if candidate in columns), None)
        if column is not None:
            found[option] = column
        elif option in format_.columns or option in given:
            raise DataError(
                f"{where} ({config.path}): type '{name}' needs a column "
                f"{' or '.join(map(repr, candidates))} for the {option}; the columns are "
                f"{', '.join(columns)}. Name the right one with field_{option}."
            )
    if len(SCORES_BY_NAME.keys() & found.keys()) == 1:
        raise ConfigError(
            f"{where}: field_chosen_score and field_rejected_score go together. Name both, or neither."
        )
    return Fields(found, _roles(config), config.message_property_mappings or {}, templates)


def _given(config: DatasetConfig, where: str) -> tuple[dict[str, str], dict[str, str]]:
    """Columns named in the YAML, and the formats of a user-defined type."""
    given = {option: name for option in OPTIONS if (name := getattr(config, f"field_{option}")) is not None}
    if isinstance(config.type, str):
        return given, {}
    templates: dict[str, str] = {}
    known = [f"field_{o}" for o in ("prompt", "system", "chosen", "rejected", "completion", "label")]
    known += [f"{o}_format" for o in ("prompt", "chosen", "rejected", "completion")]
    for key, value in config.type.items():
        if key not in known:
            raise ConfigError(f"{where}.type.{key}: unknown key; a user-defined type has {', '.join(known)}.")
        if value is None:
            continue
        if key.startswith("field_"):
            given[key.removeprefix("field_")] = str(value)
        else:
            templates[key.removesuffix("_format")] = str(value)
    return given, templates


def _roles(config: DatasetConfig) -> Mapping[str, str]:
    if config.roles is None:
        return ROLES
    return {**ROLES, **{theirs: ours for ours, names in config.roles.items() for theirs in names}}
