"""Losses of several completions of one prompt, stored best first.

Notation: a log-ratio is policy minus reference, of whole completions. Groups are laid out as rows; where one
has fewer completions than the longest, `present` is False and the value 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fiducial.config.methods import MethodConfig
from fiducial.logps import Comparison, Completions, SequenceLogps
from fiducial.losses.loss import Loss
from fiducial.losses.output import LossOutput
from fiducial.sending import sent

Rows = Float[Tensor, "groups most"]
Present = Bool[Tensor, "groups most"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each completion of a batch stands when groups are rows."""

    row: Tensor
    column: Tensor
    present: Present

    @classmethod
    def of(cls, completions: Completions) -> "Layout":
        """Completion k of group g at [g, k]."""
        row, sizes = completions.group, completions.sizes
        column = [place for size in sizes for place in range(size)]
        most = max(sizes, default=1)
        present = [[place < size for place in range(most)] for size in sizes]
        return cls(
            row,
            sent(torch.tensor(column, dtype=torch.long), row.device),
            sent(torch.tensor(present, dtype=torch.bool).reshape(-1, most), row.device),
        )

    def lay(self, values: Float[Tensor, " sequences"]) -> Rows:
        """One value a completion, as rows."""
        blank = values.new_zeros(self.present.shape)
        return blank.index_put((self.row, self.column), values)


def listwise(function: Callable[..., LossOutput]) -> Callable[[MethodConfig], Loss]:
    """A row of the table: `function` of log-ratios, scores, who is present, and hyperparameters."""

    def build(method: MethodConfig) -> Loss:
        settings = method.hyperparameters

        def loss(comparison: Comparison) -> LossOutput:
            layout = Layout.of(comparison.completions)
            ratios = comparison.policy.sum
            if comparison.reference is not None:
                ratios = ratios - comparison.reference.sum
            rows, present = layout.lay(ratios), layout.present
            if method.needs_scores:
                scores = layout.lay(comparison.completions.score.to(rows.dtype))
                return function(rows, present, scores, **settings)
            return function(rows, present, **settings)

        return Loss(loss, method.needs_reference)

    return build


def plackett_luce_loss(ratios: Rows, present: Present, *, beta: float) -> LossOutput:
    """-Σ_k log(exp(β·ratio_k) / Σ_{j ≥ k} exp(β·ratio_j)); of two completions it is DPO's loss.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, appendix A.3.
    """
    rewards = beta * ratios
    most = rewards.shape[1]
    # A completion that is not there looks at itself alone: log of 1, and no gradient.
    after = torch.ones(most, most, dtype=torch.bool, device=rewards.device).triu()
    seen = (after & present[:, None, :]) | torch.eye(most, dtype=torch.bool, device=rewards.device)
    totals = rewards[:, None, :].expand(-1, most, -1).masked_fill(~seen, -torch.inf).logsumexp(2)
    return _output((totals - rewards).sum(1), rewards, present)


def info_nca_loss(
    ratios: Rows, present: Present, scores: Rows, *, beta: float, temperature: float
) -> LossOutput:
    """-Σ_k softmax(score/α)_k · log softmax(β·ratio)_k.

    Chen et al. 2024, https://arxiv.org/abs/2402.05369, its expectation over the K completions given.
    """
    rewards = beta * ratios
    logps = rewards.masked_fill(~present, -torch.inf).log_softmax(1).masked_fill(~present, 0)
    return _output(-(_shares(scores, present, temperature) * logps).sum(1), rewards, present)


def nca_loss(ratios: Rows, present: Present, scores: Rows, *, beta: float, temperature: float) -> LossOutput:
    """-Σ_k [softmax(score/α)_k · log σ(β·ratio_k) + 1/K · log σ(-β·ratio_k)].

    Chen et al. 2024, https://arxiv.org/abs/2402.05369. A pair whose scores are far apart: `nca_pair`.
    """
    rewards = beta * ratios
    equal = present / present.sum(1, keepdim=True).clamp(min=1)
    shares = _shares(scores, present, temperature)
    loss = -(shares * F.logsigmoid(rewards) + equal * F.logsigmoid(-rewards)).sum(1)
    return _output(loss, rewards, present)


def tpo_loss(comparison: Comparison, *, beta: float, gold_weight: float) -> LossOutput:
    """-log σ(β·(preferred - worse)) on bare log-probs, plus gold_weight times the gold's NLL per token.

    Saeidi et al. 2024, https://arxiv.org/abs/2405.16681; the gold's term per token as in their code.
    """
    gold, preferred, worse = (comparison.policy.at(slice(place, None, 3)) for place in range(3))
    preferred_reward, worse_reward = beta * preferred.sum, beta * worse.sum
    loss = -F.logsigmoid(preferred_reward - worse_reward) - gold_weight * gold.mean
    return _beside_gold(LossOutput.of_rewards(loss, preferred_reward, worse_reward), comparison.policy)


def tpo_l_loss(
    comparison: Comparison, *, beta: float, target_margin: float, gold_weight: float
) -> LossOutput:
    """-log σ(β·(preferred - worse) - γ) on mean log-probs, plus gold_weight times the gold's NLL per token.

    Saeidi et al. 2024, https://arxiv.org/abs/2405.16681, TPO-L.
    """
    gold, preferred, worse = (comparison.policy.at(slice(place, None, 3)).mean for place in range(3))
    preferred_reward, worse_reward = beta * preferred, beta * worse
    loss = -F.logsigmoid(preferred_reward - worse_reward - target_margin) - gold_weight * gold
    return _beside_gold(LossOutput.of_rewards(loss, preferred_reward, worse_reward), comparison.policy)


def _beside_gold(output: LossOutput, policy: SequenceLogps) -> LossOutput:
    """`output` with log-probs and lengths of the two completions its rewards compare, and of the gold."""
    metrics = dict(output.metrics)
    for place, name in enumerate(("gold", "chosen", "rejected")):
        one = policy.detach().at(slice(place, None, 3))
        metrics |= {f"logps/{name}": one.sum, f"lengths/{name}": one.num_tokens}
    return replace(output, metrics=metrics)


def comparing(function: Callable[..., LossOutput]) -> Callable[[MethodConfig], Loss]:
    """A row of the table: `function` of the whole comparison and hyperparameters."""

    def build(method: MethodConfig) -> Loss:
        settings = method.hyperparameters
        return Loss(lambda comparison: function(comparison, **settings), method.needs_reference)

    return build


def _shares(scores: Rows, present: Present, temperature: float) -> Rows:
    """Softmax of the scores; 0 where nothing is."""
    return (scores / temperature).masked_fill(~present, -torch.inf).softmax(1).masked_fill(~present, 0)


def _output(loss: Float[Tensor, " groups"], rewards: Rows, present: Present) -> LossOutput:
    """Metrics compare the best completion with the mean of the others, and with each of them in accuracy."""
    rewards = rewards.detach()
    best, others = rewards[:, :1], rewards[:, 1:]
    there = present[:, 1:]
    count = there.sum(1).clamp(min=1)
    rest = (others * there).sum(1) / count
    above = 0.5 * ((best - others).sign() + 1)
    return LossOutput(
        loss,
        {
            "rewards/chosen": best[:, 0],
            "rewards/rejected": rest,
            "rewards/margins": best[:, 0] - rest,
            "rewards/accuracies": (above * there).sum(1) / count,
        },
    )
