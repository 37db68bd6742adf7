"""The gradient of one optimizer step, cut into forward passes and shared by processes in many ways.

Run as a file it is one of two processes, started by torchrun from test_any_cut.py.
"""

import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch import distributed as dist
from transformers import PreTrainedModel

from fiducial.config import methods
from fiducial.config.methods import MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import Comparison
from fiducial.losses import LOSSES, Loss, build_loss
from fiducial.losses.output import LossOutput
from fiducial.model.scoring import Scorer
from fiducial.reference.sources import NoReference
from fiducial.training.objective import Objective
from tiny import random_groups, tiny_model
from training_harness import StoredReference

GROUPS = 8


def sorted_gaps(comparison: Comparison, *, scale: float) -> LossOutput:
    """A loss of nothing but the whole step: gaps of sorted log-ratios, and a number it carries on."""
    assert comparison.reference is not None
    ratios = comparison.policy.sum - comparison.reference.sum
    gaps = ratios[0::2].sort()[0] - ratios[1::2].sort()[0]
    carried = 0.9 * scale + 0.1 * gaps.detach().mean().item()
    return LossOutput((1 - scale * gaps).square(), {"gaps": gaps.detach()}, {"scale": carried})


def about_the_mean(comparison: Comparison, *, centre: Tensor, mean_count: float) -> LossOutput:
    """A loss of single completions, told two things of the whole step."""
    loss = (comparison.policy.sum / mean_count - centre).square()
    return LossOutput(loss, {"centre": centre.reshape(1)})


def part(group: TokenizedGroup, index: int) -> TokenizedGroup:
    return TokenizedGroup(group.prompt, group.completions[index : index + 1])


MADE_UP = {
    "whole step": Loss(sorted_gaps, True, whole_step=True, running={"scale": 0.3}),
    "foreknown": Loss(
        about_the_mean,
        False,
        trained=lambda group: part(group, 0),
        ahead=lambda group: part(group, 1),
        foreknow=lambda comparison: {"centre": comparison.policy.mean.mean()},
        count=lambda group: len(group.completions[0]),
    ),
}
"""One loss for each thing that a loss may be told of the whole step."""


MODIFIED: dict[str, MethodConfig] = {
    "mixture": methods.MixtureConfig(
        losses=(
            methods.DPOConfig(ld_alpha=0.3, use_weighting=True),
            methods.BCOPairConfig(ld_alpha=0.3, use_weighting=True),
            methods.AOTConfig(ld_alpha=0.3),
            methods.SFTConfig(),
        ),
        weights=(0.8, 0.3, 0.5, 1.0),
    ),
    "mixture of pairs": methods.MixtureConfig(
        losses=(methods.DPOConfig(), methods.IPOConfig()), weights=(0.8, 2.0)
    ),
    "ld_alpha": methods.DPOConfig(ld_alpha=0.3, rpo_alpha=0.5),
    "ld_alpha of a whole step": methods.AOTConfig(ld_alpha=0.3),
    "use_weighting": methods.DPOConfig(use_weighting=True),
    "f_divergence_type": methods.DPOConfig(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.3),
}
"""What a user may do to a loss of the table: weighted sums, and every modifier."""


def losses() -> dict[str, Loss]:
    table = {name(config): build_loss(GENTLE.get(config, config())) for config in LOSSES}
    return MADE_UP | table | {modified: build_loss(method) for modified, method in MODIFIED.items()}


GENTLE: dict[type[MethodConfig], MethodConfig] = {
    methods.BetaDPOConfig: methods.BetaDPOConfig(beta_scaling=0.02)
}
"""Margins here are tens of nats: at its default scaling beta falls to its floor and nothing is learned."""


def groups_of_the_step(loss: str) -> list[TokenizedGroup]:
    """Pairs, or what `loss` reads instead of them: labelled completions, beside a mismatched one or not."""
    if loss in LISTS:
        return [
            TokenizedGroup(group.prompt, group.completions, (2.0, 0.5, -1.0))
            for group in random_groups(GROUPS, longest=12, completions=3)
        ]
    pairs = random_groups(GROUPS, longest=12)
    if loss == "odpo":
        return [TokenizedGroup(pair.prompt, pair.completions, (2.0, 0.5)) for pair in pairs]
    if loss not in SINGLES:
        return pairs
    return [
        TokenizedGroup(
            pair.prompt,
            (pair.completions[1 - mismatched], pair.completions[mismatched])[: SINGLES[loss]],
            (1.0 if number % 3 else -1.0, math.nan)[: SINGLES[loss]],
        )
        for number, (pair, mismatched) in enumerate(zip(pairs, MISMATCHED, strict=True))
    ]


LISTS = ("plackett_luce", "info_nca", "nca", "tpo", "tpo_l")
"""Losses of several completions of one prompt, which are told their scores."""
SINGLES = {"kto": 2, "apo_zero_unpaired": 1}
"""Losses of labelled completions, and how many completions their groups hold."""
MISMATCHED = (0, 0, 0, 1, 1, 0, 1, 1)
"""Which of each pair stands for the mismatched completion: so that KTO's reference point is above zero."""


def name(config: type[MethodConfig]) -> str:
    return str(config.model_fields["name"].default)


@cache
def policy(dropout: float = 0.0) -> PreTrainedModel:
    """A LoRA policy: its few gradients are quickly compared. One for all losses, which take no step."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    model = get_peft_model(tiny_model(num_hidden_layers=1), config)
    with torch.no_grad():
        for parameter_name, value in model.named_parameters():
            if "lora_B" in parameter_name:
                value.normal_(std=0.1)
    return model


def cut(groups: Sequence[TokenizedGroup], passes: int) -> list[list[TokenizedGroup]]:
    """As evenly as it goes; a pass may be empty."""
    return [list(groups[index::passes]) for index in range(passes)]


@cache
def reference() -> StoredReference:
    """Another model, which scores each completion once for all losses."""
    return StoredReference(Scorer(tiny_model(seed=1, num_hidden_layers=1), layout="packed"), ())


def objective_of(loss: Loss, groups: Sequence[TokenizedGroup], *, dropout: float = 0.0) -> Objective:
    """`loss` of a policy that has moved, against the stored log-probs of another model."""
    objective = Objective(Scorer(policy(dropout), layout="packed"), NoReference(), loss)
    for part in objective.parts(groups):
        reference().add(part)
    objective.reference = reference()
    return objective


def gradient(loss: Loss, passes: Sequence[Sequence[TokenizedGroup]], *, dropout: float = 0.0) -> Tensor:
    """Of the mean loss over the step's groups, as one vector; processes add theirs up.

    The last two numbers are the mean loss and the sum of what the loss carries on.
    """
    objective = objective_of(loss, [group for part in passes for group in part], dropout=dropout)
    model = objective.scorer.model
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    trained, ahead = zip(*map(objective.parts, passes), strict=True)
    step, total = objective.step(trained, ahead if loss.ahead else ()), torch.zeros(())
    for index in range(len(passes)):
        output = step(index).output
        (output.loss.sum() / GROUPS).backward()
        total += output.loss.detach().sum() / GROUPS
    step.finish()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
    result = torch.cat([flat, total[None]])
    if dist.is_initialized():
        dist.all_reduce(result)
    return torch.cat([result, torch.tensor([sum(objective.running.values())])])


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    own = slice(0, 5) if dist.get_rank() == 0 else slice(5, GROUPS)
    found = {
        name: gradient(loss, cut(groups_of_the_step(name)[own], 4))  # one pass is empty
        for name, loss in losses().items()
    }
    if dist.get_rank() == 0:
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
