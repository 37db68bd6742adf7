"""Losses of the DPO family that read all pairs of an optimizer step; notation as in `paired`."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from fiducial.config.methods import MethodConfig
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import PairLogps
from fiducial.losses.loss import Loss
from fiducial.losses.output import LossOutput
from fiducial.losses.paired import PerPair, log_ratios, pairwise, smoothed_logistic, with_rewards

LEAST_BETA = 1e-3
"""What β-DPO's beta never falls below, as in its authors' code: below 0 it would learn the rejected ones."""

LEAST_DEVIATION = 1e-3
"""What the deviation of margins is taken for at least, in nats. Before step 1 they differ by rounding alone,
which is another for every cut of a step."""


def bco_pair(method: MethodConfig) -> Loss:
    """BCO, which reads the whole step only where delta runs along."""
    running = {"delta": 0.0, "num_rewards": 0.0} if method.model_dump()["running_delta"] else None
    return pairwise(bco_pair_loss, running=running)(method)


def bco_pair_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    running_delta: bool,
    delta: float = 0.0,
    num_rewards: float = 0.0,
) -> LossOutput:
    """-log σ(chosen reward - δ) - log σ(δ - rejected reward).

    δ is the mean of all rewards so far, chosen and rejected, this step's among them; it carries no gradient.
    Jung et al. 2024, https://arxiv.org/abs/2404.04656.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(policy, reference))
    if running_delta:
        seen = torch.cat([chosen, rejected]).detach()
        total = delta * num_rewards + seen.sum().item()
        num_rewards += len(seen)
        delta = total / max(num_rewards, 1)
    loss = -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
    output = LossOutput.of_rewards(loss, chosen, rejected)
    if not running_delta:
        return output
    metrics = {**output.metrics, "delta": loss.new_full((1,), delta)}
    return LossOutput(loss, metrics, {"delta": delta, "num_rewards": num_rewards})


def aot_loss(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> LossOutput:
    """DPO's loss of the gap between the policy's and the reference's log(chosen) - log(rejected), by rank.

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, paired.
    """
    gaps = policy.chosen.sum - policy.rejected.sum
    expected = reference.chosen.sum - reference.rejected.sum
    loss = smoothed_logistic(beta * (gaps - _of_equal_rank(gaps, expected)), label_smoothing)
    return with_rewards(loss, policy, reference, beta=beta)


def aot_unpaired_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> LossOutput:
    """DPO's loss of the gap between chosen and rejected log-ratios of equal rank.

    Melnyk et al. 2024, https://arxiv.org/abs/2406.05882, unpaired.
    """
    chosen, rejected = log_ratios(policy, reference)
    loss = smoothed_logistic(beta * (chosen - _of_equal_rank(chosen, rejected)), label_smoothing)
    return with_rewards(loss, policy, reference, beta=beta)


def beta_dpo_loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    beta_scaling: float,
    momentum: float,
    keep_share: float,
    **running: float,
) -> LossOutput:
    """-log σ(β'·margin) of the pairs kept, β' = β(1 + α(mean margin of those - its running mean)).

    A share of the pairs is kept, drawn without replacement by how near their margin is to the running mean,
    in running standard deviations. Wu et al. 2024, https://arxiv.org/abs/2407.08639. The margin is that of
    the log-ratios themselves, not times β, as in the authors' code, which α is tuned to. Mean and deviation
    (`running`) start from those of the first step, theirs from 0. A pair that is not kept has loss 0, and the
    others count more, so that the mean over the step is the mean over the pairs kept.
    """
    chosen, rejected = log_ratios(policy, reference)
    margin = chosen - rejected
    seen = margin.detach()
    num_steps = running["num_steps"]
    old = momentum if num_steps else 0.0
    mean = old * running["mean"] + (1 - old) * seen.mean().item()
    deviation = old * running["deviation"] + (1 - old) * seen.std(correction=0).item()
    gap = (policy.chosen.sum - policy.rejected.sum).detach()
    kept = _kept(seen, gap, mean, deviation, share=keep_share, seed=int(num_steps))
    adapted = beta * (1 + beta_scaling * (seen[kept].mean() - mean))
    adapted = adapted.clamp(min=LEAST_BETA)
    loss = torch.where(kept, -F.logsigmoid(adapted * margin), 0.0) * (len(kept) / kept.sum())
    output = with_rewards(loss, policy, reference, beta=beta)
    return LossOutput(
        loss,
        {**output.metrics, "beta": adapted.reshape(1), "kept": kept.to(loss.dtype)},
        {"mean": mean, "deviation": deviation, "num_steps": num_steps + 1},
    )


BETA_DPO_START = {"mean": 0.0, "deviation": 0.0, "num_steps": 0.0}


def sft_loss(policy: PairLogps, *, mean_count: float) -> LossOutput:
    """-log(chosen) over the mean number of chosen tokens of the step's pairs.

    Its mean over the step is the mean over all chosen tokens: the supervised part of mixed preference
    optimisation, Wang et al. 2024, https://arxiv.org/abs/2411.10442.
    """
    loss = -policy.chosen.unweighted.sum / mean_count
    return LossOutput.of_rewards(loss, policy.chosen.unweighted.mean, policy.rejected.unweighted.mean)


def chosen_tokens(group: TokenizedGroup) -> int:
    """How many tokens the chosen completion has."""
    return len(group.completions[0])


def _of_equal_rank(values: PerPair, others: PerPair) -> PerPair:
    """For each value the one of `others` of the same rank: sorting is optimal transport on a line."""
    rank = values.detach().argsort(stable=True).argsort()
    ordered: Tensor = others.sort(stable=True).values
    return ordered[rank]


def _kept(
    margins: PerPair, gaps: PerPair, mean: float, deviation: float, *, share: float, seed: int
) -> Bool[Tensor, " pairs"]:
    """Which pairs are drawn, with probability in proportion to a normal density at their margin.

    The largest of log-weight + Gumbel noise are such a draw (Efraimidis and Spirakis 2006). Noise goes by the
    rank of a pair's gap between log-probs, so that it does not matter how the step was cut and which process
    holds which pair. Margins would not do: before step 1 all are 0.
    """
    count = max(int(share * len(margins)), 1)
    uniform = torch.rand(len(margins), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = -torch.log(-torch.log(uniform)).to(margins)
    away = (margins - mean) / max(deviation, LEAST_DEVIATION)
    rank = gaps.argsort(stable=True).argsort()
    keys = noise[rank] - 0.5 * away.square()
    kept = torch.zeros_like(margins, dtype=torch.bool)
    kept[keys.topk(count).indices] = True
    return kept
