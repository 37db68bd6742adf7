"""What an assistant could call: from a column of the rows into the prompt, by the chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import RunConfig
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.data.templates import ChatTemplate
from fiducial.errors import ConfigError, DataError

TEMPLATE = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call | tojson }}>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASKED = {"role": "user", "content": "Rain?"}
Load = Callable[..., PreparedData]


def function(name: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


WEATHER, CLOCK = function("weather", city={"type": "string"}), function("clock", zone={"type": "integer"})


def row(**others: Any) -> dict[str, Any]:
    answers = {key: [{"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    return {"prompt": [ASKED], **answers, **others}


@pytest.fixture
def load(
    write: Callable[..., Path], run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> Load:
    def load_rows(rows: list[dict[str, Any]], template: str = TEMPLATE, **options: Any) -> PreparedData:
        dataset = {"path": str(write(rows)), **options}
        tokenizer = {"chat_template_jinja": template}
        return load_groups(run_config(dataset, tokenizer=tokenizer), byte_tokenizer)

    return load_rows


def prompts(prepared: PreparedData, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    found = (tokenizer.decode(prepared.train[index].prompt) for index in range(len(prepared.train)))
    return sorted(found)


@pytest.mark.parametrize(
    "column",
    [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]],
    ids=["objects", "one text", "a text each"],
)
def test_tools_reach_the_template(column: Any, load: Load, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = load([row(tools=column)])
    assert prompts(prepared, byte_tokenizer) == [f"[[{json.dumps(WEATHER)}]]user: Rain?</s>assistant: "]
    assert prepared.audit.datasets[0].unread_columns == []


def test_a_column_of_another_name(load: Load, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    prepared = load([row(functions=[CLOCK])], field_tools="functions")
    assert "clock" in prompts(prepared, byte_tokenizer)[0]
    assert "clock" not in prompts(load([row(functions=[CLOCK])]), byte_tokenizer)[0]


def test_rows_without_tools_stand_beside_rows_with(
    load: Load, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    prepared = load([row(tools=[WEATHER]), row(tools=None) | {"prompt": [{**ASKED, "content": "Hi"}]}])
    assert prompts(prepared, byte_tokenizer)[1] == "user: Hi</s>assistant: "


def test_tools_of_the_run_serve_rows_that_have_none(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(byte_tokenizer, TEMPLATE, {"tools": [WEATHER]})
    assert "weather" in template.render((ASKED,), add_generation_prompt=True)
    own = template.render((ASKED,), add_generation_prompt=True, tools=[CLOCK])
    assert "clock" in own
    assert "weather" not in own


def test_what_only_other_rows_have_is_not_rendered(
    run_config: Callable[..., RunConfig], tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Arrow gives every object of a column the keys of all."""

    def call(name: str, **arguments: Any) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    rows = [
        row(tools=[WEATHER]) | {"chosen": [call("weather", city="Oslo")]},
        row(tools=[CLOCK]) | {"chosen": [call("clock", zone=3)], "prompt": [{**ASKED, "content": "Late?"}]},
    ]
    stored = datasets.Dataset.from_list(rows)
    stored.to_parquet(tmp_path / "rows.parquet")
    assert stored[0]["tools"][0]["function"]["parameters"]["properties"]["zone"] is None, "it does fill up"
    config = run_config({"path": str(tmp_path / "rows.parquet")}, tokenizer={"chat_template_jinja": TEMPLATE})
    train = load_groups(config, byte_tokenizer).train
    texts = {
        byte_tokenizer.decode([*group.prompt, *group.completions[0]])
        for group in (train[index] for index in range(len(train)))
    }
    for tool, given in ((WEATHER, '{"city": "Oslo"}'), (CLOCK, '{"zone": 3}')):
        [text] = [text for text in texts if f"[[{json.dumps(tool)}]]" in text]
        assert f'"arguments": {given}' in text


@pytest.mark.parametrize("column", ["weather", json.dumps(WEATHER), ["weather"], [3], 3])
def test_a_column_that_holds_no_tools(column: Any, load: Load) -> None:
    with pytest.raises(DataError, match="tools are not a list of JSON schemas"):
        load([row(tools=column)])


def test_a_template_that_writes_none(load: Load) -> None:
    silent = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant: "
    account = load([row(tools=[WEATHER])], silent).audit.datasets[0]
    assert account.unread_columns == ["tools"]
    assert any("the chat template writes no tools" in note for note in account.notes)
    with pytest.raises(ConfigError, match=r"datasets\.0\.field_tools: .*writes no tools"):
        load([row(functions=[WEATHER])], silent, field_tools="functions")


def test_a_template_that_writes_no_calls(load: Load) -> None:
    calls = [{"function": {"name": "weather", "arguments": {}}}]
    calling = row(chosen=[{"role": "assistant", "content": "Let me see", "tool_calls": calls}])
    silent = TEMPLATE.replace("m.tool_calls or []", "[]")
    rows = [row(), calling | {"prompt": [{**ASKED, "content": "Snow?"}]}]
    assert "the chat template writes no tool calls: they are left out of rows that have them" in (
        load(rows, silent).audit.datasets[0].notes
    )
    assert load(rows).audit.datasets[0].notes == load([row()], silent).audit.datasets[0].notes == []


def test_plain_text_reads_none(load: Load) -> None:
    plain = {"prompt": "2+2=", "chosen": "4", "rejected": "5", "functions": [WEATHER]}
    with pytest.raises(ConfigError, match=r"field_tools: has no effect on type 'trl\.explicit'"):
        load([plain], field_tools="functions")
