"""Whether a model can be packed: measured on the model, not looked up by its name.

Cheap questions first: does it take packed attention, does anything but attention mix tokens. Then three short
passes decide. Changing one completion must not move any other sequence by a single bit, and packed log-probs
must equal padded ones. (In a mixture of experts by no more than rounding: how many tokens an expert gets is
the shape of its products.) A model that fails anywhere is scored padded, and the reason is told. Where not
even padded rows keep to themselves, because the longest of a pass decides all positions, it is refused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fiducial.data.batch import Layout
from fiducial.data.tokenize import TokenizedGroup
from fiducial.errors import ModelError
from fiducial.model.attention import PACKED, register
from fiducial.model.mode import evaluating
from fiducial.model.redirection import causal_lm
from fiducial.model.scoring import Scorer, set_attention, stock_attention
from fiducial.model.text_path import reads_text_alone

_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_TOKENWISE_LAYERS = frozenset({"mlp", "moe"})
_MEAN_DIFFERENCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest mean difference in nats that rounding explains; a leak between completions makes 0.06 or more."""
_HALF_MEAN_DIFFERENCE = 0.02
_ROUTED_HALF_MEAN_DIFFERENCE = 0.06
"""In half precision a mixture of experts sends a few tokens elsewhere: 0.046 was measured, and for a lost
prompt or window 0.11 and more."""


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout, and the sentence that tells why."""

    layout: Layout
    why: str


class _NotPackableError(Exception):
    """Why the model cannot be packed."""


def choose_layout(
    model: PreTrainedModel,
    groups: Sequence[TokenizedGroup],
    *,
    packing: bool | None,
    longest: int | None = None,
    autocast: torch.dtype | None = None,
) -> LayoutChoice:
    """The layout to score with: packed where `model` is exact in it, unless `packing` is False.

    Measured on the longest of `groups` and another. `longest` is the longest prompt + completion that will
    ever be scored; None: that of `groups`. The model comes back as it was: mode, attention, random state.

    Raises:
        ModelError: `packing` is True and the model cannot be packed; or what a sequence gets depends on what
            shares its pass, in any layout; or the model is not causal.
    """
    _require_steady_positions(model, longest or max((group.longest for group in groups), default=0))
    with _as_it_was(model):
        _require_causal(causal_lm(model))
    if packing is False:
        return LayoutChoice("padded", "Packing is switched off.")
    try:
        with _as_it_was(model):
            _ask(model)
            _measure(model, groups, autocast)
    except _NotPackableError as reason:
        if packing:
            raise ModelError(f"sample_packing: true, but {reason} Remove it: rows are then padded.") from None
        return LayoutChoice("padded", f"Not packed: {reason}")
    return LayoutChoice("packed", "Packed log-probs equal padded ones, and no completion sees another.")


@contextmanager
def _as_it_was(model: PreTrainedModel) -> Iterator[None]:
    inner = causal_lm(model)
    attention = stock_attention(inner)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(model):
        try:
            yield
        finally:
            set_attention(inner, attention)


def _ask(model: PreTrainedModel) -> None:
    inner = causal_lm(model)
    config: Any = inner.config.get_text_config()
    name = type(inner).__name__
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise _NotPackableError("the adapter puts tokens of its own before the prompt.")
    mixing = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS - _TOKENWISE_LAYERS
    if mixing or inner._is_stateful:
        layers = ", ".join(sorted(mixing)) or "recurrent"
        raise _NotPackableError(f"{name} has {layers} layers, which may carry one sequence into the next.")
    register()
    set_attention(inner, PACKED)
    if config._attn_implementation != PACKED:
        raise _NotPackableError(f"{name} does not take its attention from transformers' AttentionInterface.")


def _require_causal(model: PreTrainedModel) -> None:
    """Raise `ModelError` where a model that reads pictures too reads text in both directions."""
    if reads_text_alone(model):
        return
    ids = torch.arange(8, device=model.device)[None]
    other = torch.cat([ids[:, :-1], ids[:, -1:] + 1], 1)
    before, after = (model(input_ids=each, use_cache=False).logits[:, :-1] for each in (ids, other))
    if (before - after).abs().mean().item() > _allowed(model, torch.bfloat16):
        raise ModelError(
            f"{type(model).__name__} is no causal language model: a later token moves what it says before. "
            "Preference losses need one."
        )


def _require_steady_positions(model: PreTrainedModel, longest: int) -> None:
    """Raise `ModelError` where the longest sequence of a pass decides the positions of all others."""
    inner = causal_lm(model)
    limit = _rope_limit(inner.config.get_text_config())
    if limit is not None and longest > limit:
        raise ModelError(
            f"sequence_len: {type(inner).__name__} takes other rotary frequencies for a whole pass once it "
            f"holds a sequence of more than {limit} tokens, and the longest here has {longest}. A shorter "
            "one's log-probs would depend on what shares its pass, and policy and reference could not be "
            f"compared. Set sequence_len: {limit}, or another rope_type (yarn, linear, llama3) under "
            "model_config: {rope_scaling: {...}}."
        )


def _rope_limit(config: Any) -> int | None:
    """Longest sequence for which rotary frequencies do not depend on the pass; None where they never do."""
    ropes: Any = getattr(config, "rope_parameters", None) or {}
    limits = []
    for rope in [ropes, *(part for part in ropes.values() if isinstance(part, dict))]:
        if rope.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
        if rope.get("rope_type") == "longrope":
            limits.append(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    return min(limits, default=None)


def _measure(model: PreTrainedModel, groups: Sequence[TokenizedGroup], autocast: torch.dtype | None) -> None:
    if not groups:
        raise _NotPackableError("there is no data to measure it on.")
    by_length = sorted(groups, key=lambda group: group.longest)
    sample = [by_length[-1], by_length[0]]
    vocab_size = causal_lm(model).config.get_text_config().vocab_size
    packed = Scorer(model, layout="packed", autocast=autocast)
    values = _packed_logps(packed, sample)
    moved = _packed_logps(packed, [_with_other_first_completion(sample[0], vocab_size), sample[1]])
    allowed = _allowed(model, autocast or model.dtype)
    others = slice(len(sample[0].completions[0]), None)
    leaks = (values[others] - moved[others]).abs()
    if not leaks.mean().item() <= (allowed if _routes_tokens(model) else 0):
        raise _NotPackableError(
            f"changing one completion moved another sequence's log-probs by {leaks.max().item():.2g} nats."
        )
    padded = Scorer(model, layout="padded", autocast=autocast)
    difference = (values - padded(padded.pack(sample)).values).abs().mean().item()
    if not difference <= allowed:
        raise _NotPackableError(
            f"packed log-probs differ from padded ones by {difference:.2g} nats a token, more than the "
            f"{allowed:.2g} that rounding explains."
        )


def _allowed(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Largest mean difference in nats that rounding explains."""
    half = _ROUTED_HALF_MEAN_DIFFERENCE if _routes_tokens(model) else _HALF_MEAN_DIFFERENCE
    return _MEAN_DIFFERENCE.get(dtype, half)


def _routes_tokens(model: PreTrainedModel) -> bool:
    """Whether tokens share a product with those that are sent to the same expert."""
    config = vars(causal_lm(model).config.get_text_config())
    return any("experts" in name and isinstance(value, int) and value > 1 for name, value in config.items())


def _packed_logps(scorer: Scorer, groups: Sequence[TokenizedGroup]) -> Float[Tensor, " scored"]:
    try:
        return scorer(scorer.pack(groups)).values
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code may fail in any way on a row it was not written for
        raise _NotPackableError(f"its packed forward pass failed: {error}") from error


def _with_other_first_completion(group: TokenizedGroup, vocab_size: int) -> TokenizedGroup:
    first, *rest = group.completions
    return TokenizedGroup(group.prompt, ((first + 1) % vocab_size, *rest))
