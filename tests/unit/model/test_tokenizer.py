from pathlib import Path

import pytest

from fiducial.config.schema import ModelConfig, RunConfig, TokenizerConfig
from fiducial.errors import ModelError
from fiducial.model.tokenizer import load_tokenizer
from tiny import save_checkpoint, tiny_tokenizer


def run(base: Path, **tokenizer: object) -> RunConfig:
    return RunConfig(
        model=ModelConfig(base_model=str(base)), tokenizer=TokenizerConfig.model_validate(tokenizer)
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "base")


def test_it_is_the_base_models(base: Path) -> None:
    assert load_tokenizer(run(base)).encode("hé\n") == tiny_tokenizer().encode("hé\n")


def test_another_path_wins(base: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<other>"])
    other.save_pretrained(tmp_path / "other")
    assert "<other>" in load_tokenizer(run(base, path=str(tmp_path / "other"))).get_vocab()


def test_special_and_new_tokens_are_added(base: Path) -> None:
    before = len(load_tokenizer(run(base)))
    tokenizer = load_tokenizer(
        run(base, special_tokens={"pad_token": "<blank>", "eos_token": "<|im_end|>"}, tokens=["<think>"])
    )
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<blank>", "<|im_end|>")
    assert len(tokenizer) == before + 2  # <blank> and <think>; <|im_end|> was there
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1


def test_a_missing_pad_token_becomes_eos_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = tiny_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    with caplog.at_level("INFO", "fiducial"):
        tokenizer = load_tokenizer(run(tmp_path))
    assert tokenizer.pad_token == "</s>"
    assert "no pad token" in caplog.text


def test_neither_pad_nor_eos_names_the_key(tmp_path: Path) -> None:
    bare = tiny_tokenizer()
    bare.pad_token = bare.eos_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"special_tokens: \{eos_token"):
        load_tokenizer(run(tmp_path))


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"chat_template": "gemma"}, "<start_of_turn>"),
        ({"chat_template_jinja": "{{ 'mine' }}"}, "mine"),
        ({"chat_template": "tokenizer_default_fallback_gemma"}, "<|im_start|>"),
        ({"chat_template": "tokenizer_default"}, "<|im_start|>"),
        ({}, "<|im_start|>"),
    ],
)
def test_the_template_trained_with_is_saved(
    base: Path, tmp_path: Path, settings: dict[str, str], written: str
) -> None:
    load_tokenizer(run(base, **settings)).save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(run(tmp_path / "saved"))
    assert written in saved.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.parametrize("name", ["tokenizer_default", "tokenizer_default_fallback_gemma"])
def test_templates_beside_the_one_trained_with_stay(base: Path, name: str) -> None:
    tokenizer = load_tokenizer(run(base))
    tokenizer.chat_template = {"default": "{{ 'mine' }}", "tool_use": "{{ 'for tools' }}"}
    tokenizer.save_pretrained(base)
    assert load_tokenizer(run(base, chat_template=name)).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}'])
def test_missing_and_damaged_files_are_named(base: Path, content: str | None) -> None:
    file = base / "tokenizer.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ModelError, match="no tokenizer can be loaded from"):
        load_tokenizer(run(base))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_tokenizer_made_of_nothing_is_called_empty(family: str, tmp_path: Path) -> None:
    """transformers makes one where a checkpoint has no files for it, and it knows special tokens alone."""
    base = save_checkpoint(tmp_path / "base", family)
    for file in base.glob("token*"):
        file.unlink()
    with pytest.raises(ModelError, match="is empty; name another"):
        load_tokenizer(run(base))
