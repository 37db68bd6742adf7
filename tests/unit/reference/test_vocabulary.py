"""Whether two tokenizers give the same ids, decided from their files and again on the loaded ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fiducial.config.load import validate_config
from fiducial.errors import ModelError, PlanError
from fiducial.model.loader import ModelLoader
from fiducial.model.tokenizer import load_tokenizer
from fiducial.reference.checkpoint import open_checkpoint
from fiducial.reference.facts import gather_facts
from fiducial.reference.plan import Source, plan_reference
from fiducial.reference.vocabulary import read_vocabulary, vocabulary_difference, with_tokens
from tiny import save_checkpoint, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    save_checkpoint(folder / "base")
    save_checkpoint(folder / "same", seed=1)
    save_checkpoint(folder / "wider", seed=1, vocab_size=352)
    shutil.copytree(folder / "same", folder / "swapped")
    edit_vocabulary(folder / "swapped", lambda vocab: vocab.update(a=vocab["b"], b=vocab["a"]))
    shutil.copytree(folder / "same", folder / "more")
    more = tiny_tokenizer()
    more.add_tokens(["<tool>"])
    more.save_pretrained(folder / "more")
    shutil.copytree(folder / "same", folder / "bare")
    for path in (folder / "bare").glob("*token*"):
        path.unlink()
    return folder


def edit_vocabulary(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content["model"]["vocab"])
    path.write_text(json.dumps(content), encoding="utf-8")


def run(folder: Path, reference: str, **keys: Any) -> dict[str, Any]:
    named = {"model": str(folder / reference)}
    return {"base_model": str(folder / "base"), "rl": "dpo", "reference": named} | keys


def plan(folder: Path, reference: str, **keys: Any) -> Source:
    cfg = validate_config(run(folder, reference, **keys))
    return plan_reference(cfg, gather_facts(cfg)).source


def test_files_say_what_the_loaded_tokenizer_says(checkpoints: Path) -> None:
    for name in ("base", "more"):
        files = open_checkpoint(str(checkpoints / name), None, key="base_model")
        cfg = validate_config({"base_model": str(checkpoints / name)})
        assert read_vocabulary(files) == load_tokenizer(cfg).get_vocab()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<x>": 2}}, {"a": 0, "b": 1, "<x>": 2}),
        (
            {"tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}}},
            {"a": 0, "b": 1},
        ),
        ({"vocab.txt": "a\nb\n"}, {"a": 0, "b": 1}),
        ({"tokenizer.model": "binary"}, None),
    ],
)
def test_every_kind_of_file_is_read(tmp_path: Path, files: dict[str, Any], expected: Any) -> None:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_vocabulary(open_checkpoint(str(tmp_path), None, key="base_model")) == expected


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"vocab": [1]}}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"reference.model: .*tokenizer.json"):
        read_vocabulary(open_checkpoint(str(tmp_path), None, key="reference.model"))


def test_the_difference_names_tokens_and_counts_them() -> None:
    policy = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert vocabulary_difference(policy, dict(policy)) is None
    assert vocabulary_difference({"a": 0, "b": 1}, {"a": 1, "b": 0, "z": 2}) == (
        "2 tokens have another id there ('a' 0 and 1, 'b' 1 and 0); 1 token is only in the reference's ('z')"
    )
    assert vocabulary_difference(policy, {"e": 4}) == ("4 tokens are only in the policy's ('a', 'b', 'c', …)")


def test_added_tokens_take_the_next_ids() -> None:
    assert with_tokens({"a": 0, "b": 5}, ("b", "<x>", "<y>")) == {"a": 0, "b": 5, "<x>": 6, "<y>": 7}


def test_a_reference_that_reads_the_same_ids_is_planned(checkpoints: Path) -> None:
    assert plan(checkpoints, "same") is Source.SEPARATE_MODEL
    assert plan(checkpoints, "wider") is Source.SEPARATE_MODEL  # rows that no token has
    assert plan(checkpoints, "bare") is Source.SEPARATE_MODEL  # files do not say; loading warns


def test_another_vocabulary_is_refused_when_planned(checkpoints: Path) -> None:
    with pytest.raises(PlanError, match=r"reference.model: .*2 tokens have another id there \('a' 64 and 65"):
        plan(checkpoints, "swapped")
    with pytest.raises(PlanError, match=r"1 token is only in the reference's \('<tool>'\).* with tokens"):
        plan(checkpoints, "more")
    with pytest.raises(PlanError, match=r"1 token is only in the policy's \('<new>'\)"):
        plan(checkpoints, "same", tokens=["<new>"])


def test_the_starting_checkpoint_gets_the_policys_new_tokens(checkpoints: Path) -> None:
    cfg = validate_config(run(checkpoints, "base", tokens=["<new>"]))
    assert plan_reference(cfg, gather_facts(cfg)).equals_starting_policy
    ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()


def test_the_remedy_works(checkpoints: Path) -> None:
    assert plan(checkpoints, "more", tokens=["<tool>"]) is Source.SEPARATE_MODEL


def test_a_loss_that_compares_distributions_needs_equally_many_rows(checkpoints: Path) -> None:
    assert plan(checkpoints, "same", dpo_loss_type="tdpo1") is Source.SEPARATE_MODEL
    with pytest.raises(PlanError, match=r"gives 352 logits a token and the policy 320.*tdpo1"):
        plan(checkpoints, "wider", dpo_loss_type="tdpo1")


def test_the_loaded_tokenizers_are_compared_too(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = validate_config(run(checkpoints, "swapped"))
    with pytest.raises(ModelError, match="2 tokens have another id there"):
        ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()
    bare = validate_config(run(checkpoints, "bare"))
    with caplog.at_level("WARNING", "fiducial"):
        ModelLoader(bare, load_tokenizer(bare), reference_model=True).load()
    assert "is not checked" in caplog.text


def test_a_tokenizer_made_of_nothing_is_none(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path in save_checkpoint(checkpoints / "nameless", "gemma2").glob("*token*"):
        path.unlink()
    cfg = validate_config(run(checkpoints, "nameless"))
    with caplog.at_level("WARNING", "fiducial"):
        ModelLoader(cfg, load_tokenizer(cfg), reference_model=True).load()
    assert "is not checked" in caplog.text
