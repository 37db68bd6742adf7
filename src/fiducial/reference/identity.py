"""What makes two references the same one: the weights that answer, and the numerics they answer in.

Only *effective* weights count. With the adapter off the base alone is hashed, under the names it has without
an adapter, so a new rank, seed, learning rate or loss finds the records of an earlier run.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fiducial.model.adapters import POLICY_ADAPTER, REFERENCE_ADAPTER
from fiducial.model.scoring import Scorer
from fiducial.reference.plan import ReferencePlan, Source

FORMAT = 1
"""Raised when records change their meaning."""

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


@dataclass(frozen=True, slots=True)
class Identity:
    """Which reference, in which numerics."""

    checkpoint: str
    """Where it was loaded from; told to people, not compared: a moved folder holds the same weights."""
    weights: str
    """Hash of the effective weights and the config they are computed with."""
    dtype: str
    autocast: str
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Equal for equal references."""
        fields = {name: value for name, value in asdict(self).items() if name != "checkpoint"}
        return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def identify(plan: ReferencePlan, scorer: Scorer) -> Identity:
    """The identity of the reference in `scorer`'s model, before step 1 and before weights are sharded."""
    assert plan.checkpoint is not None, "there is no reference to identify"
    model = scorer.model
    return Identity(
        checkpoint=plan.checkpoint.path,
        weights=fingerprint(model, with_adapter=plan.source is not Source.ADAPTER_OFF),
        dtype=str(model.dtype).removeprefix("torch."),
        autocast=str(scorer.autocast).removeprefix("torch."),
    )


def fingerprint(model: nn.Module, *, with_adapter: bool = True) -> str:
    """Hash of every bit of the effective weights, their names and shapes, and the config."""
    tensors = dict(_effective_tensors(model, with_adapter=with_adapter))
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        hashes = pool.map(_hash_tensor, tensors.values())
        lines = [f"{name} {digest}" for name, digest in zip(tensors, hashes, strict=True)]
    settings = json.dumps(_numeric_settings(model, with_adapter=with_adapter), sort_keys=True, default=str)
    return hashlib.blake2b("\n".join([*sorted(lines), settings]).encode(), digest_size=16).hexdigest()


def _effective_tensors(model: nn.Module, *, with_adapter: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("base_model.model.").split(".")
        if REFERENCE_ADAPTER in parts or (POLICY_ADAPTER in parts and not with_adapter):
            continue
        wrapping = ("base_layer", "original_module", "token_adapter")
        yield ".".join(part for part in parts if part not in wrapping), tensor


def _numeric_settings(model: nn.Module, *, with_adapter: bool) -> dict[str, Any]:
    config: Any = model.config
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _NOT_NUMERICS and "attn_implementation" not in name
    }
    if with_adapter and isinstance(model, PeftModel):
        adapter = model.peft_config[POLICY_ADAPTER].to_dict()
        settings["adapter"] = {name: adapter.get(name) for name in _ADAPTER_FIELDS}
    return settings


def _hash_tensor(tensor: Tensor) -> str:
    assert not isinstance(tensor, DTensor), "a shard is not the weight: identify before the model is sharded"
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)} ".encode(), digest_size=16)
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
