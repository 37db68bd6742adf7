"""Which rule turns a head's products into a model's logits, measured on the model itself.

Models scale or soft-cap their logits under many names, and a name may mean two things (`logits_scaling`
divides in one family and multiplies in another). So the names in a config only propose candidates; the rule
is the one that reproduces what the model makes of given products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fiducial.model.redirection import swapped_forward

_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LARGEST_PRODUCT = 40.0
"""Large enough for every known soft cap to bend it."""
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5}
"""Of the largest logit; half precision rounds between the steps."""
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model does to `hidden · weight + bias` before the softmax: scale, then soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits from the head's."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def slope(self, logits: Tensor) -> Tensor:
        """Derivative of the model's `logits` with respect to the head's; one number where it is constant."""
        if self.softcap is None:
            return logits.new_full((), self.scale)  # made there: a number sent to a GPU is waited for
        return (1 - (logits / self.softcap).square()) * self.scale


PLAIN = LogitRule()
"""Logits are the head's products as they are."""


def plain_linear_head(model: PreTrainedModel) -> Any:
    """The output layer, or None unless it multiplies by its `weight`, adds its `bias`, and does no more.

    An adapter on the head, a quantized head, or trainable token rows make it something else.
    """
    head: Any = model.get_output_embeddings()
    if head is None:
        return None
    copies = getattr(head, "modules_to_save", None)  # PEFT's copy to train; its `weight` follows the switch
    layers = [head] if copies is None else [*copies.values(), head.original_module]
    return head if all(type(layer).forward is nn.Linear.forward for layer in layers) else None


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of `model` that makes the last hidden states; the model itself if it has no such part."""
    body: nn.Module = model.get_decoder()
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if body is model and len(parts) == 1 else body


def measure_logit_rule(
    model: PreTrainedModel, forward: Callable[..., Any], **inputs: Any
) -> LogitRule | None:
    """How `model` makes logits of its head's products; None if no rule reproduces them.

    Runs `forward`, the model's own, once on `inputs`, with products put in the head's place.
    """
    head, body = plain_linear_head(model), backbone(model)
    if head is None or body is model:
        return None
    vocabulary = len(head.weight)
    seen: dict[str, Tensor] = {}

    def products(hidden: Tensor) -> Tensor:
        seen["head"] = hidden
        spread = torch.linspace(-1, 1, vocabulary, device=hidden.device) * _LARGEST_PRODUCT
        seen["products"] = spread.to(hidden.dtype).expand(*hidden.shape[:-1], -1)
        return seen["products"]

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        seen["backbone"] = output[0]

    hook = body.register_forward_hook(keep_last)
    try:
        with swapped_forward(head, products), torch.no_grad():
            logits = forward(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    if set(seen) != {"head", "products", "backbone"} or not _same(seen["head"], seen["backbone"]):
        return None  # the model does something of its own between backbone and head
    return _matching_rule(model.config.get_text_config(), seen["products"], logits)


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.float(), right.float())


def _matching_rule(config: Any, products: Tensor, logits: Tensor) -> LogitRule | None:
    tolerance = _TOLERANCE.get(products.dtype, _HALF_TOLERANCE)
    named = [float(value) for name in _SCALES if (value := getattr(config, name, None))]
    scales = [*named, *(1 / value for value in named), 1.0]
    caps = [float(value) for name in _CAPS if (value := getattr(config, name, None))]
    for scale, cap in product(scales, [*caps, None]):
        rule = LogitRule(scale, cap)
        expected = rule(products.float())
        if expected.shape != logits.shape:
            return None
        if (expected - logits).abs().max() <= tolerance * expected.abs().max():
            return rule
    return None
