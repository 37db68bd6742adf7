"""The live reference model another trainer must be handed for a run."""

import logging
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.model.loader import ModelLoader
from fiducial.offline import kept_to_cache
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import ReferencePlan, Source, plan_live_reference

logger = logging.getLogger("fiducial")


def setup_reference_model(
    cfg: RunConfig | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel | None:
    """The second model a trainer that scores its reference live must be handed, or None if it needs none.

    None where the loss has no reference, where switching a new adapter off gives it, or where it is scored
    before training. Otherwise a copy of the starting policy (or the checkpoint `reference.model` names): in
    eval mode, frozen, without dropout, on the CPU. TRL's trainers take it as it is.

    Raises:
        FiducialError: The config, the plan, or the checkpoint is wrong.
    """
    run = validate_config(cfg)
    if run.method is None:
        return None
    with kept_to_cache(run):
        return _load_if_needed(run, tokenizer)


def _load_if_needed(run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    plan = plan_live_reference(run, gather_facts(run))
    if not _keeps_second_model(plan):
        for note in plan.notes:
            logger.warning("%s", note)
        if plan.source is Source.FROZEN_ADAPTER:
            logger.warning(
                "The reference is the adapter the run starts from, so there is no second model. The "
                "trainer must keep a frozen copy of that adapter; one that only switches adapters off "
                "would compare with the bare base."
            )
        return None
    model, _ = ModelLoader(run, tokenizer, reference_model=True).load()
    assert isinstance(model, PreTrainedModel)
    return model


def _keeps_second_model(plan: ReferencePlan) -> bool:
    return plan.source is Source.SEPARATE_MODEL and plan.schedule is not None and plan.schedule.beside_policy
