"""What the commands take: a run, settings that replace its own, and whether an error shows its traceback."""

from typing import Annotated

import typer

RunFile = Annotated[str, typer.Argument(metavar="RUN.YAML", help="The run's configuration.")]
RunOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run's YAML, or what it left: its output folder or one of its checkpoints."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that replace the file's, as rl_beta=0.2."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
