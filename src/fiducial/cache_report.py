"""Why a run's reference log-probs are in the cache, or are not: what differs, and which rows are new."""

from dataclasses import dataclass

from rich.console import Console

from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.prepare import Run, identify_reference, load_policy, load_second_model, read_run
from fiducial.reference.cache.inventory import CachedReference, Inventory
from fiducial.reference.cache.opening import open_store
from fiducial.reference.cache.passes import Groups, look_up, take
from fiducial.reference.cache.store import LogpStore
from fiducial.reference.differences import differences
from fiducial.reference.fill import warn
from fiducial.reference.identity import SERVED, Identity
from fiducial.reference.predicted import predict_identity
from fiducial.training.arguments import training_arguments
from fiducial.training.budget import choose_token_budget

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Lacking:
    """What a dataset's completions lack in a store."""

    completions: int
    missing: int
    after_known_prompts: int
    """Missing ones whose prompt has records of other completions."""


def explain(cfg: RunConfig, console: Console) -> None:
    """Print what `fiducial train` would find in its cache, and for a miss, why.

    Raises:
        FiducialError: the run cannot be read.
    """
    run = read_run(cfg, Console(quiet=True))
    if not run.plan.kept:
        console.print(f"Nothing is read from a cache: the reference is {run.plan.schedule or 'none'}.")
        return
    identity = predict_identity(run.cfg, run.plan, run.tokenizer) or _load_to_identify(run)
    inventory = Inventory(run.cfg.reference.cache)
    references = inventory.references()
    console.print(
        f"Wanted: {_name(identity.checkpoint, identity.digest)}, {_numerics(identity)}, in {inventory.shown}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    if any(each.identity == identity.digest for each in references):
        store = open_store(run.cfg, identity, tell=lambda sentence: warn(console, sentence))
        for name, groups in _datasets(run).items():
            console.print(
                f"{name[0].upper()}{name[1:]} data: {_sentence(count_lacking(groups, store))}", soft_wrap=True
            )
        return
    if not references:
        console.print("The cache is empty: every completion will be scored.")
    for phrases, each in _nearest(identity, references):
        console.print(
            f"Not {_name(each.checkpoint, each.identity)} ({each.records:,} records): {'; '.join(phrases)}.",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


def count_lacking(groups: Groups, store: LogpStore) -> Lacking:
    """What `store` lacks of `groups`, and whether it is the prompts that are new."""
    total = len({key for index in range(len(groups)) for key in groups[index].keys})
    parts = [take(groups, part) for part in look_up(groups, store).parts]
    missing = sum(len(part.completions) for part in parts)
    known = sum(len(part.completions) for part in parts if store.knows_prompt(part.prompt))
    return Lacking(total, missing, known)


def _sentence(lacking: Lacking) -> str:
    if not lacking.missing:
        return f"all {lacking.completions:,} completions have records."
    new_prompts = lacking.missing - lacking.after_known_prompts
    reasons = []
    if new_prompts:
        reasons.append(
            f"{new_prompts:,} follow a prompt without any record (a new row, or another template, system "
            "message, or cut of the prompt)"
        )
    if lacking.after_known_prompts:
        reasons.append(f"{lacking.after_known_prompts:,} are new after a prompt that has records")
    return (
        f"{lacking.completions - lacking.missing:,} of {lacking.completions:,} completions have records; "
        f"{' and '.join(reasons)}."
    )


def _nearest(
    identity: Identity, references: list[CachedReference]
) -> list[tuple[list[str], CachedReference]]:
    """The references that differ least, each with what differs."""
    wanted = identity.as_dict()
    found = [(differences(wanted, each.manifest), each) for each in references]
    found.sort(key=lambda item: (item[1].checkpoint != identity.checkpoint, len(item[0])))
    return found[:_SHOWN]


def _load_to_identify(run: Run) -> Identity:
    has_evaluation = run.data.evaluation is not None
    args = training_arguments(run.cfg, num_rows=len(run.data.train), has_evaluation=has_evaluation)
    budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
    policy = load_policy(run, args.device, budget)
    return identify_reference(run, policy, load_second_model(run, args.device))


def _datasets(run: Run) -> dict[str, TokenizedDataset]:
    held_out = {"held-out": run.data.evaluation} if run.data.evaluation is not None else {}
    if isinstance(run.data.train, TokenizedDataset):
        return {"training": run.data.train} | held_out
    return {f"the first {len(run.data.sample)} rows of streamed": run.data.sample} | held_out


def _name(checkpoint: str, digest: str) -> str:
    return f"{checkpoint} [{digest[:12]}]"


def _numerics(identity: Identity) -> str:
    if identity.dtype == SERVED:
        return "as its server computes"
    autocast = "" if identity.autocast == "None" else f", products in {identity.autocast}"
    return f"weights in {identity.dtype}{autocast}"
