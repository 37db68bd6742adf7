"""Is the base below a run's adapter still what it was, where no reference is that base?

A reference that is the policy's start, or its base, says so itself. Another policy as the reference, a
server, or none says nothing of the base, and an adapter put on another one is another policy.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model.scoring import Scorer
from fiducial.reference.differences import changes
from fiducial.reference.facts import Facts
from fiducial.reference.fingerprint import identify
from fiducial.reference.identity import Identity
from fiducial.reference.kinds import Checkpoint, ReferencePlan, Schedule, Source
from fiducial.reference.predicted import predict_identity
from fiducial.run_record import RunRecord

_LEAVE_THE_BASE = (True, False, None, "gaussian")
"""Starts of an adapter under which the base's weights are those that are stored."""


def identify_base(cfg: RunConfig, facts: Facts, plan: ReferencePlan, policy: Scorer) -> Identity | None:
    """Which weights the policy's adapter is on; None where there is none, or the reference's identity tells.

    It is asked of the starting policy, before weights are sharded.
    """
    if cfg.adapter is None or not _is_elsewhere(plan):
        return None
    start = facts.adapter or cfg.adapter
    return identify(_bare_base(cfg), policy) if start.init_lora_weights in _LEAVE_THE_BASE else None


def require_same_base(record: RunRecord, now: Mapping[str, Any]) -> None:
    """Raise `ModelError` where `now`, the identity of the base, is not the one `record` knows."""
    found = () if record.base is None else changes(record.base, now).another
    if found:
        raise ModelError(
            f"{now['checkpoint']} is not the base this run's adapter was trained on: {'; '.join(found)}. Put "
            "the old weights back (base_model, model_revision), or start the run anew in another output_dir."
        )


def require_stored_base(record: RunRecord, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """As `require_same_base`, of the base in its files, where these tell."""
    if record.base is None:
        return
    now = predict_identity(cfg, _bare_base(cfg), tokenizer)
    if now is not None:
        require_same_base(record, now.as_dict())


def _is_elsewhere(plan: ReferencePlan) -> bool:
    if plan.source is Source.SEPARATE_MODEL:
        return not plan.equals_starting_policy
    return plan.source in (Source.NONE, Source.ENDPOINT)


def _bare_base(cfg: RunConfig) -> ReferencePlan:
    """The base as a reference would be that is the policy with its adapter off."""
    base = Checkpoint(cfg.model.base_model, cfg.model.revision)
    return ReferencePlan(Source.ADAPTER_OFF, Schedule.LIVE, base, why="")
