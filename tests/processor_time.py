"""How quick a command is, on a machine of any speed and beside other tests."""

import resource
import subprocess
import sys
from collections.abc import Callable

_IMPORTS = "import pydantic, typer, rich.table, yaml"
"""What every command imports: 0.17 s where `fiducial plan` takes 0.7 s."""


def times_the_imports(command: Callable[[], object], *, rounds: int = 3) -> float:
    """Processor time of `command`'s processes over that of its imports alone: the least of each, in turn."""

    def imports() -> None:
        subprocess.run([sys.executable, "-c", _IMPORTS], check=True)

    pairs = [(_seconds(command), _seconds(imports)) for _ in range(rounds)]
    ours, theirs = (min(each) for each in zip(*pairs, strict=True))
    return ours / theirs


def _seconds(command: Callable[[], object]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
