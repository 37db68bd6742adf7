"""`fiducial losses`: the methods, read off their config classes, so that the list cannot go out of date."""

from pydantic.fields import FieldInfo
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fiducial.config.conversions import HYPERPARAMETERS
from fiducial.config.methods import METHODS, MethodConfig

_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def render_losses(console: Console) -> None:
    """Print each method's name, purpose, need of a reference, paper, and hyperparameters with their range."""
    table = Table.grid(padding=(0, 2, 1, 0))
    for method in METHODS:
        table.add_row(Text(str(method.model_fields["name"].default), style="bold"), describe(method))
    console.print(table)


def describe(method: type[MethodConfig]) -> RenderableType:
    """What a user wants to know of one method."""
    reference = "needs a reference" if method.needs_reference else "needs no reference"
    settings = Table.grid(padding=(0, 2, 0, 0))
    for name, field in method.model_fields.items():
        if name != "name":
            meaning = (field.description or "").partition("\n\n")[0]
            key = yaml_key(method, name)
            settings.add_row(key, f"{field.default:g}", Text(allowed(field), style="dim"), meaning)
    return Group(
        Text(method.summary if method.trainable else f"{method.summary} Planned only: not trainable yet."),
        Text(f"{reference}, {method.paper}", style="dim"),
        Padding(settings, (0, 0, 0, 2)),
    )


def yaml_key(method: type[MethodConfig], field: str) -> str:
    """The key of a run's YAML that sets this hyperparameter."""
    if field == "beta":
        return "rl_beta"
    name = method.model_fields["name"].default
    return next(
        key for key, (target, methods) in HYPERPARAMETERS.items() if target == field and name in methods
    )


def allowed(field: FieldInfo) -> str:
    """The values a hyperparameter may take, as `≥ 0, < 0.5`."""
    limits = [
        f"{sign} {getattr(bound, attribute):g}"
        for attribute, sign in _BOUNDS.items()
        for bound in field.metadata
        if hasattr(bound, attribute)
    ]
    return ", ".join(limits)
