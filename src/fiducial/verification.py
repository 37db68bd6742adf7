"""Proves a reference without training; `as_then.py` looks at the one of a finished run.

Is it the starting policy, on real groups, and are the weights that were loaded those in the files?
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model.offload import is_offloaded
from fiducial.model.scoring import Scorer
from fiducial.offline import kept_to_cache
from fiducial.prepare import (
    Policy,
    Run,
    identify_reference,
    load_policy,
    load_second_model,
    main_console,
    measure_error,
    read_run,
    typical_groups,
)
from fiducial.reference.approximation import Approximation
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.cache.opening import open_store
from fiducial.reference.differences import differences
from fiducial.reference.fill import warn
from fiducial.reference.identity import Identity
from fiducial.reference.plan import ReferencePlan, Source
from fiducial.reference.predicted import predict_identity
from fiducial.reference.sources import SOURCES, Parts, Reference
from fiducial.reference.spot_check import spot_check
from fiducial.reference.verify import Proof, prove_reference, require_adapter_off
from fiducial.training.arguments import training_arguments
from fiducial.training.budget import choose_token_budget

Findings = dict[str, str]
"""What was looked at, and what was found, a line each."""
WITHIN_SERVER = "the server's; only what it answers can be compared"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A run with its starting policy and its reference."""

    run: Run
    policy: Policy
    second: Scorer | None
    reference: Reference
    identity: Identity


def verify(cfg: RunConfig | Mapping[str, Any], *, console: Console | None = None) -> Findings:
    """Prove the reference of a run that is still to be trained.

    Raises:
        FiducialError: it is not the reference the loss needs; the message says why.
    """
    checked, console = validate_config(cfg), console or main_console()
    with kept_to_cache(checked, console):
        return _verify(read_run(checked, console))


def _verify(run: Run) -> Findings:
    if run.plan.source is Source.NONE:
        return tell_findings(run.console, run.plan, {"nothing to prove": run.plan.why})
    loaded = load_to_prove(run)
    groups = typical_groups(run.data.sample)
    if run.plan.source is Source.ADAPTER_OFF:
        require_adapter_off(loaded.policy.scorer, groups)
    approximation = measure_error(run, loaded.policy, loaded.reference, groups)
    proof = prove_reference(
        loaded.policy.scorer,
        loaded.reference,
        groups,
        expected_equal=run.plan.equals_starting_policy and approximation is None,
        pass_tokens=loaded.policy.micro_batch_tokens,
    )
    findings = {"weights": _as_in_files(loaded)} | _figures(proof, run.plan, approximation)
    findings |= cached_records(loaded)
    return tell_findings(run.console, run.plan, findings)


def load_to_prove(run: Run) -> Loaded:
    """Load what a run is proved on: its starting policy and its reference."""
    args = training_arguments(run.cfg, num_rows=len(run.data.train), has_evaluation=True)
    budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
    policy = load_policy(run, args.device, budget)
    second = load_second_model(run, args.device)
    identity = identify_reference(run, policy, second)
    reference = SOURCES[run.plan.source](Parts(run.plan, policy.scorer, second))
    return Loaded(run, policy, second, reference, identity)


def _as_in_files(loaded: Loaded) -> str:
    """Compare what was loaded with the checkpoint's files, where that can be told from them."""
    if loaded.run.plan.source is Source.ENDPOINT:
        return WITHIN_SERVER
    if loaded.second is not None and is_offloaded(loaded.second.model):
        return f"{loaded.identity.digest[:12]}, those in the files of {loaded.identity.checkpoint}"
    found = loaded.identity.as_dict()
    predicted = predict_identity(loaded.run.cfg, loaded.run.plan, loaded.run.tokenizer)
    if predicted is None:
        return f"{loaded.identity.digest[:12]}, drawn or added to in part, so not compared with the files"
    if differing := differences(found, predicted.as_dict()):
        raise ModelError(
            f"{loaded.identity.checkpoint} was not loaded as it is stored: {'; '.join(differing)} (there: in "
            "the files). The reference would be another model than the one that was named."
        )
    return f"{loaded.identity.digest[:12]}, loaded bit for bit as in {loaded.identity.checkpoint}"


def _figures(proof: Proof, plan: ReferencePlan, approximation: Approximation | None) -> Findings:
    spread = proof.log_ratios
    verdict = f"equal: at most {proof.max_difference:.2g} nats a token apart"
    if not plan.equals_starting_policy:
        verdict = f"another policy, as asked: up to {proof.max_difference:.3g} nats a token apart"
    elif approximation is not None:
        verdict = f"equal but for the approximation: up to {proof.max_difference:.3g} nats a token apart"
    error = {} if approximation is None else {"approximation": approximation.sentence()}
    return error | {
        "policy and reference": f"{verdict}, on {proof.num_tokens} tokens",
        "policy − reference, a token": _quantiles(spread.per_token),
        "the same, a completion": _quantiles(spread.per_sequence),
        "noise of other batch shapes": (
            f"{proof.noise.nats:.2g} nats a token in {str(proof.noise.dtype).removeprefix('torch.')}; "
            f"up to {proof.tolerance:.1g} is equal"
        ),
    }


def _quantiles(spread: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {spread[name]:.2g}" for name in ("min", "p05", "median", "p95", "max"))


def cached_records(loaded: Loaded) -> Findings:
    """Score a few cached records again, where there are any.

    Raises:
        ModelError: They do not hold what the reference answers.
    """
    run, identity = loaded.run, loaded.identity
    if not run.plan.kept:
        return {}
    references = Inventory(run.cfg.reference.cache).references()
    if not any(each.identity == identity.digest for each in references):
        return {"cached records": "none of this reference"}
    store = open_store(run.cfg, identity, tell=lambda sentence: warn(run.console, sentence))
    checked = spot_check(run.data.sample, loaded.reference, loaded.second or loaded.policy.scorer, store)
    if checked.distrusted:
        raise ModelError(
            f"{checked.distrusted[0]} does not hold what this reference answers, by more than "
            f"{checked.tolerance:.1g} nats a token. It is set aside; the next run scores its completions "
            "again."
        )
    if not checked.completions:
        return {"cached records": f"{len(store):,}, none of them of this data"}
    return {
        "cached records": (
            f"{len(store):,}; {checked.completions} of this data scored again, at most "
            f"{checked.max_difference:.2g} nats a token apart"
        )
    }


def tell_findings(console: Console, plan: ReferencePlan, findings: Findings) -> Findings:
    """Print what was found, and hand it on."""
    title = f"Reference: {plan.source}" + (f", {plan.schedule}" if plan.schedule else "")
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, found in findings.items():
        table.add_row(what, Text(found))
    console.print(table)
    return findings
