"""The identity of a loaded reference: a hash of every bit of the weights that answer.

With the adapter off the base alone is hashed, under the names it has without an adapter, so a new rank, seed,
learning rate or loss finds the records of an earlier run. Tensors are hashed one by one: no copy of the model
is made.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fiducial.model.adapters import POLICY_ADAPTER, REFERENCE_ADAPTER
from fiducial.model.scoring import Scorer
from fiducial.reference.identity import Fingerprint, Identity
from fiducial.reference.plan import ReferencePlan, Source

_NOT_NUMERICS = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
_ADAPTER_FIELDS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")


def identify(plan: ReferencePlan, scorer: Scorer) -> Identity:
    """The identity of the reference in `scorer`'s model, before step 1 and before weights are sharded."""
    assert plan.checkpoint is not None, "there is no reference to identify"
    named = plan.source is Source.FROZEN_ADAPTER and not plan.equals_starting_policy
    adapter = REFERENCE_ADAPTER if named else POLICY_ADAPTER
    found = fingerprint_model(scorer.model, None if plan.source is Source.ADAPTER_OFF else adapter)
    return Identity(
        checkpoint=plan.checkpoint.path,
        weights=found.digest,
        dtype=str(scorer.model.dtype).removeprefix("torch."),
        autocast=str(scorer.autocast).removeprefix("torch."),
        matmul=_matmul(scorer),
        fingerprint=found,
    )


def fingerprint(model: nn.Module, *, with_adapter: bool = True) -> str:
    """Hash of every bit of the effective weights, their names and shapes, and the config."""
    return fingerprint_model(model, POLICY_ADAPTER if with_adapter else None).digest


def fingerprint_model(model: nn.Module, adapter: str | None = POLICY_ADAPTER) -> Fingerprint:
    """The effective weights of a loaded model with the adapter of that name on, or with none."""
    tensors = dict(_effective_tensors(model, adapter))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        hashes = dict(zip(tensors, pool.map(hash_tensor, tensors.values()), strict=True))
    return Fingerprint(without_tied_head(hashes), _numeric_settings(model, adapter))


def hash_tensor(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bits."""
    assert not isinstance(tensor, DTensor), "a shard is not the weight: identify before the model is sharded"
    digest = start_hash(tensor.dtype, tuple(tensor.shape))
    digest.update(bits(tensor))
    return digest.hexdigest()


def start_hash(dtype: torch.dtype, shape: tuple[int, ...]) -> "hashlib.blake2b":
    """What a tensor's hash begins with; its bits follow, in one piece or several."""
    return hashlib.blake2b(f"{dtype} {shape} ".encode(), digest_size=16)


def bits(tensor: Tensor) -> memoryview:
    """Every bit of a tensor, in the order of its elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    content: memoryview = flat.numpy().data
    return content


def without_tied_head(hashes: Mapping[str, str]) -> dict[str, str]:
    """The hashes under one name for the head, and without it where it is the embedding.

    Files hold a tied head once or twice, and GPT-NeoX's under another name than the model does.
    """
    embeddings = {digest for name, digest in hashes.items() if name.endswith(_EMBEDDINGS)}
    return {
        _HEADS[0] if name in _HEADS else name: digest
        for name, digest in hashes.items()
        if not (name in _HEADS and digest in embeddings)
    }


def numeric_settings(config: Any) -> dict[str, Any]:
    """What of a model's config its answers depend on, as plain values."""
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NOT_NUMERICS and "attn_implementation" not in name
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _effective_tensors(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, Tensor]]:
    others = {POLICY_ADAPTER, REFERENCE_ADAPTER} - {adapter}
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("base_model.model.").split(".")
        if others.intersection(parts):
            continue
        wrapping = ("base_layer", "original_module", "token_adapter")
        kept = [part for part in parts if part not in wrapping]
        # An adapter is the same one under either name.
        yield ".".join(POLICY_ADAPTER if part == adapter else part for part in kept), tensor


def _numeric_settings(model: nn.Module, adapter: str | None) -> dict[str, Any]:
    settings = numeric_settings(model.config)
    if adapter is not None and isinstance(model, PeftModel):
        held = model.peft_config[adapter].to_dict()
        settings["adapter"] = {name: held.get(name) for name in _ADAPTER_FIELDS}
        if rows := held.get("trainable_token_indices"):  # which rows those are, no tensor says
            settings["adapter"]["trainable_token_indices"] = rows
    return settings


def _matmul(scorer: Scorer) -> str:
    """Only float32 products can be made in a shorter format, and only on a GPU."""
    full = scorer.autocast is None and scorer.model.dtype == torch.float32
    if not full or scorer.device.type != "cuda":
        return "ieee"
    matmul: Any = torch.backends.cuda.matmul  # its older name raises where transformers has set the newer one
    return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
