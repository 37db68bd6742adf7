"""What runs find in the cache: for every change the rows that are scored, and damage, found and mended."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from fiducial.reference import fingerprint
from fiducial.reference.cache.scoring import _Worker
from fiducial.train import train
from run_configs import run_config, write_pairs
from tiny import save_checkpoint

LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}
MANY_FILES = {"micro_batch_tokens": 64, "reference": {"flush_seconds": 1e-6}, "optimizer": "sgd"}


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many completions each run's passes before step 1 have scored."""
    found: list[int] = []
    run = _Worker.run

    def counting(self: _Worker, *arguments: Any) -> None:
        run(self, *arguments)
        found.append(self.scored)

    monkeypatch.setattr(_Worker, "run", counting)
    return found


def told(settings: dict[str, Any]) -> str:
    console = Console(record=True, width=500, force_terminal=False)
    train(settings, console=console)
    return console.export_text()


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seed": ({}, {"seed": 7}),
    "learning rate": ({}, {"learning_rate": 1e-5}),
    "rank": (LORA, {"lora_r": 8, "lora_alpha": 4}),
    "an adapter": ({}, LORA),
    "loss": ({}, {"rl": "ipo", "dpo_beta": 0.2}),
    "kind of DPO": ({}, {"dpo_loss_type": "hinge"}),
    "epochs": ({}, {"num_epochs": 3}),
    "schedule of batches": ({}, {"micro_batch_size": 2, "micro_batch_tokens": 40}),
    "fewer rows": ({}, {"rows": 7}),
    "seed of kto": ({"rl": "kto", "rows": 6}, {"seed": 7}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_asks_the_same_of_the_reference_scores_nothing(
    tmp_path: Path, scored: list[int], name: str
) -> None:
    before, change = CHANGES[name]
    train(run_config(tmp_path, **before))
    again = {"output_dir": str(tmp_path / "again")}  # a model and an adapter cannot lie in one folder
    train(run_config(tmp_path, **(before | change | again)))
    assert scored == [24, 0]


@pytest.mark.parametrize(
    "settings",
    [{}, {"streaming": True}, {"reference": {"schedule": "synced", "sync_steps": 9}}],
    ids=["stored", "streamed", "synced"],
)
def test_the_reference_is_hashed_once_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    hashed: list[str | None] = []
    look = fingerprint.fingerprint_model

    def counting(model: Any, adapter: str | None) -> Any:
        hashed.append(adapter)
        return look(model, adapter)

    monkeypatch.setattr(fingerprint, "fingerprint_model", counting)
    train(run_config(tmp_path, rows=4, max_steps=1, **settings))
    assert len(hashed) == 1


def test_of_appended_rows_only_the_new_ones_are_scored(tmp_path: Path, scored: list[int]) -> None:
    train(run_config(tmp_path))
    train(run_config(tmp_path, rows=15))
    assert scored == [24, 6]
    rows = write_pairs(tmp_path / "changed.jsonl", 15).read_text().splitlines()
    rows[3] = json.dumps(json.loads(rows[3]) | {"rejected": " no, never"})
    (tmp_path / "changed.jsonl").write_text("\n".join(rows))
    train(run_config(tmp_path, datasets=[{"path": str(tmp_path / "changed.jsonl")}], val_set_size=4))
    assert scored[:2] == [24, 6]
    assert sorted(scored[2:]) == [0, 1], "of a changed row only what has changed, trained on or held out"


def test_of_a_shortened_sequence_len_only_rows_whose_prompt_is_cut_are_scored(
    tmp_path: Path, scored: list[int]
) -> None:
    rows = [
        {"prompt": prompt, "chosen": f" yes, {number}, and so on", "rejected": f" no, {number}, and no more"}
        for number, prompt in enumerate(["Q", "Why?", "A question that goes on and on"])
    ]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"datasets": [{"path": str(tmp_path / "long.jsonl")}]}
    train(run_config(tmp_path, **data))
    train(run_config(tmp_path, **data, sequence_len=16, excess_length_strategy="truncate"))
    assert scored == [6, 2]


@pytest.mark.parametrize(
    "change", [{"bf16": "full"}, {"overrides_of_model_config": {"rms_norm_eps": 0.1}}, {"family": "qwen2"}]
)
def test_another_reference_is_scored_anew(tmp_path: Path, scored: list[int], change: dict[str, Any]) -> None:
    train(run_config(tmp_path))
    train(run_config(tmp_path, **change))
    assert scored == [24, 24]


def flip_a_bit(files: list[Path]) -> None:
    content = bytearray(files[1].read_bytes())
    content[_place_of_log_probs(files[1])] ^= 64
    files[1].write_bytes(content)


def _place_of_log_probs(file: Path) -> int:
    from fiducial.reference.cache.shards import Shard

    identity = file.parent.name
    values = Shard.open(file, identity).values(0)
    assert values is not None
    return file.read_bytes().index(values.tobytes()) + 2


def truncate(files: list[Path]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-20])


def lose(files: list[Path]) -> None:
    files[1].unlink()


def mistake(files: list[Path]) -> None:
    manifest = files[0].parent / "identity.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"dtype": "bfloat16"}))


def mix_up(files: list[Path]) -> None:
    """A file of another model's records under the name of one of ours."""
    folder = files[0].parents[2]
    other = save_checkpoint(folder / "other", seed=5)
    settings = run_config(folder, base_model=str(other), output_dir=str(folder / "other-out"), **MANY_FILES)
    train(settings | {"reference": settings["reference"] | {"cache": str(folder / "other-cache")}})
    shutil.copy(sorted((folder / "other-cache").glob("*/*.arrow"))[1], files[1])


DAMAGE: dict[str, tuple[Callable[[list[Path]], None], str, int]] = {
    "a flipped bit": (flip_a_bit, "is damaged: records of it are not used, and scored again", 1),
    "a truncated file": (truncate, "is set aside; its completions are scored again", 4),
    "a missing row": (lose, "", 4),
    "a manifest of another model": (
        mistake,
        "is of another reference: the weights' precision: bfloat16 there",
        0,
    ),
    "records of another model": (mix_up, "its records are of another reference", 4),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_named_and_scored_again(tmp_path: Path, scored: list[int], name: str) -> None:
    damage, said, lost = DAMAGE[name]
    settings = run_config(tmp_path, **MANY_FILES)
    cache = tmp_path / "references"
    settings["reference"] = settings["reference"] | {"cache": str(cache)}
    train(settings | {"output_dir": str(tmp_path / "whole")})
    [folder] = [path.parent for path in cache.glob("*/identity.json")]
    files = sorted(folder.glob("*.arrow"))
    assert len(files) > 3
    damage(files)
    scored.clear()
    sentences = told(settings)
    assert said in sentences
    assert ("Note:" in sentences) is bool(said)
    assert scored == [lost]
    assert "24 completions scored" not in sentences
    whole, mended = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert max((whole[name] - mended[name]).abs().max().item() for name in whole) < 1e-6
    scored.clear()
    assert "known from an earlier run" in (again := told(settings))
    assert "Note:" not in again
    assert scored == [0]
