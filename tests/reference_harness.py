"""What contract tests of references do: load by a plan, ask, train a few steps."""

from pathlib import Path

import torch
from torch import Tensor

from fiducial.config.schema import RunConfig
from fiducial.model.held_once import share_frozen_weights
from fiducial.model.loader import ModelLoader
from fiducial.model.scoring import Scorer
from fiducial.reference.cache import LogpStore, score_reference
from fiducial.reference.fingerprint import identify
from fiducial.reference.named_adapter import put_named_adapter, take_named_adapter
from fiducial.reference.one_pass import beside_policy, in_one_pass
from fiducial.reference.plan import ReferencePlan, Schedule, Source
from fiducial.reference.sources import LiveReference, Reference, build_reference, build_scoring_reference
from tiny import random_groups, tiny_tokenizer

GROUPS = random_groups(4)


def load_policy(cfg: RunConfig) -> Scorer:
    model, _ = ModelLoader(cfg, tiny_tokenizer()).load()
    return Scorer(model.train(), layout="packed")


def second_model(cfg: RunConfig, plan: ReferencePlan) -> Scorer | None:
    if plan.source is not Source.SEPARATE_MODEL:
        return None
    model, _ = ModelLoader(cfg, tiny_tokenizer(), reference_model=True).load()
    return Scorer(model, layout="packed")


def reference_by_plan(plan: ReferencePlan, cfg: RunConfig, policy: Scorer, folder: Path) -> Reference:
    second = second_model(cfg, plan)
    put_named_adapter(plan, policy.model, pickle=False)
    if plan.frozen_held_once:
        assert second is not None
        share_frozen_weights(policy.model, second.model)
    if plan.schedule is Schedule.LIVE:
        live = build_reference(plan, policy, second)
        if not (plan.shared_layers or plan.gathered_once):
            return live
        assert isinstance(live, LiveReference)
        depth, in_step = plan.shared_layers, plan.gathered_once
        scorer = second or policy
        return in_one_pass(live, scorer, policy, depth, GROUPS, tolerance=0, in_step=in_step)
    store = LogpStore(folder, identify(plan, second or policy))
    source = build_scoring_reference(plan, policy, second)
    score_reference(GROUPS, source, second or policy, store, token_budget=96)
    take_named_adapter(plan, policy.model)
    return build_reference(plan, policy, store=store)


def answers(reference: Reference, policy: Scorer) -> Tensor:
    logps = reference.token_logps(policy.pack(GROUPS))
    assert logps is not None
    return logps.values


def train(policy: Scorer, reference: Reference, steps: int = 3) -> None:
    parameters = [value for value in policy.model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        batch = policy.pack(GROUPS)
        with beside_policy(reference, batch) as compared:
            scored = policy(batch)
        ratios = scored.reduce().sum - compared().reduce().sum
        margins = ratios[0::2] - ratios[1::2]
        (-torch.nn.functional.logsigmoid(0.1 * margins).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def furthest(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()
