"""Naive twins of the losses of pairs: each formula as its paper prints it, in float64, pair by pair.

`w` and `v` are the log-ratios of the chosen and the rejected completion, `n` and `m` their token counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from oracles import log_sigmoid, sigmoid, smoothed

Naive = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of all policy sums, reference sums and token counts (chosen, rejected, chosen, …) to one loss a pair."""


def by_pair(formula: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Naive:
    """`formula` of w, v, n, m, one pair at a time."""

    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        ratio = policy - reference
        rows = range(0, len(ratio), 2)
        return torch.stack([formula(ratio[i], ratio[i + 1], tokens[i], tokens[i + 1]) for i in rows])

    return naive


def hinge(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: torch.maximum(torch.zeros_like(w), 1 - beta * (w - v)))


def exo_pair(beta: float, eps: float) -> Naive:
    def formula(w: Tensor, v: Tensor, n: Tensor, m: Tensor) -> Tensor:
        log_q = torch.log_softmax(beta * torch.stack([w, v]), 0)
        p = torch.tensor([1 - eps, eps], dtype=torch.float64)
        return (log_q.exp() * (log_q - p.log())).sum()

    return by_pair(formula)


def nca_pair(beta: float) -> Naive:
    return by_pair(
        lambda w, v, n, m: -(log_sigmoid(beta * w) + (log_sigmoid(-beta * w) + log_sigmoid(-beta * v)) / 2)
    )


def robust(beta: float, eps: float) -> Naive:
    def formula(w: Tensor, v: Tensor, n: Tensor, m: Tensor) -> Tensor:
        right, flipped = -log_sigmoid(beta * (w - v)), -log_sigmoid(beta * (v - w))
        return ((1 - eps) * right - eps * flipped) / (1 - 2 * eps)

    return by_pair(formula)


def bco_pair(beta: float, *, running: bool, delta: float = 0.0, seen: float = 0.0) -> Naive:
    """After `seen` rewards whose mean was `delta`."""

    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        rewards = beta * (policy - reference)
        shift = (delta * seen + rewards.sum().item()) / (seen + len(rewards)) if running else 0.0
        return -log_sigmoid(rewards[0::2] - shift) - log_sigmoid(-(rewards[1::2] - shift))

    return naive


def sppo_hard(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: (w - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2)


def transport(beta: float, eps: float, *, paired: bool) -> Naive:
    """AOT: both samples sorted, and compared rank by rank; values in the order of the better sample."""

    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        ratio = policy - reference
        better = policy[0::2] - policy[1::2] if paired else ratio[0::2]
        worse = reference[0::2] - reference[1::2] if paired else ratio[1::2]
        ranked = sorted(range(len(worse)), key=lambda i: worse[i].item())
        values: list[Tensor] = [better[0]] * len(better)
        for rank, i in enumerate(sorted(range(len(better)), key=lambda i: better[i].item())):
            gap = beta * (better[i] - worse[ranked[rank]])
            values[i] = smoothed(gap, label_smoothing=eps)
        return torch.stack(values)

    return naive


def apo_zero(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: 1 - sigmoid(beta * w) + sigmoid(beta * v))


def apo_down(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: sigmoid(beta * w) + 1 - sigmoid(beta * (w - v)))


def discopop(beta: float, tau: float) -> Naive:
    def formula(w: Tensor, v: Tensor, n: Tensor, m: Tensor) -> Tensor:
        z = beta * (w - v)
        return sigmoid(-z / tau) * -log_sigmoid(z) + torch.exp(log_sigmoid(z / tau) - z)

    return by_pair(formula)


def sft(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
    """So scaled that the mean over pairs is the mean over chosen tokens."""
    return -policy[0::2] * len(policy[0::2]) / tokens[0::2].sum()


def sigmoid_norm(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: -log_sigmoid(beta * w / n - beta * v / m))


def dpop(beta: float, penalty: float) -> Naive:
    def formula(w: Tensor, v: Tensor, n: Tensor, m: Tensor) -> Tensor:
        fallen = -w if w < 0 else 0 * w
        return -log_sigmoid(beta * (w - v - penalty * fallen))

    return by_pair(formula)


def r_dpo(beta: float, alpha: float) -> Naive:
    return by_pair(
        lambda w, v, n, m: -log_sigmoid(beta * w + alpha * n.double() - beta * v - alpha * m.double())
    )


def cal_dpo(beta: float) -> Naive:
    return by_pair(lambda w, v, n, m: -log_sigmoid(w - v) + (w - 0.5 / beta) ** 2 + (v + 0.5 / beta) ** 2)


def beta_dpo(beta: float, alpha: float, *, momentum: float = 0.0, mean: float = 0.0) -> Naive:
    """Nothing filtered; `mean` is the running mean before the step, none in the first."""

    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        ratio = policy - reference
        margin = ratio[0::2] - ratio[1::2]
        own = margin.detach().mean()
        running = momentum * mean + (1 - momentum) * own
        return -log_sigmoid(beta * (1 + alpha * (own - running)) * margin)

    return naive


def f_dpo(beta: float, derivative: Callable[[Tensor], Tensor]) -> Naive:
    """DPO with f'(u) of the density ratio u."""
    return by_pair(
        lambda w, v, n, m: -log_sigmoid(beta * derivative(torch.exp(w)) - beta * derivative(torch.exp(v)))
    )


def jensen_shannon(u: Tensor) -> Tensor:
    return torch.log(2 * u / (1 + u))


def cpo(beta: float, weight: float, preference: Callable[[Tensor], Tensor]) -> Naive:
    """`preference` of β·(chosen - rejected) log-probs, and the supervised term."""

    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        gap = policy[0::2] - policy[1::2]
        return preference(beta * gap) - weight * policy[0::2] / tokens[0::2]

    return naive


def alphapo(beta: float, gamma: float, alpha: float, weight: float) -> Naive:
    def naive(policy: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        mean = policy / tokens
        reward = beta * (1 - torch.exp(mean) ** -alpha) / alpha
        return -log_sigmoid(reward[0::2] - reward[1::2] - gamma) - weight * mean[0::2]

    return naive


def weighted(parts: list[tuple[float, Naive]]) -> Naive:
    return lambda policy, reference, tokens: sum(
        (weight * naive(policy, reference, tokens) for weight, naive in parts), torch.tensor(0.0)
    )
