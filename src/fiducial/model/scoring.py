"""From a batch to the log-prob of each scored token, under one model.

Everything runs inside the call of the module that trains, whatever wraps it. Only hidden states of scored
positions meet the head. Where the head is not a plain linear layer, the model makes the logits of those
positions itself: always right, at the price of [scored, vocabulary] numbers.

The model keeps its own attention: packed attention is set for the time of a call, and stays set only where
layers will be recomputed in backward.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fiducial.compat import bound_onednn_caches
from fiducial.data.batch import Layout, PackedBatch, pack
from fiducial.data.tokenize import TokenizedGroup
from fiducial.logps import TokenLogps
from fiducial.model.attention import PACKED, SegmentsMissingError, carrier, register
from fiducial.model.attention_plan import AttentionPlan, plan_attention
from fiducial.model.checkpoint import is_soft_capped
from fiducial.model.divergence import Distribution
from fiducial.model.logit_rule import LogitRule, backbone, measure_logit_rule
from fiducial.model.mode import evaluating
from fiducial.model.products import fast_products
from fiducial.model.readout import Readout
from fiducial.model.redirection import call_inside, causal_lm, swapped_forward

_PROBE_TOKENS = 6


class Scorer:
    """Scores batches with one model, in one layout."""

    def __init__(
        self, model: PreTrainedModel, *, layout: Layout, autocast: torch.dtype | None = None
    ) -> None:
        self.model = model
        self.layout = layout
        self.autocast = autocast
        self.module: nn.Module = model
        """What is called: the model, or what DDP or FSDP wrapped it in."""
        self.device: torch.device = model.device
        """Where it computes. Weights that FSDP2 offloads are in the CPU's memory between a layer's turns."""
        self._inner = causal_lm(model)
        self._stock_attention = stock_attention(self._inner)
        self._rule: LogitRule | None = None
        self._measured = False
        self._by_carrier = False
        if layout == "packed":
            register()
        if self.device.type == "cpu":
            bound_onednn_caches()

    def pack(self, groups: Sequence[TokenizedGroup]) -> PackedBatch:
        """Lay `groups` out for this model."""
        return pack(groups, layout=self.layout)

    def __call__(
        self, batch: PackedBatch, statistics: Sequence[str] = (), against: Distribution | None = None
    ) -> TokenLogps:
        """Log-prob of every scored token, with gradient where the model has it.

        `statistics` names what else is wanted of each token's distribution, without gradient. The KL of
        `against` to it, with gradient, is among the statistics too where that is given.

        Raises:
            ModelError: the model's attention asks for something that packed attention does not compute, or
                `against` is of another vocabulary.
        """
        return self._score(batch, lambda: Readout(statistics, against))[0]

    def distribution(self, batch: PackedBatch) -> tuple[TokenLogps, Distribution]:
        """Log-probs, and all that the model says at the scored positions; without gradient."""
        sharded = any(isinstance(part, FSDPModule) for part in self.module.modules())
        with torch.no_grad():
            logps, readout = self._score(batch, lambda: Readout(keeps="own" if sharded else "shared"))
        return logps, readout.distribution

    def restore_attention(self) -> None:
        """Give the model its own attention back, for any use of it but through a Scorer."""
        set_attention(self._inner, self._stock_attention)

    def _score(self, batch: PackedBatch, begin: Callable[[], Readout]) -> tuple[TokenLogps, Readout]:
        batch = batch.to(self.device)
        if not self._measured:
            self._measure_head(batch)
        with self._attention(self._implementation(batch)):
            output, readout = self._read(batch, begin)
        values, found = readout.split(output)
        return TokenLogps(values, batch.sequence, batch.num_sequences, found), readout

    def _read(self, batch: PackedBatch, begin: Callable[[], Readout]) -> tuple[Tensor, Readout]:
        plan = None if batch.segments is None else plan_attention(batch.segments, batch.input_ids.device)

        def attempt() -> tuple[Tensor, Readout]:
            readout = begin()
            return self._run(batch, lambda forward: self._token_logps(batch, plan, forward, readout)), readout

        try:
            return attempt()
        except SegmentsMissingError:
            if self._by_carrier:
                raise
        self._by_carrier = True
        return attempt()

    def _run(self, batch: PackedBatch, run: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
        device = batch.input_ids.device.type
        products = nullcontext() if _will_recompute(self._inner) else fast_products(device)
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None), products:
            return call_inside(self.module, self._inner, run, input_ids=batch.input_ids)

    def _token_logps(
        self,
        batch: PackedBatch,
        plan: AttentionPlan | None,
        forward: Callable[..., Any],
        readout: Readout,
    ) -> Tensor:
        inputs = self._inputs(batch, plan)
        if self._rule is None:
            return readout.of_logits(_scored_logits(batch, forward, inputs), batch.target)
        hidden = backbone(self._inner)(**inputs)[0].flatten(0, 1)[batch.source]
        rule, head = self._rule, self._inner.get_output_embeddings()

        def score(scored: Tensor) -> Tensor:
            return readout.of_head(scored, head, batch.target, rule)

        with swapped_forward(head, score):
            output: Tensor = head(hidden)
        return output

    def _inputs(self, batch: PackedBatch, plan: AttentionPlan | None) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
        }
        if plan is not None and self._by_carrier:
            inputs["attention_mask"] = carrier(plan, batch.input_ids.device)
        elif plan is not None:
            # All ones: without a mask transformers would take the restarts of the position ids for packing.
            inputs["attention_mask"] = torch.ones_like(batch.input_ids)
            inputs["segments"] = plan
        return inputs

    def _measure_head(self, batch: PackedBatch) -> None:
        probe = batch.input_ids[:1, :_PROBE_TOKENS]

        def measure(forward: Callable[..., Any]) -> Tensor:
            self._rule = measure_logit_rule(self._inner, forward, input_ids=probe)
            return probe.new_zeros(1, dtype=torch.float32)

        with evaluating(self._inner), torch.no_grad(), self._attention(self._stock_attention):
            self._run(batch, measure)
        self._measured = True

    def _implementation(self, batch: PackedBatch) -> str:
        return self._stock_attention if batch.segments is None else PACKED

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = self._inner.config.get_text_config()._attn_implementation
        set_attention(self._inner, name)
        try:
            yield
        finally:
            # An earlier pass may still await its backward, and with it the attention it was made with.
            if not _will_recompute(self._inner):
                set_attention(self._inner, before)


def stock_attention(model: PreTrainedModel) -> str:
    """The implementation `model` was loaded with."""
    name: str = model.config.get_text_config()._attn_implementation
    if name == PACKED:  # another Scorer awaits this model's backward pass
        exact = model._supports_sdpa and not is_soft_capped(model.config)
        return "sdpa" if exact else "eager"
    return name


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Switch all of `model`'s layers to the implementation `name`, unless they have it."""
    if model.config.get_text_config()._attn_implementation != name:
        model.set_attn_implementation(name)


def _will_recompute(model: nn.Module) -> bool:
    """Whether backward will run layers of `model` again."""
    return torch.is_grad_enabled() and any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )


def _scored_logits(
    batch: PackedBatch, forward: Callable[..., Any], inputs: dict[str, Any]
) -> Float[Tensor, "scored vocab"]:
    length = batch.input_ids.shape[1]
    columns, column = torch.unique(batch.source % length, return_inverse=True)
    logits: Tensor = forward(**inputs, logits_to_keep=columns).logits
    return logits[batch.source // length, column]
