"""Proves a reference without training; of a finished run: is its reference still what it was?

Of a run that has not been trained: is the reference the starting policy, on real groups, and are the weights
that were loaded those in the files? Of a finished one: is it loaded from the same weights as then, does it
answer as it did, and do the cached records still say so?
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError, ModelError
from fiducial.finished import FinishedRun, require_fits
from fiducial.model.loader import ModelLoader
from fiducial.model.precision import resolve_precision
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.prepare import (
    Policy,
    Run,
    identify_reference,
    load_policy,
    load_second_model,
    main_console,
    read_run,
    typical_groups,
)
from fiducial.reference.cache.inventory import Inventory
from fiducial.reference.cache.opening import open_store
from fiducial.reference.differences import differences
from fiducial.reference.facts import gather_facts
from fiducial.reference.fill import warn
from fiducial.reference.identity import Identity, identify
from fiducial.reference.moving import build_follower, load_moved
from fiducial.reference.noise import logps_of, measure_noise
from fiducial.reference.plan import ReferencePlan, Source, plan_reference
from fiducial.reference.predicted import predict_identity
from fiducial.reference.sources import SOURCES, Parts, Reference, build_scoring_reference
from fiducial.reference.spot_check import spot_check
from fiducial.reference.verify import Proof, prove_reference, require_adapter_off
from fiducial.run_record import Answers, RunRecord, require_same_reference
from fiducial.training.arguments import training_arguments
from fiducial.training.budget import choose_token_budget

Findings = dict[str, str]
"""What was looked at, and what was found, a line each."""


@dataclass(frozen=True, slots=True)
class _Loaded:
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
    run = read_run(cfg, console or main_console())
    if run.plan.source is Source.NONE:
        return _tell(run.console, run.plan, {"nothing to prove": run.plan.why})
    loaded = _load(run)
    groups = typical_groups(run.data.sample)
    if run.plan.source is Source.ADAPTER_OFF:
        require_adapter_off(loaded.policy.scorer, groups)
    proof = prove_reference(
        loaded.policy.scorer,
        loaded.reference,
        groups,
        expected_equal=run.plan.equals_starting_policy,
        pass_tokens=loaded.policy.micro_batch_tokens,
    )
    findings = {"weights": _as_in_files(loaded)} | _figures(proof, run.plan) | _records(loaded)
    return _tell(run.console, run.plan, findings)


def verify_finished(finished: FinishedRun, *, console: Console | None = None) -> Findings:
    """Whether the reference of a finished run is still what it was.

    Raises:
        ModelError: it is not; the message names what differs.
    """
    record, console = finished.record, console or main_console()
    assert record is not None, "a folder without a record was refused"
    facts = gather_facts(finished.cfg)
    plan = plan_reference(finished.cfg, facts)
    require_fits(finished.folder, finished.cfg, facts)
    if record.reference is None:
        return _tell(console, plan, {"nothing to verify": plan.why})
    try:
        run = replace(read_run(finished.cfg, console), record=record)
    except DataError as error:
        return _tell(console, plan, _weights_alone(finished.cfg, plan, record, str(error)))
    loaded = _load(run)
    findings = _same(record, loaded.identity) | _answers_as_then(loaded, record) | _records(loaded)
    if plan.sync is not None:
        findings |= _moved_as_then(loaded, finished, record)
    return _tell(console, plan, findings)


def _load(run: Run) -> _Loaded:
    args = training_arguments(run.cfg, num_rows=len(run.data.train), has_evaluation=True)
    budget = choose_token_budget(run.cfg, run.facts, run.plan, args.device)
    policy = load_policy(run, args.device, budget)
    second = load_second_model(run, args.device)
    identity = identify_reference(run, policy, second)
    reference = SOURCES[run.plan.source](Parts(run.plan, policy.scorer, second))
    return _Loaded(run, policy, second, reference, identity)


def _as_in_files(loaded: _Loaded) -> str:
    """Compare what was loaded with the checkpoint's files, where that can be told from them."""
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


def _figures(proof: Proof, plan: ReferencePlan) -> Findings:
    spread = proof.log_ratios
    verdict = f"equal: at most {proof.max_difference:.2g} nats a token apart"
    if not plan.equals_starting_policy:
        verdict = f"another policy, as asked: up to {proof.max_difference:.3g} nats a token apart"
    return {
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


def _records(loaded: _Loaded) -> Findings:
    """Score a few cached records again, where there are any."""
    run, identity = loaded.run, loaded.identity
    if not run.precomputes:
        return {}
    references = Inventory(run.cfg.reference.cache).references()
    if not any(each.identity == identity.digest for each in references):
        return {"cached records": "none of this reference"}
    store = open_store(run.cfg, identity, tell=lambda sentence: warn(run.console, sentence))
    reference = build_scoring_reference(run.plan, loaded.policy.scorer, loaded.second)
    checked = spot_check(run.data.sample, reference, loaded.second or loaded.policy.scorer, store)
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


def _same(record: RunRecord, identity: Identity) -> Findings:
    computed = require_same_reference(record, identity.as_dict())
    findings = {"weights": f"{identity.digest[:12]}, the same as when the run started"}
    return findings | ({"computed otherwise": "; ".join(computed)} if computed else {})


def _weights_alone(cfg: RunConfig, plan: ReferencePlan, record: RunRecord, why: str) -> Findings:
    tokenizer = load_tokenizer(cfg)
    identity = predict_identity(cfg, plan, tokenizer)
    if identity is None:
        second = plan.source is Source.SEPARATE_MODEL
        model: Any = ModelLoader(cfg, tokenizer, reference_model=second).load()[0]
        identity = identify(plan, Scorer(model, layout="padded", autocast=resolve_precision(cfg).autocast))
    return _same(record, identity) | {"log-probs": f"not compared, without the run's data: {why}"}


def _answers_as_then(loaded: _Loaded, record: RunRecord) -> Findings:
    groups = list(_find(loaded.run.data.sample, record.start))
    if not groups:
        return {"log-probs": "not compared: the rows they were recorded on are no longer in the data"}
    assert record.start is not None, "it has keys"
    return {"log-probs": _compare(loaded, groups, record.start)}


def _moved_as_then(loaded: _Loaded, finished: FinishedRun, record: RunRecord) -> Findings:
    run, second = loaded.run, loaded.second
    assert run.plan.sync is not None
    follower = build_follower(loaded.policy.model, None if second is None else second.model, run.plan.sync)
    load_moved(follower, finished.folder)
    groups = list(_find(run.data.sample, record.moved))
    if record.moved is None or not groups:
        return {"moved reference": "loaded; its log-probs were not recorded on rows that are still there"}
    return {"moved reference": _compare(loaded, groups, record.moved)}


def _find(data: TokenizedDataset, answers: Answers | None) -> Iterator[TokenizedGroup]:
    """The groups of `data` that the answers are about."""
    wanted = set(() if answers is None else answers.keys)
    likely = typical_groups(data)
    for group in chain(likely, (data[index] for index in range(len(data)))):
        if not wanted:
            return
        if wanted.issuperset(group.keys):
            wanted -= set(group.keys)
            yield group


def _compare(loaded: _Loaded, groups: Sequence[TokenizedGroup], then: Answers) -> str:
    """Score `groups` again; a sentence where the reference answers as it did."""
    scorer = loaded.policy.scorer
    batch = scorer.pack(groups)
    _, noise = measure_noise(scorer, groups, batch)
    now = logps_of(loaded.reference, batch)
    known = dict(zip(then.keys, then.logps, strict=True))
    before = torch.tensor([value for group in groups for key in group.keys for value in known[key]])
    difference = (now - before).abs().max().item()
    # Other hardware and other libraries may have computed it then.
    tolerance = max(then.tolerance, noise.tolerance(same_arithmetic=False))
    if not difference <= tolerance:
        raise ModelError(
            "the reference's weights are those of then, and it answers differently: by up to "
            f"{difference:.3g} nats a token on {len(now)} tokens, where {tolerance:.1g} can be rounding. The "
            "model's code or the libraries have changed since, or what was moved is not what was kept."
        )
    return f"as then: {len(now)} tokens scored again, at most {difference:.2g} nats a token apart"


def _tell(console: Console, plan: ReferencePlan, findings: Findings) -> Findings:
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
