"""A store made ready for training: what it holds is checked, what it lacks is scored, and people are told."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from fiducial.errors import ServerError
from fiducial.model.scoring import Scorer
from fiducial.reference.cache.passes import Groups, look_up
from fiducial.reference.cache.scoring import FLUSH_SECONDS, ScoringReference, score_reference
from fiducial.reference.cache.store import LogpStore
from fiducial.reference.served import ask_for_missing
from fiducial.reference.sources import Served
from fiducial.reference.spot_check import SpotCheck, spot_check

_NOT_COMPARED = SpotCheck(completions=0, max_difference=0.0, tolerance=0.0, distrusted=())


def fill(
    store: LogpStore,
    datasets: Mapping[str, Groups],
    reference: ScoringReference,
    scorer: Scorer,
    *,
    token_budget: int,
    console: Console,
    flush_seconds: float | None = None,
) -> float:
    """Bring into `store` every completion of the datasets, which have names for people.

    Returns:
        By how much the records that were there already differ from what the reference answers now, in nats a
        token, as far as some of them were looked at.

    Raises:
        CacheError: Records cannot be written or read.
        TrainingError: A log-prob is not finite.
    """
    checks = _compare(store, datasets, reference, scorer)
    for name, groups in datasets.items():
        with _bar(console, f"scoring the reference on {name} data") as progress:
            scored = score_reference(
                groups,
                reference,
                scorer,
                store,
                token_budget=token_budget,
                progress=progress,
                flush_every=flush_seconds or FLUSH_SECONDS,
            )
        found = f"{scored} completions scored" if scored else "known from an earlier run"
        tell_checked(console, name, checks[name], found)
    return max((each.max_difference for each in checks.values()), default=0.0)


def fill_from_server(
    store: LogpStore,
    datasets: Mapping[str, Groups],
    reference: Served,
    scorer: Scorer,
    *,
    console: Console,
    flush_seconds: float | None = None,
) -> None:
    """Bring into `store` every completion of the datasets, asked of a server.

    A server that is gone is not needed where all of them have records: these are used without a look at it.

    Raises:
        CacheError: Records cannot be written or read.
        ModelError: The server does not answer, or answers for other tokens.
    """
    try:
        checks = _compare(store, datasets, reference, scorer)
    except ServerError as error:
        if any(look_up(groups, store).parts for groups in datasets.values()):
            raise
        warn(
            console, f"{error} Every completion has a record: these are used, and were not compared with it."
        )
        checks = dict.fromkeys(datasets, _NOT_COMPARED)
    for name, groups in datasets.items():
        with _bar(console, f"asking the reference for {name} data") as progress:
            asked = ask_for_missing(
                groups,
                reference.endpoint,
                store,
                flush_every=flush_seconds or FLUSH_SECONDS,
                progress=progress,
            )
        found = f"{asked} completions scored" if asked else "known from an earlier run"
        tell_checked(console, name, checks[name], found)


def _compare(
    store: LogpStore, datasets: Mapping[str, Groups], reference: ScoringReference, scorer: Scorer
) -> dict[str, SpotCheck]:
    """Look at every dataset's records before any is scored: a file that fails for one may serve another."""
    return {name: spot_check(groups, reference, scorer, store) for name, groups in datasets.items()}


def warn(console: Console, sentence: str) -> None:
    """Print what was found wrong and mended."""
    console.print(f"[yellow]Note:[/yellow] {escape(sentence)}", soft_wrap=True)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def tell_checked(console: Console, name: str, checked: SpotCheck, *found: str) -> None:
    """Say what was `found` in the cache for a dataset, and how the records that were looked at compare."""
    for path in checked.distrusted:
        warn(
            console,
            f"{path} does not hold what this reference answers, by more than {checked.tolerance:.1g} nats a "
            "token. It is set aside, and its completions are scored again.",
        )
    if checked.completions:
        found += (
            f"{checked.completions} records scored again to compare, at most "
            f"{checked.max_difference:.2g} nats a token apart",
        )
    if found:
        console.print(f"Reference on {name} data: {'; '.join(found)}.", soft_wrap=True)
