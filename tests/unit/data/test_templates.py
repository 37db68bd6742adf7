"""Which template is chosen, and what ours write."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import TokenizerConfig
from fiducial.config.template_names import NAMES, WRITTEN
from fiducial.data.example import Messages, OddRow, Reason
from fiducial.data.templates import FOLDER, ChatTemplate, choose_template
from fiducial.errors import ConfigError
from tiny import CHATML

CHAT = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nS\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
    "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] S\n\na [/INST] b</s>[INST] c [/INST]",
    "phi_3": "<|system|>\nS<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n"
    "<|user|>\nc<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\n",
}
RENDERED |= {
    "qwen": RENDERED["chatml"],
    "qwen_25": RENDERED["chatml"],
    "qwen3": RENDERED["chatml"],
    "gemma3": RENDERED["gemma"],
    "phi_35": RENDERED["phi_3"],
    "alpaca": "<s>S\n\n### Instruction:\na\n\n### Response:\nb</s>\n\n### Instruction:\nc\n\n### Response:\n",
    "mistral_v1": "<s> [INST] a [/INST] b</s> [INST] c [/INST]",
    "mistral_v2v3": "<s>[INST] a[/INST] b</s>[INST] c[/INST]",
    "mistral_v3_tekken": "<s>[INST]a[/INST]b</s>[INST]c[/INST]",
}
NO_SYSTEM = ("mistral_v1", "mistral_v2v3", "mistral_v3_tekken")


def test_every_name_is_tested() -> None:
    assert set(NAMES) == set(RENDERED)
    assert set(WRITTEN) == {path.stem for path in FOLDER.glob("*.jinja")}


@pytest.mark.parametrize("name", RENDERED)
def test_named_templates(name: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = None
    for written in (name, f"tokenizer_default_fallback_{name}"):
        template = choose_template(TokenizerConfig(chat_template=written), byte_tokenizer)
        assert template is not None
        chat = CHAT[1:] if name in NO_SYSTEM else CHAT
        assert template.render(chat, add_generation_prompt=True) == RENDERED[name]
        assert template.opens_the_answer is not name.startswith("mistral")


@pytest.mark.parametrize("name", NO_SYSTEM)
def test_templates_that_know_no_system_turn_refuse_it(
    name: str, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    template = choose_template(TokenizerConfig(chat_template=name), byte_tokenizer)
    assert template is not None
    with pytest.raises(OddRow, match="alternation"):
        template.render(CHAT, add_generation_prompt=True)


def source(config: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str | None:
    template = choose_template(TokenizerConfig(**config), tokenizer)
    return None if template is None else template.source


def test_choice(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert source({}, byte_tokenizer) == CHATML
    assert source({"chat_template": "tokenizer_default"}, byte_tokenizer) == CHATML
    assert source({"chat_template": "tokenizer_default_fallback_gemma"}, byte_tokenizer) == CHATML
    assert source({"chat_template_jinja": "{{ 1 }}"}, byte_tokenizer) == "{{ 1 }}"
    assert (
        source({"chat_template": "jinja", "chat_template_jinja": str(file)}, byte_tokenizer)
        == "{{ messages }}"
    )
    byte_tokenizer.chat_template = None
    assert source({}, byte_tokenizer) is None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"chat_template": "chatlm"}, "did you mean chatml"),
        ({"chat_template": "tokenizer_default_fallback_x"}, "is no template here"),
        ({"chat_template": "tokenizer_default_fallback_llama4"}, "write tokenizer_default, or jinja"),
        ({"chat_template": "jinja"}, "needs chat_template_jinja"),
        ({"chat_template": "gemma", "chat_template_jinja": "{{ 1 }}"}, "two templates"),
        ({"chat_template_jinja": "no/such/file.jinja"}, "neither a template's text nor a file"),
        ({"chat_template": "tokenizer_default"}, "no template of its own"),
    ],
)
def test_mistakes(config: dict[str, Any], says: str, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=says):
        choose_template(TokenizerConfig(**config), byte_tokenizer)


def test_a_template_file_in_another_encoding(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }} é", encoding="latin-1")
    with pytest.raises(ConfigError, match=r"chat_template_jinja: .*chat\.jinja' is not UTF-8 text"):
        choose_template(TokenizerConfig(chat_template_jinja=str(file)), byte_tokenizer)


def test_refusals_and_bad_jinja(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    strict = choose_template(TokenizerConfig(chat_template="mistral"), byte_tokenizer)
    assert strict is not None
    with pytest.raises(OddRow) as odd:
        strict.render(({"role": "tool", "content": "x"},), add_generation_prompt=False)
    assert odd.value.reason is Reason.TEMPLATE
    wrong = choose_template(
        TokenizerConfig(chat_template_jinja="{{ messages[0]['content'] + 1 }}"), byte_tokenizer
    )
    assert wrong is not None
    with pytest.raises(OddRow) as odd:
        wrong.render(CHAT, add_generation_prompt=False)
    assert (odd.value.reason, odd.value.detail.partition(":")[0]) == (Reason.TEMPLATE, "TypeError")
    broken = choose_template(TokenizerConfig(chat_template_jinja="{% if %}"), byte_tokenizer)
    assert broken is not None
    with pytest.raises(ConfigError, match="line 1 is not valid Jinja"):
        broken.render(CHAT, add_generation_prompt=False)


def test_a_row_is_the_same_text_tomorrow(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    dated = (
        "{% if not date is defined %}{% set date = strftime_now('%d %b %Y, %A') %}{% endif %}"
        "{{ date }}: {{ messages[0]['content'] }}"
    )
    messages: Messages = ({"role": "user", "content": "Hi"},)
    template = ChatTemplate(byte_tokenizer, dated)
    assert template.render(messages, add_generation_prompt=True) == "26 Jul 2024, Friday: Hi"
    pinned = ChatTemplate(byte_tokenizer, dated, {"date": "1 Jan 2000"})
    assert pinned.render(messages, add_generation_prompt=True) == "1 Jan 2000: Hi"
    kept = ChatTemplate(byte_tokenizer, "\n" + dated)
    assert kept.render(messages, add_generation_prompt=True) == "\n26 Jul 2024, Friday: Hi"


def test_template_settings_reach_the_template(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    config = TokenizerConfig(
        chat_template_jinja="{{ 'on' if thinking else 'off' }}", chat_template_kwargs={"thinking": True}
    )
    template = choose_template(config, byte_tokenizer)
    assert template is not None
    assert template.render(CHAT, add_generation_prompt=True) == "on"
