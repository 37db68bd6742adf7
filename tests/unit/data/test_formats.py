"""Every format: one row in, the texts that its token ids decode to out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import DatasetConfig
from fiducial.data.example import OddRow, Reason
from fiducial.data.formats import FORMATS, choose_format
from fiducial.data.formats.shape import look_at
from fiducial.data.prepare import load_groups
from fiducial.errors import ConfigError, DataError

USER = {"role": "user", "content": "Hi"}
CHAT_PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
YES, NO = "yes<|im_end|>", "no<|im_end|>"


def turn(content: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": content}


def said(value: str, who: str = "gpt") -> dict[str, str]:
    return {"from": who, "value": value}


@dataclass(frozen=True)
class Example:
    row: dict[str, Any]
    texts: tuple[str, str, str]
    auto: bool = False
    options: dict[str, Any] = field(default_factory=dict)


CHATS = {"chosen": [USER, turn("yes")], "rejected": [USER, turn("no")]}
CHAT_TEXTS = (CHAT_PROMPT, YES, NO)
LLAMA3_PROMPT = (
    "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_PROMPT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
)


def named(prefix: str, prompt: str, end: str) -> dict[str, Example]:
    texts = (prompt, f"4{end}", f"5{end}")
    answers = {"chosen": "4", "rejected": "5", "system": "Be brief."}
    system, question = turn("Be brief.", "system"), turn("2+2?", "user")
    return {
        f"{prefix}.default": Example(
            {"instruction": "2+2?", "chosen_response": "4", "rejected_response": "5", "system": "Be brief."},
            texts,
        ),
        f"{prefix}.argilla_chat": Example(
            {"chosen": [system, question, turn("4")], "rejected": [system, question, turn("5")]}, texts
        ),
        f"{prefix}.icr": Example({"input": "2+2?", **answers}, texts),
        f"{prefix}.intel": Example({"question": "2+2?", **answers}, texts),
        f"{prefix}.prompt_pairs": Example({"prompt": "2+2?", **answers}, texts),
        f"{prefix}.ultra": Example(
            {
                "prompt": "2+2?",
                "system": "Be brief.",
                "chosen": [question, turn("4")],
                "rejected": [question, turn("5")],
            },
            texts,
        ),
    }


EXAMPLES: dict[str, Example] = {
    "trl.explicit": Example(
        {"prompt": "Q: 2+2?\nA:", "chosen": " 4", "rejected": " 5"},
        ("Q: 2+2?\nA:", " 4</s>", " 5</s>"),
        auto=True,
    ),
    "trl.explicit_chat": Example(
        {"prompt": [USER], "chosen": [turn("yes")], "rejected": [turn("no")]}, CHAT_TEXTS, auto=True
    ),
    "trl.implicit": Example(
        {"chosen": "The sky is blue.", "rejected": "The sky is bleak."},
        ("The sky is", " blue.</s>", " bleak.</s>"),
        auto=True,
    ),
    "trl.implicit_chat": Example(CHATS, CHAT_TEXTS, auto=True),
    "sharegpt": Example(
        {"conversations": [said("Hi", "human")], "chosen": said("yes"), "rejected": said("no")},
        CHAT_TEXTS,
        auto=True,
    ),
    "hh": Example(
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        ("\n\nHuman: Hi\n\nAssistant:", " yes</s>", " no</s>"),
        auto=True,
    ),
    "hh.chat": Example(
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        CHAT_TEXTS,
    ),
    "chat_template.default": Example(
        {"messages": [USER], "chosen": turn("yes"), "rejected": turn("no")}, CHAT_TEXTS, auto=True
    ),
    "chat_template.argilla_chat": Example(CHATS, CHAT_TEXTS),
    "chat_template.argilla": Example(
        {**CHATS, "system": "Be brief."},
        ("<|im_start|>system\nBe brief.<|im_end|>\n" + CHAT_PROMPT, YES, NO),
    ),
    **named("chatml", CHATML_PROMPT, "<|im_end|>"),
    # The tiny tokenizer has no <|eot_id|> token: to it the mark is text, and EOS ends the completion.
    **named("llama3", LLAMA3_PROMPT, "<|eot_id|></s>"),
    "zephyr.nectar": Example(
        {
            "prompt": "2+2?",
            "answers": [
                {"answer": "five", "rank": 2.0},
                {"answer": "six", "rank": 3.0},
                {"answer": "four", "rank": 1.0},
            ],
        },
        ("<|system|>\n</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n", "four</s>", "five</s>"),
    ),
    "passthrough": Example(
        {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"}, ("2+2?", " 4</s>", " 5</s>")
    ),
    "user_defined.default": Example(
        {"ask": "2+2?", "good": "4", "bad": "5"},
        ("{} Q: 2+2?\nA:", " 4</s>", " 5!</s>"),
        options={
            "type": {
                "field_prompt": "ask",
                "field_chosen": "good",
                "field_rejected": "bad",
                "prompt_format": "{{}}{system} Q: {prompt}\nA:",
                "chosen_format": " {chosen}",
                "rejected_format": " {rejected}!",
            }
        },
    ),
}


def test_every_format_has_an_example() -> None:
    assert EXAMPLES.keys() == FORMATS.keys()
    assert {name for name, example in EXAMPLES.items() if example.auto} == {
        name for name, format_ in FORMATS.items() if format_.detect
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_row_decodes_to_the_expected_texts(
    name: str,
    byte_tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., Path],
    run_config: Callable[..., Any],
) -> None:
    example = EXAMPLES[name]
    options = {"type": name, **example.options}
    prepared = load_groups(run_config({"path": str(write([example.row])), **options}), byte_tokenizer)
    [group] = [prepared.train[index] for index in range(len(prepared.train))]
    assert tuple(map(byte_tokenizer.decode, (group.prompt, *group.completions))) == example.texts
    assert prepared.audit.datasets[0].format == name


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.auto])
def test_auto_recognises(name: str) -> None:
    row = EXAMPLES[name].row
    config = DatasetConfig(path="somewhere")
    assert choose_format(config, look_at([row], list(row), config), where="datasets.0")[0] == name


def test_auto_recognises_renamed_parts() -> None:
    config = DatasetConfig(
        path="p",
        field_messages="dialogue",
        field_chosen="good",
        field_rejected="bad",
        message_property_mappings={"role": "who", "content": "what"},
        roles={"user": ("me",), "assistant": ("you",)},
    )
    row = {
        "dialogue": [{"who": "me", "what": "Hi"}],
        "good": {"who": "you", "what": "yes"},
        "bad": {"who": "you", "what": "no"},
    }
    name, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert name == "sharegpt"
    assert format_.read(row, fields) == ((USER,), ((turn("yes"),), (turn("no"),)))


def test_ultrafeedback_columns_are_an_implicit_prompt() -> None:
    row = {"prompt": "Hi", **CHATS, "messages": CHATS["chosen"], "score_chosen": 8.0}
    config = DatasetConfig(path="p")
    assert (
        choose_format(config, look_at([row], list(row), config), where="datasets.0")[0] == "trl.implicit_chat"
    )


def choose(options: dict[str, Any], row: dict[str, Any]) -> None:
    config = DatasetConfig(path="rows.jsonl", **options)
    choose_format(config, look_at([row], list(row), config), where="datasets.0")


PLAIN = EXAMPLES["trl.explicit"].row
BOTH = {"conversations": [said("Hi", "human")], "messages": [USER], "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("options", "row", "error", "says"),
    [
        ({}, {"text": "a", "label": True}, DataError, r"text \(text\), label \(other\).*field_prompt"),
        ({}, BOTH, DataError, "any of sharegpt, chat_template.default"),
        ({"type": "chatml.intl"}, PLAIN, ConfigError, "Did you mean 'chatml.intel'"),
        ({"type": "kto"}, PLAIN, ConfigError, r"datasets\.0\.type: 'kto'.*trl\.explicit"),
        ({"type": "hh", "field_prompt": "prompt"}, PLAIN, ConfigError, "field_prompt: has no effect"),
        ({"type": "trl.explicit", "roles": {"user": ("me",)}}, PLAIN, ConfigError, "roles: has no effect"),
        (
            {"type": "sharegpt"},
            PLAIN,
            DataError,
            r"'conversations' for the messages.*prompt, chosen, rejected",
        ),
        ({"field_chosen": "good", "type": "trl.explicit"}, PLAIN, DataError, "'good' for the chosen"),
        ({"type": {"prompt_fromat": "x"}}, PLAIN, ConfigError, "type.prompt_fromat: unknown key"),
        ({"type": {"prompt_format": "{question}"}}, PLAIN, ConfigError, r"unknown placeholder \{question\}"),
        ({"type": {"chosen_format": "fixed"}}, PLAIN, ConfigError, r"must hold \{chosen\}"),
        ({"type": {"chosen_format": "{chosen"}}, PLAIN, ConfigError, "brace is written twice"),
    ],
)
def test_mistakes_say_where_and_what(
    options: dict[str, Any], row: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        choose(options, row)


def test_nectar_is_not_upside_down() -> None:
    """axolotl compares the two worst answers and calls the worst one chosen."""
    row = {"prompt": "?", "answers": [{"answer": f"rank {rank}", "rank": rank} for rank in (7, 1, 3, 2)]}
    config = DatasetConfig(path="p", type="zephyr.nectar")
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert format_.read(row, fields)[1] == ("rank 1", "rank 2")


def test_docs_list_every_format() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in page] == []


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "reason"),
    [
        ("hh", f"{H} Hi{A} a{H} b{A} c", f"{H} Hi{A} x{H} y{A} z", Reason.DIVERGED),
        ("hh", f"{H} Hi{A} a", f"{H} Ho{A} a", Reason.DIVERGED),
        ("hh", f"{H} Hi", f"{H} Hi{A} a", Reason.NO_ASSISTANT),
        ("trl.implicit", "same", "same", Reason.EQUAL),
        ("trl.implicit_chat", [USER, turn("a")], [USER, turn("a")], Reason.EQUAL),
        ("trl.implicit_chat", [USER, turn("a")], [USER], Reason.DIVERGED),
        ("chatml.argilla_chat", [USER, turn("a")], [turn("Ho", "user"), turn("a")], Reason.DIVERGED),
        ("chatml.argilla_chat", [USER, USER], [USER, turn("a")], Reason.NO_ASSISTANT),
        ("trl.implicit_chat", "text", [USER], Reason.NOT_TEXT),
    ],
)
def test_rows_that_are_no_pair(name: str, chosen: object, rejected: object, reason: Reason) -> None:
    config, row = DatasetConfig(path="p", type=name), {"chosen": chosen, "rejected": rejected}
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    with pytest.raises(OddRow) as odd:
        format_.read(row, fields)
    assert odd.value.reason is reason


def test_hh_prompt_is_the_shared_dialogue() -> None:
    """An answer may itself hold an assistant marker; it still answers the shared prompt."""
    row = {"chosen": f"{H} Hi{A} a{A} b", "rejected": f"{H} Hi{A} c"}
    config = DatasetConfig(path="p", type="hh")
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert format_.read(row, fields) == (f"{H} Hi{A}", (f" a{A} b", " c"))
