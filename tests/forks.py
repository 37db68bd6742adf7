"""Processes whose imports are made already: forks of one server that has made them."""

import gc
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["forks", "fiducial.train", "fiducial.cli", "run_configs", "training_harness"])


def fork(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """`function` in a process of one thread and this environment, started; it ends with this one."""
    process = CONTEXT.Process(target=_call, args=(dict(os.environ), function, arguments), daemon=True)
    process.start()
    return process


def fork_script(
    script: Path, arguments: tuple[str, ...], environment: Mapping[str, str], said: Path
) -> BaseProcess:
    """`script` as Python would run it, with more of an `environment`; what it says is written to two files.

    Their names are that of `said` and `.out` or `.err`.
    """
    return fork(_run_script, script, arguments, dict(environment), said)


def _call(environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # what the server has imported stays
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def _run_script(script: Path, arguments: tuple[str, ...], environment: dict[str, str], said: Path) -> None:
    os.environ.update(environment)
    for stream, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{said}{ending}", os.O_CREAT | os.O_WRONLY), stream)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
