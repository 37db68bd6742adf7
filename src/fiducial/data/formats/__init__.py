"""Every way rows may hold preferences, in one table.

Adding a format: write a reader `(row, fields) -> (prompt, completions)`, add its line here, its example to
`tests/format_examples.py`, and its line to `docs/data.md`.
"""

from collections.abc import Mapping
from difflib import get_close_matches

from fiducial.config.schema import DataConfig, DatasetConfig
from fiducial.data.formats import chat, hh, labelled, named_template, ranked, trl, user_defined
from fiducial.data.formats.fields import Fields, Format, resolve_fields
from fiducial.data.formats.named_template import CHATML, LLAMA3, Chat, Chats, Question, TurnMarks
from fiducial.data.formats.shape import LABEL_COLUMNS, Shape
from fiducial.errors import ConfigError, DataError

__all__ = ["FORMATS", "Fields", "Format", "choose_format", "require_known_types"]

Columns = Mapping[str, tuple[str, ...]]
PAIR: Columns = {"chosen": ("chosen",), "rejected": ("rejected",)}
EXPLICIT: Columns = {"prompt": ("prompt",), **PAIR}
LABEL: Columns = {"label": LABEL_COLUMNS}
SINGLE: Columns = {"prompt": ("prompt",), "completion": ("completion",), **LABEL}
RANKED: Columns = {"prompt": ("prompt",), "completions": ("completions",)}
SYSTEM: Columns = {"system": ("system",)}
SYSTEM_BY_NAME: Columns = {"system": ()}
"""A system column is read only where field_system names it."""
TOOLS: Columns = {"tools": ("tools",)}
"""For the chat template; left unread where that writes none."""
CHAT: Columns = {**SYSTEM_BY_NAME, **TOOLS}
CHAT_AND_SYSTEM: Columns = {**SYSTEM, **TOOLS}
RANKING: Columns = {"scores": ("scores", "ratings"), **CHAT}


def _named(prefix: str, marks: TurnMarks) -> dict[str, Format]:
    def question(*prompt: str, **answers: tuple[str, ...]) -> Format:
        return Format(
            Question(marks), {"prompt": prompt, **PAIR, **answers}, optional=SYSTEM, reads_messages=True
        )

    return {
        f"{prefix}.default": question(
            "prompt",
            "input",
            "question",
            "instruction",
            chosen=("chosen", "chosen_response"),
            rejected=("rejected", "rejected_response"),
        ),
        f"{prefix}.argilla": question(
            "instruction", chosen=("chosen_response", "chosen"), rejected=("rejected_response", "rejected")
        ),
        f"{prefix}.argilla_chat": Format(Chats(marks), PAIR, reads_messages=True),
        f"{prefix}.icr": question("input"),
        f"{prefix}.intel": question("question"),
        f"{prefix}.prompt_pairs": question("prompt"),
        f"{prefix}.ultra": question("prompt"),
    }


def _named_labelled(prefix: str, marks: TurnMarks) -> dict[str, Format]:
    def question(prompt: str) -> Format:
        return Format(Question(marks), {**SINGLE, "prompt": (prompt,)}, optional=SYSTEM, reads_messages=True)

    return {
        f"{prefix}.argilla": question("instruction"),
        f"{prefix}.argilla_chat": Format(
            Chat(marks), {"completion": ("completion",), **LABEL}, reads_messages=True
        ),
        f"{prefix}.intel": question("question"),
        f"{prefix}.prompt_pairs": question("prompt"),
        f"{prefix}.ultra": question("prompt"),
    }


FORMATS: dict[str, Format] = {
    "trl.explicit": Format(trl.explicit, EXPLICIT, detect=trl.is_explicit),
    "trl.explicit_chat": Format(
        trl.explicit_chat,
        EXPLICIT,
        optional=CHAT,
        detect=trl.is_explicit_chat,
        reads_messages=True,
    ),
    "trl.implicit": Format(
        trl.implicit, PAIR, detect=lambda shape: trl.is_implicit(shape) and not hh.is_transcript(shape)
    ),
    "trl.implicit_chat": Format(
        trl.implicit_chat, PAIR, optional=CHAT, detect=trl.is_implicit_chat, reads_messages=True
    ),
    "sharegpt": Format(
        chat.answered,
        {"messages": ("conversations",), **PAIR},
        optional=CHAT_AND_SYSTEM,
        detect=chat.is_sharegpt,
        reads_messages=True,
    ),
    "hh": Format(hh.transcript, PAIR, detect=hh.is_transcript),
    "hh.chat": Format(hh.chat, PAIR),
    "chat_template.default": Format(
        chat.answered,
        {"messages": ("messages",), **PAIR},
        optional=CHAT,
        detect=chat.is_messages,
        reads_messages=True,
    ),
    "chat_template.argilla_chat": Format(trl.implicit_chat, PAIR, optional=CHAT, reads_messages=True),
    "chat_template.argilla": Format(trl.implicit_chat, PAIR, optional=CHAT_AND_SYSTEM, reads_messages=True),
    **_named("chatml", CHATML),
    **_named("llama3", LLAMA3),
    "zephyr.nectar": Format(named_template.nectar, {"prompt": ("prompt",), "messages": ("answers",)}),
    "passthrough": Format(trl.passthrough, EXPLICIT, reads_messages=True),
    "user_defined.default": Format(user_defined.formatted, EXPLICIT, optional=SYSTEM),
    "ranked.default": Format(
        ranked.ranked,
        RANKED,
        optional=RANKING,
        detect=ranked.is_ranked,
        scores=ranked.scores,
        reads_messages=True,
    ),
    "ranked.best_and_worst": Format(
        ranked.best_and_worst,
        RANKED,
        optional=RANKING,
        scores=ranked.scores_of_best_and_worst,
        reads_messages=True,
    ),
    "kto.trl": Format(labelled.plain, SINGLE, detect=labelled.is_plain),
    "kto.trl_chat": Format(
        labelled.chat, SINGLE, optional=CHAT, detect=labelled.is_chat, reads_messages=True
    ),
    "kto.sharegpt": Format(
        labelled.conversation,
        {"messages": ("conversations",), **LABEL},
        optional=CHAT_AND_SYSTEM,
        detect=labelled.is_sharegpt,
        reads_messages=True,
    ),
    "kto.chat_template.default": Format(
        labelled.conversation,
        {"messages": ("messages",), **LABEL},
        optional=CHAT,
        detect=labelled.is_messages,
        reads_messages=True,
    ),
    **_named_labelled("kto.chatml", CHATML),
    **_named_labelled("kto.llama3", LLAMA3),
    "kto.user_defined.default": Format(user_defined.formatted_completion, SINGLE, optional=SYSTEM),
}
"""Those that begin with `kto.` hold labelled completions. axolotl has types of the same names for pairs and
for labelled rows; what the rows hold decides which one is meant, so that the prefix need not be written."""


def choose_format(config: DatasetConfig, shape: Shape, *, where: str) -> tuple[str, Format, Fields]:
    """The format a dataset's rows are read with, by name or by looking, and where its parts are.

    Raises:
        ConfigError: no format of that name, or an option it does not read.
        DataError: `auto` finds none or several, or a column is missing.
    """
    name = _named_format(config, shape, where) or _detect(config, shape, where)
    fields = resolve_fields(name, FORMATS[name], config, where=where, columns=tuple(shape.kinds))
    user_defined.check_templates(fields, where=where)
    _require_no_written_chats(config, shape, fields, where)
    return name, FORMATS[name], fields


def require_known_types(data: DataConfig) -> None:
    """Raise `ConfigError` for a type that is no format's name, before any row is read."""
    for section in ("datasets", "test_datasets"):
        for number, config in enumerate(getattr(data, section)):
            if config.type != "auto" and not any(_meant_by(config)):
                raise _unknown_type(config, f"{section}.{number}")


def _named_format(config: DatasetConfig, shape: Shape, where: str) -> str | None:
    if config.type == "auto":
        return None
    paired, single = _meant_by(config)
    names = [*single, *paired] if _holds_labels(config, shape) else [*paired, *single]
    if not names:
        raise _unknown_type(config, where)
    return names[0]


def _meant_by(config: DatasetConfig) -> tuple[list[str], list[str]]:
    """Formats of pairs, and of labelled completions, that the written type may name."""
    written = config.type if isinstance(config.type, str) else "user_defined"
    names = (written, f"{written}.default")
    single = (f"kto.{name}" for name in names)
    return [name for name in names if name in FORMATS], [name for name in single if name in FORMATS]


def _unknown_type(config: DatasetConfig, where: str) -> ConfigError:
    assert isinstance(config.type, str), "a mapping is a user-defined type"
    if config.type.startswith("bradley_terry"):
        return ConfigError(
            f"{where}.type: '{config.type}' is for reward models. Write type: trl.explicit_chat and "
            f"field_prompt: input (and field_system: system), which renders the same rows."
        )
    nearest = get_close_matches(config.type, FORMATS, n=1, cutoff=0.4)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return ConfigError(
        f"{where}.type: '{config.type}' is not a type of preference data.{hint} "
        f"The types are auto, {', '.join(FORMATS)}, or a mapping with prompt_format and its kin."
    )


def _holds_labels(config: DatasetConfig, shape: Shape) -> bool:
    written = config.type if isinstance(config.type, dict) else {}
    named = {"field_completion", "field_label", "completion_format"} & written.keys()
    return shape.is_labelled or bool(named)


def _detect(config: DatasetConfig, shape: Shape, where: str) -> str:
    found = [name for name, format_ in FORMATS.items() if format_.detect and format_.detect(shape)]
    if len(found) == 1:
        if found[0] == "trl.implicit":
            _require_no_prompt(config, shape, where)
        return found[0]
    columns = ", ".join(f"{name} ({kind})" for name, kind in shape.kinds.items())
    for option, column in shape.names.items():
        if column not in shape.kinds:
            raise DataError(
                f"{where}.field_{option} ({config.path}): there is no column '{column}'; there are {columns}."
            )
    known = ", ".join(name for name, format_ in FORMATS.items() if format_.detect)
    problem = (
        f"could be any of {', '.join(found)}"
        if found
        else f"is none of the formats that are recognised ({known})"
    )
    raise DataError(
        f"{where} ({config.path}): the data {problem}. Its columns are: {columns}. Set `type:` to the "
        f"format's name, and say where its parts are with field_prompt, field_chosen, field_rejected, "
        f"field_completion, field_label or field_messages."
    )


def _require_no_written_chats(config: DatasetConfig, shape: Shape, fields: Fields, where: str) -> None:
    """Raise `DataError` for conversations that would be learnt as the text they are written as."""
    beside = {"prompt", "messages", "conversations"} & shape.kinds.keys()
    for column in dict.fromkeys((*fields.columns.values(), *sorted(beside))):
        if fields.columns.get("tools") != column and shape.holds_written_chats(column):
            raise DataError(
                f"{where} ({config.path}): the column '{column}' holds conversations written as text. Store "
                f"them as lists of objects, in jsonl or parquet: json.loads reads them, or ast.literal_eval "
                f"where keys stand in single quotes."
            )


_PROMPTS = ("prompt", "instruction", "question", "query", "input", "problem")
"""What columns that hold a prompt are usually called."""


def _require_no_prompt(config: DatasetConfig, shape: Shape, where: str) -> None:
    """Raise `DataError` for a prompt that would be overlooked: two answers to it often begin alike, too."""
    texts = (name for name, kind in shape.kinds.items() if kind == "text")
    alike = [name for name in texts if get_close_matches(name.lower(), _PROMPTS, n=1, cutoff=0.8)]
    if not alike:
        return
    parts = " and ".join(f"'{name}'" for name in alike)
    raise DataError(
        f"{where} ({config.path}): "
        + (
            f"the column {parts} looks like the prompt, and without it the prompt would be what chosen and "
            f"rejected begin with. Write field_prompt: {alike[0]}"
            if len(alike) == 1
            else f"the columns {parts} look like parts of the prompt. Join them into one, 'prompt', or write "
            f"field_prompt for the one that holds all of it"
        )
        + ", or type: trl.implicit if both answers do begin with the prompt."
    )
