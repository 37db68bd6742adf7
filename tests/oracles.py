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


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """-log σ(β·(chosen - rejected)) from log-ratios, the textbook way."""
    return -torch.log(1 / (1 + torch.exp(-beta * (chosen - rejected))))
