"""Names of chat templates: those written here, and those that checkpoints or users bring."""

from difflib import get_close_matches
from pathlib import Path

from fiducial.errors import ConfigError

WRITTEN = (
    *("alpaca", "chatml", "gemma", "llama3", "mistral", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken"),
    *("phi_3", "qwen3", "qwen_25", "zephyr"),
)
"""Each a file in `data/chat_templates/`."""
ALIASES = {"qwen": "chatml", "gemma3": "gemma", "phi_35": "phi_3"}
NAMES = tuple(sorted({*WRITTEN, *ALIASES}))
FALLBACK = "tokenizer_default_fallback_"
OWN = "tokenizer_default"

_CHECKPOINTS_OWN = frozenset(
    (
        *("aya", "cohere", "command_a", "command_a_rag", "command_a_tool_use", "deepseek_v2"),
        *("deepseek_v3", "exaone", "exaone4", "falcon_h1", "gemma3n", "gemma4"),
        *("gemma4_unified", "granite", "granitemoe", "jamba", "llama3_2_vision", "llama4"),
        *("llava", "metharme", "mistral_v7_tekken", "nemotron", "nemotron_h", "phi_4"),
        *("pixtral", "qwen2_vl", "qwen3_5"),
    )
)
"""axolotl's names of templates that are not written here."""


def objection(written: str) -> str | None:
    """Why `chat_template: written` names no template, and what to write; None where it does."""
    name = written.removeprefix(FALLBACK)
    if name in NAMES or written in (OWN, "jinja"):
        return None
    if name in _CHECKPOINTS_OWN:
        return (
            f"'{name}' is not written here, as checkpoints of that family bring it; write {OWN}, or jinja "
            f"with chat_template_jinja"
        )
    nearest = get_close_matches(written, (*NAMES, OWN, *(FALLBACK + each for each in NAMES), "jinja"), n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return (
        f"is no template here; {hint}there are {', '.join(NAMES)}, {OWN} (the checkpoint's own), "
        f"{FALLBACK}<name>, and jinja with chat_template_jinja"
    )


def text_of(jinja: str) -> str:
    """The template's text that `chat_template_jinja: jinja` holds, or names a file of.

    Raises:
        ConfigError: it is neither.
    """
    if "{{" in jinja or "{%" in jinja:
        return jinja
    path = Path(jinja).expanduser()
    if not path.is_file():
        raise ConfigError(f"chat_template_jinja: '{jinja}' is neither a template's text nor a file.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template_jinja: '{jinja}' is not UTF-8 text: {error}.") from error
