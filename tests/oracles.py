"""Naive twins: the obvious few lines each fast path must agree with, in value and gradient."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fiducial.data.tokenize import TokenizedGroup


def naive_token_logps(model: PreTrainedModel, groups: list[TokenizedGroup]) -> Tensor:
    """Each prompt + completion alone through the stock model; token log-probs in sequence order."""
    values = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt.tolist(), *completion.tolist()]])
            logps = model(input_ids=ids).logits[0].log_softmax(-1)
            predicted = logps[len(group.prompt) - 1 : -1]
            values.append(predicted.gather(-1, ids[0, len(group.prompt) :, None])[:, 0])
    return torch.cat(values)


def log_sigmoid(x: Tensor) -> Tensor:
    """-log(1 + e^-x), which does not overflow where the two are added as logarithms."""
    return -torch.logaddexp(torch.zeros_like(x), -x)


def sigmoid(x: Tensor) -> Tensor:
    return log_sigmoid(x).exp()


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log σ(β·(chosen - rejected)) from log-ratios, the textbook way."""
    return -log_sigmoid(beta * (chosen - rejected))


def ipo(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float) -> Tensor:
    """(margin of mean log-ratios - 1/(2β))², the textbook way."""
    return (chosen_mean - rejected_mean - 0.5 / beta) ** 2


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float) -> Tensor:
    """NLL minus β log σ of the log odds ratio."""
    odds = [logp - torch.log(1 - torch.exp(logp)) for logp in (chosen_mean, rejected_mean)]
    return -chosen_mean - beta * log_sigmoid(odds[0] - odds[1])


def simpo(
    chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float, gamma: float, cpo_alpha: float
) -> Tensor:
    """-log σ(β·margin - γ) + cpo_alpha · NLL."""
    return -log_sigmoid(beta * chosen_mean - beta * rejected_mean - gamma) + cpo_alpha * -chosen_mean


def smoothed(margin: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy of σ(margin) against a label that is wrong with probability `label_smoothing`."""
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Softmax(query · key) · value over the keys that `seen` [queries, keys] allows; heads come first."""
    shared = len(query) // len(key)
    key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
    scores = query @ key.transpose(1, 2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def head_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    """All logits at once, then log-softmax, then the targets."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def log_square_sum(logits: Tensor) -> Tensor:
    """log Σ_v p_v² of each row."""
    return logits.softmax(-1).square().sum(-1).log()


def entropy(logits: Tensor) -> Tensor:
    """-Σ_v p_v log p_v of each row."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def token_kl(reference: Tensor, policy: Tensor) -> Tensor:
    """Σ_v ρ (log ρ - log π) of each row of logits."""
    return (reference.softmax(-1) * (reference.log_softmax(-1) - policy.log_softmax(-1))).sum(-1)


def kto(policy: Tensor, reference: Tensor, label: Tensor, mismatched: Tensor, *, beta: float) -> Tensor:
    """Completion by completion, in scalars; `mismatched` are the log-ratios z₀ is the mean of."""
    point = max(mismatched.mean().item(), 0.0)
    values = []
    for logp, start, desirable in zip(policy, reference, label, strict=True):
        distance = beta * (logp - start - point)
        values.append(1 - sigmoid(distance if desirable else -distance))
    return torch.stack(values)
