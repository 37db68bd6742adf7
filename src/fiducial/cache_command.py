"""`fiducial cache`: what the cache of reference log-probs holds, is it whole, and making room in it."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fiducial.cli_arguments import Debug, Overrides, RunFile
from fiducial.config.schema import RunConfig
from fiducial.errors import CacheError, ConfigError

if TYPE_CHECKING:
    from fiducial.reference.cache.inventory import CachedReference, Inventory

Cache = Annotated[
    str | None,
    typer.Option("--cache", metavar="FOLDER|URL", help="The cache; your own by default."),
]
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def build(
    load: Callable[[str, list[str] | None], RunConfig],
    reporting: Callable[[bool], AbstractContextManager[None]],
) -> typer.Typer:
    """The subcommands, given how the command line reads a run and tells errors."""
    app = typer.Typer(no_args_is_help=True, help="Look into the cache of reference log-probs, and prune it.")

    @app.command("list")
    def list_(cache: Cache = None, debug: Debug = False) -> None:
        """List the references whose log-probs are kept, the last used first."""
        with reporting(debug):
            _list(cache)

    @app.command()
    def verify(cache: Cache = None, debug: Debug = False) -> None:
        """Read every record and compare it with its checksum. Changes nothing."""
        with reporting(debug):
            _verify(cache)

    @app.command()
    def prune(
        older_than: Annotated[
            str | None, typer.Option(help="Remove references not used for so long: 12h, 30d.")
        ] = None,
        max_size: Annotated[
            str | None, typer.Option(help="Remove the least recently used beyond this size: 500MB, 20GB.")
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
        cache: Cache = None,
        debug: Debug = False,
    ) -> None:
        """Remove what has not been used for long, or what is too much; and leftovers."""
        with reporting(debug):
            _prune(cache, older_than, max_size, dry_run=dry_run)

    @app.command()
    def merge(cache: Cache = None, debug: Debug = False) -> None:
        """Make few files of the many small ones that scoring leaves. Safe while runs use them."""
        with reporting(debug):
            _merge(cache)

    @app.command()
    def explain(config: RunFile, overrides: Overrides = None, debug: Debug = False) -> None:
        """Say what a run will find in its cache, and what differs where it finds nothing."""
        with reporting(debug):
            run = load(config, overrides)

            from fiducial.cache_report import explain as explain_run

            explain_run(run, Console())

    return app


def _list(location: str | None) -> None:
    from fiducial.reference.cache.inventory import Inventory

    inventory = Inventory(location)
    references = inventory.all_held()
    if not references:
        _tell_none(inventory)
        return
    table = Table(title=Text(inventory.shown, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("reference", overflow="fold")
    table.add_column("precision", overflow="fold")
    for name in ("records", "size", "last used"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("identity", overflow="fold")
    for each in references:
        table.add_row(
            Text(_name(each)),
            _precision(each.manifest),
            f"{each.records:,}",
            _size(each.bytes),
            f"{datetime.fromtimestamp(each.last_used, UTC):%Y-%m-%d %H:%M}",
            each.identity[:12],
        )
    Console().print(table)


def _verify(location: str | None) -> None:
    from fiducial.reference.cache.inventory import Inventory

    inventory = Inventory(location)
    references = inventory.all_held()
    if not references:
        _tell_none(inventory)
        return
    damages = [damage for each in references for damage in inventory.verify(each)]
    if damages:
        lines = "\n".join(f"{each.path}: {each.why} ({each.records:,} records)" for each in damages)
        raise CacheError(
            f"{len(damages)} files in {inventory.shown} are damaged. Damaged records are never used: the "
            f"next run scores them again. To be rid of a file, delete it.\n{lines}"
        )
    records = sum(each.records for each in references)
    Console().print(f"{records:,} records of {len(references)} references in {inventory.shown}: all whole.")


def _prune(location: str | None, older_than: str | None, max_size: str | None, *, dry_run: bool) -> None:
    from fiducial.reference.cache.inventory import Inventory, too_many, too_old

    inventory, console = Inventory(location), Console()
    kept = inventory.all_held()
    removed = too_old(kept, duration(older_than)) if older_than is not None else []
    kept = [each for each in kept if each not in removed]
    if max_size is not None:
        removed += (surplus := too_many(kept, size(max_size)))
        kept = [each for each in kept if each not in surplus]
    verb = "Would remove" if dry_run else "Removed"
    for each in removed:
        if not dry_run:
            inventory.remove(each)
        console.print(
            Text(
                f"{verb} {_name(each)} [{each.identity[:12]}]: {each.records:,} records, {_size(each.bytes)}"
            )
        )
    swept = 0 if dry_run else inventory.finish_removals() + sum(map(inventory.sweep, kept))
    console.print(
        f"{verb} {len(removed)} references, {_size(sum(each.bytes for each in removed))}"
        + (f", and {swept} leftovers" if swept else "")
        + f"; {len(kept)} are left, {_size(sum(each.bytes for each in kept))}."
    )


def _merge(location: str | None) -> None:
    from fiducial.reference.cache.inventory import Inventory
    from fiducial.reference.cache.merging import merge

    merged = [merge(location, each) for each in Inventory(location).references()]
    before, after = (sum(counts) for counts in zip(*merged, strict=True)) if merged else (0, 0)
    Console().print(f"{before} small files were made into {after}." if before else "Nothing to merge.")


def duration(text: str) -> float:
    """Seconds in `30d`, `12h`, `2w`.

    Raises:
        ConfigError: it is no length of time.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if found is None:
        raise ConfigError(f"--older-than {text}: write a number and s, m, h, d or w, for example 30d.")
    return float(found[1]) * _SECONDS[found[2]]


def size(text: str) -> int:
    """Bytes in `500MB`, `20 GB`.

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if found is None:
        raise ConfigError(f"--max-size {text}: write a number and KB, MB, GB or TB, for example 20GB.")
    return int(float(found[1]) * _BYTES[found[2]])


def _tell_none(inventory: "Inventory") -> None:
    Console().print(f"No reference log-probs in {inventory.shown}.", soft_wrap=True, markup=False)


def _name(reference: "CachedReference") -> str:
    return f"{reference.checkpoint} (mirror of a URL's)" if reference.is_mirror else reference.checkpoint


def _precision(manifest: dict[str, object]) -> str:
    from fiducial.reference.identity import SERVED

    if not manifest:
        return "unknown"
    if manifest.get("dtype") == SERVED:
        return "the server's"
    autocast = manifest.get("autocast")
    return str(manifest.get("dtype")) + ("" if autocast in (None, "None") else f", {autocast} products")


def _size(number: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
