"""The tokenizer, with the tokens a run adds to it and the chat template it trains with.

The aligned model is asked with the template it was trained with: that one is saved beside it.

Padding is never needed where rows are packed, but other programs that read the saved tokenizer expect a pad
token: one that has none gets the end-of-sequence token, and the log says so.
"""

import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fiducial.config.schema import RunConfig
from fiducial.data.templates import choose_template
from fiducial.errors import ModelError
from fiducial.hub import lacks_hub, not_at_hand
from fiducial.reference.plan import Checkpoint
from fiducial.reference.vocabulary import different_vocabulary, vocabulary_difference

logger = logging.getLogger("fiducial")


def load_tokenizer(cfg: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, its special tokens and chat template set and its new tokens added.

    Raises:
        ConfigError: The chat template the run names is not there.
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
    if cfg.tokenizer.chat_template or cfg.tokenizer.chat_template_jinja:
        _take_template(tokenizer, cfg)
    return tokenizer


def require_same_vocabulary(
    tokenizer: PreTrainedTokenizerBase, reference: Checkpoint, *, trust_remote_code: bool
) -> None:
    """Refuse a reference whose own tokenizer gives other ids than the run's `tokenizer`.

    A checkpoint without a tokenizer cannot be asked; then the log says so.

    Raises:
        ModelError: An id stands for another token there, or a token has an id in one of them alone.
    """
    try:
        theirs = AutoTokenizer.from_pretrained(
            reference.path, revision=reference.revision, trust_remote_code=trust_remote_code
        )
        if _is_empty(theirs):
            raise ValueError("it is empty")
    except Exception as error:  # whatever its parser raises
        logger.warning(
            "%s has no tokenizer that can be read (%s): that it reads the policy's token ids is not checked.",
            reference.path,
            error,
        )
        return
    if difference := vocabulary_difference(tokenizer.get_vocab(), theirs.get_vocab()):
        raise ModelError(different_vocabulary(reference.path, difference))


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
        if lacks_hub(path, error):
            key = "tokenizer_config" if cfg.tokenizer.path else "base_model"
            raise ModelError(not_at_hand(f"{key}: the tokenizer of {path}", error)) from error
        remedy = (
            "correct `tokenizer_config:`" if cfg.tokenizer.path else "name another with `tokenizer_config:`"
        )
        raise ModelError(
            f"no tokenizer can be loaded from {path}: {error}\nPut its files there, or {remedy}."
        ) from error
    if _is_empty(tokenizer):
        raise ModelError(f"the tokenizer in {path} is empty; name another with `tokenizer_config:`.")
    return tokenizer


def _is_empty(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it has no words: some classes make one of special tokens alone where the files are missing."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return tokenizer.get_vocab().keys() <= special | set(tokenizer.all_special_tokens)


def _take_template(tokenizer: PreTrainedTokenizerBase, cfg: RunConfig) -> None:
    template = choose_template(cfg.tokenizer, tokenizer)
    assert template is not None, "one is asked for"
    own = tokenizer.chat_template
    beside = isinstance(own, dict) and own.get("default") == template.source  # others, for tools
    if not beside:
        tokenizer.chat_template = template.source


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
