"""Saved weights put back into the model that is there, and what is said of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import tiny_model
from training_harness import build_trainer


@contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Inside, what transformers logs is captured; its logger passes nothing on."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def test_a_tied_weight_that_is_saved_once_is_not_called_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = tiny_model(tie_word_embeddings=True, seed=1)
    trained.save_pretrained(tmp_path / "saved")
    trainer = build_trainer(tmp_path / "out", model=tiny_model(tie_word_embeddings=True))
    with heard(caplog):
        trainer.load_weights(tmp_path / "saved")
    assert caplog.messages == []
    assert torch.equal(trainer.model.lm_head.weight, trained.lm_head.weight)


def test_a_weight_that_is_not_there_is_called_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if name != "model.norm.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    trainer = build_trainer(tmp_path / "out", model=tiny_model(tie_word_embeddings=True))
    with heard(caplog):
        trainer.load_weights(tmp_path / "saved")
    # Once, or twice where an earlier test has let transformers' logger pass on what it hears.
    assert set(caplog.messages) == {
        "There were missing keys in the checkpoint model loaded: ['model.norm.weight']."
    }
