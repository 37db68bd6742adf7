"""`fiducial losses`: the methods, read off their config classes, so that the list cannot go out of date."""

from collections.abc import Sequence
from typing import Any, get_args

from pydantic.fields import FieldInfo
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fiducial.config.method_keys import HYPERPARAMETERS
from fiducial.config.methods import METHODS, MethodConfig, MixtureConfig
from fiducial.config.methods.dpo import MODIFIERS, MarginConfig

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


_WIDEST = 110
"""Longer lines are hard to read."""


def render_losses(console: Console) -> None:
    """Print how each method is written, its purpose, need of a reference, paper and hyperparameters.

    What may modify many of the losses follows once, at the end.
    """
    width = min(console.width, _WIDEST)
    for part in (*map(describe, METHODS), _weighted_sums(), _modifiers()):
        console.print(Padding(part, (0, 0, 1, 0)), width=width)


def describe(method: type[MethodConfig]) -> RenderableType:
    """What a user wants to know of one method."""
    reference = "needs a reference" if method.needs_reference else "needs no reference"
    own = [name for name in method.model_fields if name not in ("name", *MODIFIERS)]
    modifiers = [
        yaml_key(name)
        for name in MODIFIERS
        if name in method.model_fields and name != "f_alpha_divergence_coef"  # part of f_divergence_type
    ]
    modified = [f"may be modified by {', '.join(modifiers)}"] if modifiers else []
    return Group(
        Text(method.written(), style="bold"),
        Padding(Text(method.summary), (0, 0, 0, 2)),
        *(
            Padding(Text(line, style="dim"), (0, 0, 0, 2))
            for line in (f"{reference}, {method.paper}", *modified)
        ),
        *([_settings(method, own)] if own else []),
    )


def yaml_key(field: str) -> str:
    """The key of a run's YAML that sets this hyperparameter."""
    if field == "beta":
        return "rl_beta"
    return next(key for key, target in HYPERPARAMETERS.items() if target == field)


def default(field: FieldInfo) -> str:
    """What a hyperparameter is unless set; a modifier is off."""
    if isinstance(field.default, bool | str):
        return str(field.default).lower()
    return "off" if field.default is None else f"{field.default:g}"


def allowed(field: FieldInfo) -> str:
    """The values a hyperparameter may take, as `≥ 0, < 0.5`."""
    leaves = _leaves(field.annotation)
    words = ["true", "false"] if bool in leaves else [value for value in leaves if isinstance(value, str)]
    bounds = [*field.metadata, *(bound for part in leaves for bound in _metadata(part))]
    limits = [
        f"{sign} {getattr(bound, attribute):g}"
        for attribute, sign in _BOUNDS.items()
        for bound in bounds
        if hasattr(bound, attribute)
    ]
    return ", ".join([*words, *limits])


def _settings(method: type[MethodConfig], names: Sequence[str]) -> RenderableType:
    """Key, default, range and meaning of some fields, one a row."""
    settings = Table.grid(padding=(0, 2, 0, 0))
    settings.add_column(no_wrap=True)
    settings.add_column(no_wrap=True)
    settings.add_column(max_width=16, style="dim")
    settings.add_column()
    for name in names:
        field = method.model_fields[name]
        meaning = (field.description or "").partition("\n\n")[0].replace("\n", " ")
        settings.add_row(yaml_key(name), default(field), Text(allowed(field)), Text(meaning))
    return Padding(settings, (0, 0, 0, 4))


def _modifiers() -> RenderableType:
    return Group(
        Text("rl: dpo, modifiers", style="bold"),
        Padding(Text("Change a loss that names them above. Each is off unless it is set."), (0, 0, 0, 2)),
        _settings(MarginConfig, MODIFIERS),
    )


def _leaves(annotation: Any) -> list[Any]:
    """What an annotation is made of: types, literals, and the bounds of a part."""
    return [annotation, *(leaf for part in get_args(annotation) for leaf in _leaves(part))]


def _metadata(part: Any) -> list[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _weighted_sums() -> RenderableType:
    return Group(
        Text("rl: dpo, dpo_loss_type: [sigmoid, sft], dpo_loss_weights: [1, 0.5]", style="bold"),
        Padding(Text(MixtureConfig.summary), (0, 0, 0, 2)),
        Padding(
            Text(f"compares with its parts' reference, {MixtureConfig.paper}", style="dim"), (0, 0, 0, 2)
        ),
    )
