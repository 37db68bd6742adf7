"""The identity a run's reference will have, from the checkpoint's files alone.

Only where the loaded weights are the stored ones: nothing added, drawn, merged, or quantised. Elsewhere the
model must be loaded to know.
"""

import torch
from transformers import PreTrainedTokenizerBase

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError
from fiducial.model.checkpoint import read_config
from fiducial.model.offload import is_offloaded
from fiducial.model.precision import resolve_precision
from fiducial.model.scoring import Scorer
from fiducial.reference.checkpoint import open_checkpoint, same_place, weight_files
from fiducial.reference.checkpoint_weights import fingerprint_files
from fiducial.reference.fingerprint import identify, numeric_settings
from fiducial.reference.holding import policy_bits, reference_bits
from fiducial.reference.identity import Identity, identify_served
from fiducial.reference.plan import ReferencePlan, Source


def predict_identity(
    cfg: RunConfig, plan: ReferencePlan, tokenizer: PreTrainedTokenizerBase
) -> Identity | None:
    """The identity `identify` would find on the loaded model; None where only the loaded model tells.

    Raises:
        ModelError: The checkpoint's config cannot be read.
    """
    assert plan.checkpoint is not None, "there is no reference to identify"
    if plan.source is Source.ENDPOINT:
        return identify_served(plan.checkpoint)
    precision = resolve_precision(cfg)
    second = plan.source is Source.SEPARATE_MODEL
    named = cfg.reference.dtype if second else None
    dtype: torch.dtype = getattr(torch, named) if named else precision.weights
    if not _loads_as_stored(cfg, plan, dtype):
        return None
    own = same_place(plan.checkpoint.path, cfg.model.base_model)
    overrides = cfg.model.config_overrides if own else {}
    config = read_config(plan.checkpoint, cfg.model, overrides)
    files = weight_files(open_checkpoint(plan.checkpoint.path, plan.checkpoint.revision, key="base_model"))
    quantised = getattr(config, "quantization_config", None) is not None
    if files is None or quantised or len(tokenizer) > config.get_text_config().vocab_size:
        return None
    found = fingerprint_files(files, numeric_settings(config), dtype)
    tf32 = cfg.model.tf32 and torch.cuda.is_available() and dtype == torch.float32
    return Identity(
        checkpoint=plan.checkpoint.path,
        weights=found.digest,
        dtype=str(dtype).removeprefix("torch."),
        autocast=str(precision.autocast).removeprefix("torch."),
        matmul="tf32" if tf32 and precision.autocast is None else "ieee",
        fingerprint=found,
    )


def identify_loaded(
    cfg: RunConfig, plan: ReferencePlan, tokenizer: PreTrainedTokenizerBase, scorer: Scorer
) -> Identity:
    """The identity of the reference in `scorer`'s model, by its files where its weights are kept elsewhere.

    Raises:
        ModelError: Its weights are kept elsewhere, and are not those of its files.
    """
    if not is_offloaded(scorer.model):
        return identify(plan, scorer)
    predicted = predict_identity(cfg, plan, tokenizer)
    if predicted is None:
        raise ModelError(
            f"reference.offload: {cfg.reference.offload} needs a reference that is loaded as it is stored, "
            "without tokens added or weights drawn. Remove it."
        )
    return predicted


def _loads_as_stored(cfg: RunConfig, plan: ReferencePlan, dtype: torch.dtype) -> bool:
    changed = (
        cfg.model.reinit_weights,
        policy_bits(cfg) if plan.source is not Source.SEPARATE_MODEL else reference_bits(cfg),
        bool(cfg.tokenizer.tokens) or cfg.tokenizer.resize_embeddings_to_32x,
    )
    if any(changed) or plan.checkpoint is None or plan.checkpoint.adapter is not None:
        return False
    if plan.source is not Source.ADAPTER_OFF:
        return cfg.adapter is None or plan.source is Source.SEPARATE_MODEL
    assert cfg.adapter is not None
    if cfg.adapter.layer_replication:
        return False
    # Modules that train beside the adapter are held in float32, their originals with them.
    beside = cfg.adapter.modules_to_save or cfg.adapter.trainable_token_indices
    return dtype == torch.float32 or not beside
