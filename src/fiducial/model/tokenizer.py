"""The tokenizer, with the tokens a run adds to it.

Padding is never needed where rows are packed, but other programs that read the saved tokenizer expect a pad
token: one that has none gets the end-of-sequence token, and the log says so.
"""

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiducial.config.schema import RunConfig
from fiducial.errors import ModelError

logger = logging.getLogger("fiducial")


def load_tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, its special tokens set and its new tokens added.

    Raises:
        ModelError: No tokenizer is there, or it has neither a pad nor an end-of-sequence token.
    """
    path = cfg.tokenizer.path or cfg.model.base_model
    tokenizer = _open(path, cfg)
    if cfg.tokenizer.special_tokens:
        tokenizer.add_special_tokens(dict(cfg.tokenizer.special_tokens))
    if cfg.tokenizer.tokens:
        tokenizer.add_tokens(list(cfg.tokenizer.tokens))
    if tokenizer.pad_token is None:
        _pad_with_eos(tokenizer, path)
    return tokenizer


def _open(path: str, cfg: RunConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path,
            revision=cfg.model.revision if cfg.tokenizer.path is None else None,
            use_fast=cfg.tokenizer.use_fast,
            trust_remote_code=cfg.model.trust_remote_code,
        )
    # A damaged file raises whatever its parser raises; the Rust one knows only bare Exceptions.
    except Exception as error:
        remedy = (
            "correct `tokenizer_config:`" if cfg.tokenizer.path else "name another with `tokenizer_config:`"
        )
        raise ModelError(
            f"no tokenizer can be loaded from {path}: {error}\nPut its files there, or {remedy}."
        ) from error
    if not len(tokenizer):
        raise ModelError(f"the tokenizer in {path} is empty; name another with `tokenizer_config:`.")
    return tokenizer


def _pad_with_eos(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer in {path} has neither a pad nor an end-of-sequence token. "
            "Name both: `special_tokens: {eos_token: …, pad_token: …}`."
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.info(
        "The tokenizer has no pad token; it is saved with its end-of-sequence token %r as pad. "
        "Set `special_tokens: {pad_token: …}` for another.",
        tokenizer.eos_token,
    )
