"""Templates written here render what the model families' own do, copies of which TRL brings with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fiducial.config.schema import TokenizerConfig
from fiducial.data.example import Messages, Tool
from fiducial.data.templates import ChatTemplate, choose_template
from tiny import tiny_tokenizer

THEIRS = {"qwen_25": "qwen2_5", "qwen3": "qwen3", "llama3": "llama3", "gemma3": "gemma3"}
FUNCTION = {"name": "f", "description": "é", "parameters": {"type": "object", "properties": {}}}
TOOLS: Sequence[Tool] = ({"type": "function", "function": FUNCTION},)


def turns(*contents: str, system: str | None = None) -> Messages:
    """User and assistant in alternation."""
    head = () if system is None else ({"role": "system", "content": system},)
    roles = ("user", "assistant")
    return (*head, *({"role": roles[n % 2], "content": text} for n, text in enumerate(contents)))


def calling(content: str) -> Messages:
    """An assistant that calls two tools, and what follows."""
    calls = [{"function": {"name": name, "arguments": {"x": "ü"}}} for name in ("f", "g")]
    results = ({"role": "tool", "content": text} for text in ("1", "2"))
    called = {"role": "assistant", "content": content, "tool_calls": calls}
    return (*turns("q", system="S"), called, *results, *turns("", "done", "more", "x")[1:])


CHATS = {
    "prompt": turns("a"),
    "several turns": turns(" a ", "b\n", "c", "d"),
    "system": turns("a", "b", system=" S "),
    "thought": turns("a", "<think>\nm\n</think>\n\nb", "c", "<think>\nn\n</think>\n\nd"),
    "called": calling(""),
    "called and said": calling("let me see"),
}


CASES = [
    *(("llama3", chat, (), {}) for chat in CHATS if "called" not in chat),
    *(("gemma3", chat, (), {}) for chat in CHATS if "called" not in chat),
    *(("qwen_25", chat, tools, {}) for chat in CHATS for tools in ((), TOOLS)),
    *(
        ("qwen3", chat, tools, settings)
        for chat in CHATS
        for tools in ((), TOOLS)
        for settings in ({}, {"enable_thinking": False})
    ),
]


@pytest.mark.parametrize(("name", "chat", "tools", "settings"), CASES)
def test_it_renders_what_the_familys_own_does(
    name: str, chat: str, tools: Sequence[Tool], settings: dict[str, Any]
) -> None:
    trl = pytest.importorskip("trl")
    source = (Path(trl.__file__).parent / "chat_templates" / f"{THEIRS[name]}.jinja").read_text("utf-8")
    tokenizer = tiny_tokenizer()
    ours = choose_template(TokenizerConfig(chat_template=name, chat_template_kwargs=settings), tokenizer)
    assert ours is not None
    for opened in (False, True):
        theirs = ChatTemplate(tokenizer, source, settings)
        written = theirs.render(CHATS[chat], add_generation_prompt=opened, tools=tools)
        assert ours.render(CHATS[chat], add_generation_prompt=opened, tools=tools) == written
