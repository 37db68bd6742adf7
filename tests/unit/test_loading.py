"""What is found out about a run before weights are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from fiducial.errors import ConfigError
from fiducial.loading import read_run
from run_configs import run_config
from tiny import save_checkpoint

TOO_LONG = r"sequences have up to 24 tokens, and .* was made for 16 \(config\.json\)"


def notes(base: Path, **settings: Any) -> list[str]:
    return read_run(run_config(base.parent, base_model=str(base), **settings)).data.audit.notes


def test_longer_sequences_than_there_are_position_embeddings_are_refused(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "gpt2", "gpt2", max_position_embeddings=16)
    with pytest.raises(ConfigError, match=rf"sequence_len: {TOO_LONG}\. Write sequence_len: 16\."):
        notes(base)
    assert notes(base, sequence_len=16) == []
    policy = save_checkpoint(tmp_path / "policy")
    with pytest.raises(ConfigError, match=TOO_LONG):
        notes(policy, reference={"model": str(base)})


def test_longer_sequences_than_the_model_was_made_for_are_noted(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "llama", max_position_embeddings=16)
    [note] = notes(base)
    assert note.endswith("was made for 16 (config.json); sequence_len: 16 leaves longer ones out")
    assert notes(base, sequence_len=16) == []
    file = base / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
    file.write_text(json.dumps(config))
    assert notes(base) == [], "its number is of positions before they are scaled"
