"""What is known of a run before weights are loaded, and its models loaded for scoring."""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fiducial.agreement import all_or_none
from fiducial.config.load import validate_config
from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.labels import fit_to_method
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ConfigError
from fiducial.losses import build_loss
from fiducial.model.layout import LayoutChoice, choose_layout
from fiducial.model.loader import ModelLoader
from fiducial.model.offload import is_offloaded
from fiducial.model.precision import resolve_precision
from fiducial.model.quantisation import is_quantised
from fiducial.model.scoring import Scorer
from fiducial.model.tokenizer import load_tokenizer
from fiducial.policy_base import identify_base, require_same_base
from fiducial.processes import is_first_process
from fiducial.reference.facts import Facts, gather_facts
from fiducial.reference.identity import Identity
from fiducial.reference.kinds import ReferencePlan, Schedule, Source
from fiducial.reference.plan import plan_reference
from fiducial.reference.setup import setup_reference_model
from fiducial.reference.shapes import LEARNED_POSITIONS
from fiducial.run_record import RunRecord
from fiducial.training.arguments import world_size
from fiducial.training.failures import memory_explained

PROOF_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run before weights are loaded."""

    cfg: RunConfig
    facts: Facts
    plan: ReferencePlan
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    console: Console
    record: RunRecord | None = None
    """What an earlier start of the same run left; its reference must still be the same."""
    settings: Mapping[str, Any] | None = None
    """The run in the keys of the YAML dialect, where it was given in them."""

    @property
    def precomputes(self) -> bool:
        """Whether the reference is scored before step 1."""
        return self.plan.schedule is Schedule.PRECOMPUTED


@dataclass(frozen=True, slots=True)
class Policy:
    """The model that trains, and how groups are laid out for it."""

    model: PreTrainedModel
    scorer: Scorer
    layout: LayoutChoice
    micro_batch_tokens: int
    base: Identity | None = None
    """Which weights its adapter is on, in the process that compared them with those of an earlier start."""


def read_run(
    cfg: RunConfig | Mapping[str, Any], console: Console | None = None, *, trains: bool = True
) -> Run:
    """Check, plan, and read the data; every mistake that needs no weights is found here.

    Data that only evaluates need not be what a method can learn from.

    Raises:
        FiducialError: the config, the plan, a checkpoint's files, or the data are wrong.
    """
    checked = validate_config(cfg)
    _require_trainable(checked)
    facts = gather_facts(checked)
    plan = plan_reference(checked, facts)
    tokenizer = load_tokenizer(checked)
    data = load_groups(checked, tokenizer, num_processes=world_size())
    assert checked.method is not None, "required"
    assert checked.data is not None, "required"
    data = fit_to_method(
        data,
        checked.method,
        sequence_len=checked.data.sequence_len,
        trains=trains,
    )
    _compare_positions(facts, data)
    return Run(checked, facts, plan, tokenizer, data, console or main_console())


def main_console() -> Console:
    """One process of a distributed run speaks for all of them."""
    return Console(quiet=not is_first_process())


@memory_explained("loading the model")
def load_policy(run: Run, device: torch.device, micro_batch_tokens: int) -> Policy:
    """The starting policy on `device`, in the layout it was measured to allow: in every process or none.

    Raises:
        ModelError: its base is not the one an earlier start of the run trained an adapter on.
    """
    with all_or_none():
        model, _ = ModelLoader(run.cfg, run.tokenizer).load()
        scorer, layout = _scorer(run, model, device)
        base = None
        if run.record is not None and is_first_process():
            base = identify_base(run.cfg, run.facts, run.plan, scorer)
            if base is not None:
                require_same_base(run.record, base.as_dict())
    return Policy(scorer.model, scorer, layout, micro_batch_tokens, base)


def load_second_model(run: Run, device: torch.device) -> Scorer | None:
    """The second model, where the plan's reference is one: in every process or none."""
    if run.plan.source is not Source.SEPARATE_MODEL:
        return None
    with all_or_none():
        live = setup_reference_model(run.cfg, run.tokenizer)
        # An explicit `schedule: precomputed` needs it for the scoring pass alone.
        model = (
            live if live is not None else ModelLoader(run.cfg, run.tokenizer, reference_model=True).load()[0]
        )
        where = torch.device("cpu") if run.cfg.reference.device == "cpu" else device
        return _scorer(run, model, where)[0]


def load_exact_model(run: Run) -> Scorer:
    """The second model held as the policy is, on the CPU, for the moment in which it is compared with."""
    whole = {"dtype": None, "load_in_8bit": False, "load_in_4bit": False, "device": "cpu", "offload": None}
    held = run.cfg.reference.model_copy(update=whole)
    cfg = run.cfg.model_copy(update={"reference": held})
    model, _ = ModelLoader(cfg, run.tokenizer, reference_model=True).load()
    return _scorer(run, model, torch.device("cpu"))[0]


def typical_groups(data: TokenizedDataset) -> list[TokenizedGroup]:
    """A few groups from the shorter half: real rows, and cheap to score a few times."""
    by_length = np.argsort(data.lengths, kind="stable")
    start = len(by_length) // 4
    return [data[int(index)] for index in by_length[start : start + PROOF_GROUPS]]


def _scorer(run: Run, model: Any, device: torch.device) -> tuple[Scorer, LayoutChoice]:
    if not (is_quantised(model) or is_offloaded(model)):  # those are where they are
        model.to(device)
    autocast = resolve_precision(run.cfg, device).autocast
    layout = choose_layout(
        model,
        typical_groups(run.data.sample),
        packing=run.cfg.model.packing,
        longest=run.data.longest,
        autocast=autocast,
    )
    return Scorer(model, layout=layout.layout, autocast=autocast), layout


def _require_trainable(cfg: RunConfig) -> None:
    missing = [key for key, value in {"rl": cfg.method, "datasets": cfg.data}.items() if value is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: needed to train. Write, for example, rl: dpo and "
            "datasets: [{path: pairs.jsonl}]."
        )
    if cfg.method is not None:
        build_loss(cfg.method)  # refuses a method that can only be planned
    if cfg.adapter is not None and cfg.model.unfrozen_parameters is not None:
        raise ConfigError(
            "unfrozen_parameters: weights outside the adapter would be trained and then lost, because an "
            "adapter is saved without its base. Name whole modules with lora_modules_to_save, or remove "
            "adapter."
        )


def _compare_positions(facts: Facts, data: PreparedData) -> None:
    """Note sequences that are longer than those policy or reference were made for.

    Raises:
        ConfigError: one of them has no embedding for the positions beyond.
    """
    for model in filter(None, (facts.model, facts.reference)):
        positions = model.sizes.positions
        if positions is None or data.longest <= positions:
            continue
        told = (
            f"sequences have up to {data.longest} tokens, and {model.location} was made for {positions} "
            "(config.json)"
        )
        if model.model_type in LEARNED_POSITIONS:
            raise ConfigError(f"sequence_len: {told}. Write sequence_len: {positions}.")
        data.audit.notes.append(f"{told}; sequence_len: {positions} leaves longer ones out")


def free_memory() -> None:
    """Give back what a model held that nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()
