"""The `fiducial` command.

Each command imports what it needs when it runs, so that `plan`, `losses` and `--help` answer without torch.
Exit codes: 0 done, 1 our bug, 2 a mistake the user can mend, 130 interrupted.
"""

import errno
import io
import json
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fiducial import cache_command
from fiducial._version import VERSION
from fiducial.cli_arguments import Debug, Overrides, RunFile, RunOrFolder
from fiducial.config.schema import RunConfig
from fiducial.errors import FiducialError

if TYPE_CHECKING:
    from fiducial.config.load import LoadedRun
    from fiducial.finished import FinishedRun

app = typer.Typer(
    name="fiducial",
    help="Align a language model with preference data, from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What the machine refuses, whatever the program: no space left, over quota, no permission, read-only.
_MACHINE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS})

_HEAD_START_SECONDS = 3.0


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fiducial {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Align a language model with preference data, from one YAML file."""


@app.command()
def train(config: RunFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Align the model: plan, load, score the reference, prove it, train, save."""
    settings = dict.fromkeys([*(overrides or ()), "auto_resume_from_checkpoints=true"])  # each once
    again = shlex.join(["fiducial", "train", config, *settings])
    resume = f"Checkpoints are kept; go on with: {again}"
    with _reporting(debug, interrupted=resume):
        run = _load(config, overrides)

        with _loading():
            from fiducial.train import train as train_run

        train_run(run.settings)


@app.command()
def plan(
    config: RunFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what a run would do and why: its reference, memory and data. Loads no weights."""
    with _reporting(debug):
        run = _load(config, overrides).config

        from fiducial.reference.describe import plan_run, render_plan

        report = plan_run(run)
        if as_json:
            typer.echo(json.dumps(report, indent=2))
        else:
            render_plan(report, _console())


@app.command()
def preprocess(config: RunFile, overrides: Overrides = None, debug: Debug = False) -> None:
    """Tokenize and audit the data, and score the reference where the plan precomputes it."""
    again = shlex.join(["fiducial", "preprocess", config, *(overrides or ())])
    resume = f"What was scored is kept; go on with: {again}"
    with _reporting(debug, interrupted=resume):
        run = _load(config, overrides).config

        with _loading():
            from fiducial.train import preprocess as preprocess_run

        preprocess_run(run)


@app.command()
def evaluate(run: RunOrFolder, overrides: Overrides = None, debug: Debug = False) -> None:
    """Score a trained run against its reference: accuracy, margins, KL.

    On the data it held out, or on others: fiducial evaluate outputs/run datasets.0.path=new.jsonl
    """
    with _reporting(debug):
        if _is_folder(run):
            finished = _find_finished(run, overrides)
            with _loading():
                from fiducial.evaluate import evaluate_finished

            evaluate_finished(finished)
            return
        loaded = _load(run, overrides)

        with _loading():
            from fiducial.evaluate import evaluate as evaluate_run

        evaluate_run(loaded.config)


@app.command()
def verify(run: RunOrFolder, overrides: Overrides = None, debug: Debug = False) -> None:
    """Prove the reference, and nothing else. Of a finished run: is its reference still what it was?"""
    with _reporting(debug):
        if _is_folder(run):
            finished = _find_finished(run, overrides)
            with _loading():
                from fiducial.as_then import verify_finished

            verify_finished(finished)
            return
        loaded = _load(run, overrides)

        with _loading():
            from fiducial.verification import verify as verify_run

        verify_run(loaded.config)


@app.command()
def merge(
    run: RunOrFolder,
    overrides: Overrides = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Where to write; output_dir/merged by default.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Merge a trained LoRA adapter into its base model."""
    with _reporting(debug):
        target = Path(output).expanduser() if output else None
        if _is_folder(run):
            finished = _find_finished(run, overrides)
            with _loading():
                from fiducial.merge import merge_finished

            merged = merge_finished(finished, target)
        else:
            loaded = _load(run, overrides)

            with _loading():
                from fiducial.merge import merge_adapter

            merged = merge_adapter(loaded.config, target)
        _console().print(f"Merged model and tokenizer: [bold]{escape(str(merged))}[/bold]", soft_wrap=True)


@app.command()
def losses() -> None:
    """List the methods: what each optimises, its hyperparameters, and its paper."""
    from fiducial.loss_table import render_losses

    render_losses(_console())


def main() -> None:
    """Run the `fiducial` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal has no letter for ends no run
    app()


def _is_folder(run: str) -> bool:
    """Whether a run is named by what it left, and not by its YAML."""
    path = Path(run)
    return path.is_dir() or not (path.exists() or path.suffix)


def _load(config: str, overrides: list[str] | None) -> "LoadedRun":
    from fiducial.config.load import load_run

    loaded = load_run(config, overrides or ())
    _tell_notes(loaded.config, loaded.notes)
    return loaded


def _find_finished(folder: str, overrides: list[str] | None) -> "FinishedRun":
    """The run that wrote `folder`, found before anything heavy is imported."""
    from fiducial.finished import from_folder

    finished = from_folder(Path(folder), overrides or ())
    _tell_notes(finished.cfg)
    return finished


def _tell_notes(run: RunConfig, notes: tuple[str, ...] = ()) -> None:
    """Print the notes, and that the hub cannot be reached, where that matters."""
    from fiducial.hub import keep_to_cache

    offline = keep_to_cache(run)
    cached = f"the hub cannot be reached ({offline}): using what is cached."
    for note in (*notes, *([cached] if offline is not None else [])):
        _console(stderr=True).print(f"[yellow]note:[/yellow] {escape(note)}", soft_wrap=True)


@contextmanager
def _loading() -> Iterator[None]:
    """Inside, heavy libraries are imported, for seconds in which a terminal would show nothing."""
    with _console(stderr=True).status("Loading torch and transformers …"):
        _quieten()
        yield


def _quieten() -> None:
    """Keep off the screen what says nothing of the run: bars of single loads, a warning between libraries."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # On some CPUs it looks on the hub for a kernel that no run here uses (`compat`), and says that it cannot.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT 0.21 asks a transformers 5.23 model by the property's old name; goes with PEFT's next release.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _console(*, stderr: bool = False) -> Console:
    """One process of a distributed run speaks for all of them."""
    return Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0")


@contextmanager
def _reporting(debug: bool, *, interrupted: str = "") -> Iterator[None]:
    """Turn an error into a message and the exit code of whoever can mend it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:  # the outermost frame: nothing is swallowed, all is told
        if isinstance(error, BrokenPipeError):  # the reader of our output left, as `head` does; typer knows
            raise
        if isinstance(error, Exception):
            _let_the_first_speak()
        if debug:
            traceback.print_exc()
        code, message, remedy = _judge(error, interrupted)
        # With words of its own all processes were stopped together, and one of them says so.
        together = isinstance(error, KeyboardInterrupt) and bool(str(error))
        _complain(message, remedy, console=_console(stderr=True) if together else Console(stderr=True))
        raise typer.Exit(code) from None


def _let_the_first_speak() -> None:
    """Give this machine's first process time to say the same; torchrun then ends this one, unheard.

    What failed here alone is said a moment later.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_HEAD_START_SECONDS)


def _judge(error: BaseException, interrupted: str) -> tuple[int, str, str]:
    """Exit code, message and remedy."""
    if isinstance(error, KeyboardInterrupt):
        # Training stops with words of its own: what it saved, and how to go on.
        return 130, str(error) or "Interrupted.", "" if str(error) else interrupted
    if isinstance(error, FiducialError):
        return 2, f"{_kind(error)}: {error}", ""
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
        where = error.filename or "a file of this run"
        return 2, f"{error.strerror}: {where}", "Make room, or allow it, and try again."
    return (
        1,
        f"Internal error, which is Fiducial's and not yours: {type(error).__name__}: {error}",
        f"Please report it with your YAML, the version ({VERSION}) and the traceback (--debug shows it).",
    )


def _kind(error: FiducialError) -> str:
    name = type(error).__name__.removesuffix("Error")
    return {"Fiducial": "Error"}.get(name, f"{name} error")


def _complain(message: str, remedy: str, *, console: Console) -> None:
    console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    if remedy:
        console.print(remedy, markup=False, highlight=False, soft_wrap=True)


def _load_quietly(config: str, overrides: list[str] | None) -> RunConfig:
    run = _load(config, overrides).config
    _quieten()
    return run


app.add_typer(cache_command.build(_load_quietly, _reporting), name="cache")
