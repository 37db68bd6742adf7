"""Every format: one row in, the texts that its token ids decode to out."""

import json
from collections.abc import Callable
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
from format_examples import CHATS, EXAMPLES, USER, said, turn


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
    assert group.scores == (1.0,) or "label" not in FORMATS[name].columns
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


@pytest.mark.parametrize(
    ("written", "row", "meant"),
    [
        ("chatml.intel", {"question": "?", "completion": "a", "label": True}, "kto.chatml.intel"),
        ("chatml.intel", {"question": "?", "chosen": "a", "rejected": "b", "label": 1}, "chatml.intel"),
        ("llama3.argilla", {"instruction": "?", "completion": "a", "label": True}, "kto.llama3.argilla"),
        ("sharegpt", {"conversations": [said("Hi", "human"), said("a")], "label": False}, "kto.sharegpt"),
        ("chat_template", {"messages": [USER, turn("a")], "label": 0}, "kto.chat_template.default"),
        ("user_defined", {"prompt": "?", "completion": "a", "label": 0}, "kto.user_defined.default"),
    ],
)
def test_rows_decide_between_types_of_one_name(written: str, row: dict[str, Any], meant: str) -> None:
    """axolotl calls a type of pairs and a type of labelled completions the same."""
    config = DatasetConfig(path="p", type=written)
    assert choose_format(config, look_at([row], list(row), config), where="datasets.0")[0] == meant


def test_a_pair_in_columns_of_its_own_beside_a_label() -> None:
    row = {"q": "Hi", "good": "yes", "bad": "no", "label": 1}
    config = DatasetConfig(
        path="somewhere", type={"field_prompt": "q", "field_chosen": "good", "field_rejected": "bad"}
    )
    name, *_ = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert name == "user_defined.default"


def test_a_label_under_another_name() -> None:
    row = {"prompt": "?", "completion": "a", "thumbs": "True"}
    config = DatasetConfig(path="p", field_label="thumbs")
    assert choose_format(config, look_at([row], list(row), config), where="datasets.0")[0] == "kto.trl"


def test_ultrafeedback_columns_are_an_implicit_prompt() -> None:
    row = {"prompt": "Hi", **CHATS, "messages": CHATS["chosen"], "score_chosen": 8.0}
    config = DatasetConfig(path="p")
    assert (
        choose_format(config, look_at([row], list(row), config), where="datasets.0")[0] == "trl.implicit_chat"
    )


@pytest.mark.parametrize("column", ["instruction", "promt", "Question"])
def test_a_prompt_that_would_be_overlooked_is_pointed_out(column: str) -> None:
    """Answers that begin alike would pass for an implicit prompt, and the others would be dropped."""
    row = {column: "Why?", "chosen": "The sun.", "rejected": "The moon."}
    with pytest.raises(DataError, match=f"'{column}' looks like the prompt.*field_prompt: {column}"):
        choose({}, row)
    choose({"field_prompt": column}, row)
    choose({"type": "trl.implicit"}, row)
    choose({}, row | {column: 3.5})
    choose({}, {"source": "web", "chosen": "The sun.", "rejected": "The moon."})


def test_a_prompt_in_two_columns_is_not_halved() -> None:
    """LLaMA-Factory's rows of Alpaca's kind: the instruction alone is not what the answers answer."""
    row = {"instruction": "Translate.", "input": "The sun.", "chosen": "Le soleil.", "rejected": "El sol."}
    with pytest.raises(DataError, match=r"columns 'instruction' and 'input' look like parts .* Join them"):
        choose({}, row)


@pytest.mark.parametrize("write_down", [json.dumps, repr, lambda turns: json.dumps(turns[0])])
def test_conversations_written_as_text_are_pointed_out(write_down: Callable[[Any], str]) -> None:
    asked, chosen, rejected = write_down([USER]), write_down([turn("yes")]), write_down([turn("no")])
    pair = {"chosen": chosen, "rejected": rejected}
    for row in ({"prompt": asked, **pair}, pair, {"messages": asked, "chosen": "yes", "rejected": "no"}):
        with pytest.raises(DataError, match=r"holds conversations written as text.*json\.loads"):
            choose({}, row)
    with pytest.raises(DataError, match="'good' holds conversations written as text"):
        choose({"type": {"field_chosen": "good"}}, {"prompt": "Hi", "good": chosen, "rejected": rejected})


@pytest.mark.parametrize(
    "answers", [('{"answer": 1}', "[1]"), ('{"value": 1}', '{"value": 2}'), ('{"from": "A", "to": "B"}',) * 2]
)
def test_answers_in_json_are_no_conversations(answers: tuple[str, str]) -> None:
    choose({}, {"prompt": "As JSON?", "chosen": answers[0], "rejected": answers[1]})


def test_a_column_that_is_named_and_not_there_is_pointed_out() -> None:
    row = {"prompt": "Why?", "chosen": "The sun.", "rejected": "The moon."}
    with pytest.raises(DataError, match=r"datasets\.0\.field_chosen .*no column 'good'; there are prompt"):
        choose({"field_chosen": "good"}, row)


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
        (
            {"type": "bradley_terry.chat_template"},
            PLAIN,
            ConfigError,
            "type: trl.explicit_chat and field_prompt",
        ),
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
        ({"type": "chatml.argilla"}, PLAIN, DataError, "'instruction' for the prompt"),
        ({"type": "kto.trl"}, PLAIN, DataError, "'completion' for the completion.*field_completion"),
        (
            {"type": "kto.trl"},
            {"prompt": "a", "completion": "b"},
            DataError,
            "'label' or 'kto_tag' for the label.*field_label",
        ),
        (
            {"type": {"completion_format": " {completion}"}},
            {"prompt": "a", "completion": "b", "good": True},
            DataError,
            "for the label",
        ),
        (
            {"type": {"chosen_format": " {chosen}", "field_label": "good"}},
            {"prompt": "a", "completion": "b", "good": True},
            ConfigError,
            "chosen_format: has no effect on rows without chosen",
        ),
    ],
)
def test_mistakes_say_where_and_what(
    options: dict[str, Any], row: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        choose(options, row)


def test_nectar_is_not_upside_down() -> None:
    """axolotl compares the two worst answers and calls the worst one chosen."""
    row: Any = {"prompt": "?", "answers": [{"answer": f"rank {rank}", "rank": rank} for rank in (7, 1, 3, 2)]}
    config = DatasetConfig(path="p", type="zephyr.nectar")
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert format_.read(row, fields)[1] == ("rank 1", "rank 2")
    row["answers"][0]["rank"] = "best"
    with pytest.raises(OddRow) as odd:
        format_.read(row, fields)
    assert odd.value.reason is Reason.SCORE


def test_docs_list_every_format() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in page] == []


H, A = "\n\nHuman:", "\n\nAssistant:"


@pytest.mark.parametrize(
    ("name", "chosen", "rejected", "reason"),
    [
        ("hh", f"{H} Hi{A} a{H} b{A} c", f"{H} Hi{A} x{H} y{A} z", Reason.DIVERGED),
        ("hh", f"{H} Hi{A} a", f"{H} Hi{A} x{H} y{A} z", Reason.DIVERGED),
        ("hh", f"{H} Hi{A} a", f"{H} Ho{A} a", Reason.DIVERGED),
        ("hh", f"{H} Hi", f"{H} Hi{A} a", Reason.NO_ASSISTANT),
        ("trl.implicit", "same", "same", Reason.EQUAL),
        ("trl.implicit_chat", [USER, turn("a")], [USER, turn("a")], Reason.EQUAL),
        ("trl.implicit_chat", [USER, turn("a")], [USER], Reason.DIVERGED),
        ("chatml.argilla_chat", [USER, turn("a")], [turn("Ho", "user"), turn("a")], Reason.DIVERGED),
        ("chatml.argilla_chat", [USER, USER], [USER, turn("a")], Reason.NO_ASSISTANT),
        ("chatml.argilla_chat", [USER, turn(" ")], [USER, turn("a")], Reason.EMPTY_COMPLETION),
        ("trl.implicit_chat", "text", [USER], Reason.NOT_TEXT),
        ("trl.implicit_chat", [USER | {"role": ["user"]}], [USER], Reason.UNKNOWN_ROLE),
    ],
)
def test_rows_that_are_no_pair(name: str, chosen: object, rejected: object, reason: Reason) -> None:
    config, row = DatasetConfig(path="p", type=name), {"chosen": chosen, "rejected": rejected}
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    with pytest.raises(OddRow) as odd:
        format_.read(row, fields)
    assert odd.value.reason is reason


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("trl.implicit", {"chosen": "a b c", "rejected": "a bx"}, ("a", (" b c", " bx"))),
        ("trl.implicit", {"chosen": "a bx", "rejected": "a b c"}, ("a", (" bx", " b c"))),
        (
            "sharegpt",
            {
                "conversations": [turn("Own", "system"), USER],
                "system": "Another",
                "chosen": [USER, turn("yes")],
                "rejected": [USER, turn("no")],
            },
            ((turn("Own", "system"), USER), ((turn("yes"),), (turn("no"),))),
        ),
    ],
    ids=["a longer word in rejected", "a longer word in chosen", "its own system turn, answers that end"],
)
def test_what_is_prompt_and_what_is_answer(name: str, row: dict[str, Any], expected: Any) -> None:
    config = DatasetConfig(path="p", type=name)
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert format_.read(row, fields) == expected


def test_hh_prompt_is_the_shared_dialogue() -> None:
    """An answer may itself hold an assistant marker; it still answers the shared prompt."""
    row = {"chosen": f"{H} Hi{A} a{A} b", "rejected": f"{H} Hi{A} c"}
    config = DatasetConfig(path="p", type="hh")
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    assert format_.read(row, fields) == (f"{H} Hi{A}", (f" a{A} b", " c"))


def parts(*texts: str) -> list[dict[str, Any]]:
    """A message's content as OpenAI writes it."""
    return [{"type": "text", "text": text, "image_url": None} for text in texts]


@pytest.mark.parametrize("name", ["trl.implicit_chat", "llama3.argilla_chat"])
def test_parts_of_text_are_joined(
    name: str,
    byte_tokenizer: PreTrainedTokenizerFast,
    write: Callable[..., Path],
    run_config: Callable[..., Any],
) -> None:
    question = {"role": "user", "content": parts("H", "i")}
    row = {side: [question, {"role": "assistant", "content": parts(side, "!")}] for side in CHATS}
    joined = {side: [USER, turn(f"{side}!")] for side in CHATS}

    def ids(row: dict[str, Any]) -> list[Any]:
        groups = load_groups(run_config({"path": str(write([row])), "type": name}), byte_tokenizer).train
        return [ids.tolist() for ids in (groups[0].prompt, *groups[0].completions)]

    assert ids(row) == ids(joined)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        ([{"type": "image"}, *parts("Hi")], "content in chosen has a part of type 'image'"),
        (["Hi"], "content in chosen has a part of type 'str'"),
        ([{"type": "text", "text": None}], "text of a part of content in chosen"),
    ],
)
def test_parts_that_are_no_text_are_named(content: Any, detail: str) -> None:
    row = {"chosen": [{"role": "user", "content": content}, turn("a")], "rejected": [USER, turn("b")]}
    config = DatasetConfig(path="p", type="trl.implicit_chat")
    _, format_, fields = choose_format(config, look_at([row], list(row), config), where="datasets.0")
    with pytest.raises(OddRow) as odd:
        format_.read(row, fields)
    assert odd.value.detail == detail
