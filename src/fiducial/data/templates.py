"""Which chat template renders conversations, and rendering with it.

The tokenizer's own, one of ours by name (`chat_templates/*.jinja`), or a Jinja text or file. Our templates
write what the model families were trained with, in our words; a checkpoint's own template is always the
better choice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from fiducial.config.schema import TokenizerConfig
from fiducial.config.template_names import ALIASES, FALLBACK, NAMES, OWN, objection, text_of
from fiducial.data.example import Messages, OddRow, Reason, Tool
from fiducial.errors import ConfigError

FOLDER = Path(__file__).parent / "chat_templates"
_TODAY = datetime(2024, 7, 26)
"""What templates are told that ask for today's date; it is Llama 3.2's own default."""
_QUESTION: Messages = ({"role": "user", "content": "?"},)
_TOOL: Tool = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_DIRECTIVES = ("-d", "-m", *"aAbBcdeFHIjmMpSxXyY")


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, the tokenizer whose special tokens it writes, and its own settings."""

    tokenizer: PreTrainedTokenizerBase
    source: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Messages, *, add_generation_prompt: bool, tools: Sequence[Tool] = ()) -> str:
        """The conversation, and what could be called in it, as text.

        Raises:
            OddRow: The template refuses it.
        """
        settings = dict(self.kwargs) | ({"tools": [dict(tool) for tool in tools]} if tools else {})
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=_on_one_day(self.source),
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **settings,
            )
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"chat_template: line {error.lineno} is not valid Jinja: {error.message}"
            ) from error
        except TemplateError as error:
            raise OddRow(Reason.TEMPLATE, str(error)) from error
        except Exception as error:  # a template computes, and what it gets wrong is whatever Python raises
            raise OddRow(Reason.TEMPLATE, f"{type(error).__name__}: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    @property
    def opens_the_answer(self) -> bool:
        """Whether the template writes the assistant's header when asked for a generation prompt."""
        try:
            closed = self.render(_QUESTION, add_generation_prompt=False)
            return self.render(_QUESTION, add_generation_prompt=True) != closed
        except OddRow:  # a template with demands of its own; rows will tell
            return True

    @property
    def writes_tools(self) -> bool:
        """Whether the template tells the assistant what it could call."""
        try:
            told = self.render(_QUESTION, add_generation_prompt=True, tools=[_TOOL])
            return told != self.render(_QUESTION, add_generation_prompt=True)
        except OddRow:  # rows will tell
            return True


def _on_one_day(source: str) -> str:
    """The template with today's date, where it asks for that, always the same one.

    With the real one a row would be other tokens tomorrow: for a resumed run, an evaluation, and the cache.
    transformers hands no functions to templates, so it is one of their own.
    """
    if "strftime_now" not in source:
        return source
    replaced = "".join(f".replace('%{each}', '{_TODAY.strftime(f'%{each}')}')" for each in _DIRECTIVES)
    # What ends the prefix is no block, after which a line break would be trimmed.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{source}"


def choose_template(config: TokenizerConfig, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate | None:
    """The template of a run; None where none is asked for and the tokenizer has none.

    Raises:
        ConfigError: no template of that name, a file that is not there, or two answers to one question.
    """
    source = _source(config, tokenizer)
    return None if source is None else ChatTemplate(tokenizer, source, config.chat_template_kwargs)


def _source(config: TokenizerConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    name, jinja = config.chat_template, config.chat_template_jinja
    if jinja is not None:
        if name not in (None, "jinja"):
            raise ConfigError(
                f"chat_template: '{name}' and chat_template_jinja name two templates. Keep one of them."
            )
        return text_of(jinja)
    if name == "jinja":
        raise ConfigError("chat_template: 'jinja' needs chat_template_jinja, the template's text or file.")
    own = _own(tokenizer)
    if name is None:
        return own
    if name == OWN:
        if own is None:
            raise ConfigError(
                f"chat_template: the tokenizer has no template of its own. Name one: {', '.join(NAMES)}."
            )
        return own
    if why := objection(name):
        raise ConfigError(f"chat_template: {name} — {why}.")
    if name.startswith(FALLBACK):
        return own or _named(name.removeprefix(FALLBACK))
    return _named(name)


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    own: str | dict[str, str] | None = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _named(name: str) -> str:
    return (FOLDER / f"{ALIASES.get(name, name)}.jinja").read_text(encoding="utf-8")
