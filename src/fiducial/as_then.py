"""Of a finished run: is its reference still what it was?

Is it loaded from the same weights as then, does it answer as it did, and do the cached records still say so?
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from rich.console import Console

from fiducial.data.dataset import TokenizedDataset
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import DataError, ModelError
from fiducial.finished import FinishedRun, require_fits
from fiducial.model.loader import ModelLoader
from fiducial.model.precision import resolve_precision
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.offline import kept_to_cache
from fiducial.prepare import main_console, read_run, typical_groups
from fiducial.reference.facts import gather_facts
from fiducial.reference.identity import Identity
from fiducial.reference.moving import build_follower, load_moved, require_moved
from fiducial.reference.named_adapter import put_named_adapter
from fiducial.reference.noise import SERVED_ALLOWANCE, logps_of, measure_noise
from fiducial.reference.plan import ReferencePlan, Source, plan_reference
from fiducial.reference.predicted import identify_loaded, predict_identity
from fiducial.reference.sources import Served
from fiducial.run_record import Answers, RunRecord, moved_weights, require_same_reference
from fiducial.verification import (
    WITHIN_SERVER,
    Findings,
    Loaded,
    cached_records,
    load_to_prove,
    tell_findings,
)

_DIFFERENT_ANSWERS = (
    "the reference's weights are those of then",
    "The model's code or the libraries have changed since, or what was moved is not what was kept.",
)
_DIFFERENT_SERVER = (
    "the server, the model's name and its revision are those of then",
    "The server has other weights under that name, or computes in another way.",
)


def verify_finished(finished: FinishedRun, *, console: Console | None = None) -> Findings:
    """Whether the reference of a finished run is still what it was.

    Raises:
        ModelError: it is not; the message names what differs.
    """
    console = console or main_console()
    with kept_to_cache(finished.cfg, console):
        return _verify(finished, console)


def _verify(finished: FinishedRun, console: Console) -> Findings:
    record = finished.record
    assert record is not None, "a folder without a record was refused"
    facts = gather_facts(finished.cfg)
    plan = plan_reference(finished.cfg, facts)
    require_fits(finished.folder, finished.cfg, facts)
    if record.reference is None:
        return tell_findings(console, plan, {"nothing to verify": plan.why})
    try:
        run = replace(read_run(finished.cfg, console), record=record)
    except DataError as error:
        return tell_findings(console, plan, _weights_alone(finished, plan, record, str(error)))
    loaded = load_to_prove(run)
    findings = (
        _same(record, plan, loaded.identity) | _answers_as_then(loaded, record) | cached_records(loaded)
    )
    if plan.sync is not None:
        findings |= _moved_as_then(loaded, finished, record)
    return tell_findings(console, plan, findings)


def _same(record: RunRecord, plan: ReferencePlan, identity: Identity) -> Findings:
    computed = require_same_reference(record, identity.as_dict())
    findings = {"weights": f"{identity.digest[:12]}, the same as when the run started"}
    if plan.source is Source.ENDPOINT:
        findings = {"name": "the same server, model and revision as then", "weights": WITHIN_SERVER}
    return findings | ({"computed otherwise": "; ".join(computed)} if computed else {})


def _weights_alone(finished: FinishedRun, plan: ReferencePlan, record: RunRecord, why: str) -> Findings:
    cfg = finished.cfg
    tokenizer = load_tokenizer(cfg)
    identity = predict_identity(cfg, plan, tokenizer)
    if identity is None:
        second = plan.source is Source.SEPARATE_MODEL
        model: Any = ModelLoader(cfg, tokenizer, reference_model=second).load()[0]
        put_named_adapter(plan, model, pickle=cfg.model.allow_pickle_weights)
        scorer = Scorer(model, layout="padded", autocast=resolve_precision(cfg).autocast)
        identity = identify_loaded(cfg, plan, tokenizer, scorer)
    findings = _same(record, plan, identity)
    if plan.sync is not None and (then := moved_weights(finished.record, finished.folder)):
        require_moved(finished.folder, then)
        findings["moved reference"] = f"{then[:12]}, the same weights as then"
    return findings | {"log-probs": f"not compared, without the run's data: {why}"}


def _answers_as_then(loaded: Loaded, record: RunRecord) -> Findings:
    groups = list(_find(loaded.run.data.sample, record.start))
    if not groups:
        return {"log-probs": "not compared: the rows they were recorded on are no longer in the data"}
    assert record.start is not None, "it has keys"
    return {"log-probs": _compare(loaded, groups, record.start)}


def _moved_as_then(loaded: Loaded, finished: FinishedRun, record: RunRecord) -> Findings:
    run, second = loaded.run, loaded.second
    assert run.plan.sync is not None
    follower = build_follower(loaded.policy.model, None if second is None else second.model, run.plan.sync)
    then = moved_weights(finished.record, finished.folder)
    load_moved(follower, finished.folder, then)
    weights = f"{then[:12]}, the same weights as then" if then else "loaded"
    groups = list(_find(run.data.sample, record.moved))
    if record.moved is None or not groups:
        answers = "its log-probs were not recorded on rows that are still there"
    else:
        answers = _compare(loaded, groups, record.moved)
    return {"moved reference": f"{weights}; {answers}"}


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


def _compare(loaded: Loaded, groups: Sequence[TokenizedGroup], then: Answers) -> str:
    """Score `groups` again; a sentence where the reference answers as it did."""
    scorer = loaded.policy.scorer
    batch = scorer.pack(groups)
    _, noise = measure_noise(scorer, groups, batch)
    now = logps_of(loaded.reference, batch)
    known = dict(zip(then.keys, then.logps, strict=True))
    before = torch.tensor([value for group in groups for key in group.keys for value in known[key]])
    difference = (now - before).abs().max().item()
    served = isinstance(loaded.reference, Served)
    # Other hardware and other libraries may have computed it then.
    allowance = SERVED_ALLOWANCE if served else noise.tolerance(same_arithmetic=False)
    tolerance = max(then.tolerance, allowance)
    if not difference <= tolerance:
        what, why = _DIFFERENT_SERVER if served else _DIFFERENT_ANSWERS
        raise ModelError(
            f"{what}, and it answers differently: by up to {difference:.3g} nats a token on {len(now)} "
            f"tokens, where {tolerance:.1g} can be rounding. {why}"
        )
    return f"as then: {len(now)} tokens scored again, at most {difference:.2g} nats a token apart"
