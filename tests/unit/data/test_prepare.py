"""From YAML to token ids: counts, deduplication, holding out, the store, and the real data."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import RunConfig
from fiducial.data.dataset import TokenizedDataset
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.errors import CacheError, ConfigError, DataError

Load = Callable[..., PreparedData]


@pytest.fixture
def load(
    write: Callable[..., Path], run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> Load:
    def load_rows(
        rows: list[dict[str, Any]], tests: list[dict[str, Any]] | None = None, **options: Any
    ) -> PreparedData:
        test_files = [{"path": str(write(tests))}] if tests else []
        dataset = {"path": str(write(rows)), **options.pop("dataset", {})}
        return load_groups(run_config(dataset, tests=test_files, **options), byte_tokenizer)

    return load_rows


def pair(number: int, prompt: str | None = None) -> dict[str, Any]:
    return {
        "prompt": prompt or f"Question {number}?",
        "chosen": f" yes {number}",
        "rejected": f" no {number}",
    }


def keys(dataset: TokenizedDataset | None) -> list[tuple[str, ...]]:
    assert dataset is not None
    return [dataset[index].keys for index in range(len(dataset))]


USER = {"role": "user", "content": "Hi"}
ODD_CHATS: dict[str, dict[str, Any]] = {
    "unknown role": {"prompt": [{"role": "wizard", "content": "Hi"}], "chosen": "a", "rejected": "b"},
    "content is not text": {"prompt": [{"role": "user", "content": 3}], "chosen": "a", "rejected": "b"},
    "a field is missing": {"prompt": [USER], "chosen": None, "rejected": "b"},
    "empty prompt": {"prompt": [], "chosen": "a", "rejected": "b"},
    "empty completion": {"prompt": [USER], "chosen": "a", "rejected": " "},
    "chosen equals rejected": {"prompt": [USER], "chosen": "b", "rejected": "b"},
    "no assistant turn to compare": {"prompt": [USER], "chosen": [USER], "rejected": "b"},
    "prompt longer than sequence_len": {
        "prompt": [{"role": "user", "content": "x" * 200}],
        "chosen": "a",
        "rejected": "b",
    },
    "longer than sequence_len": {"prompt": [USER], "chosen": "a" * 200, "rejected": "b"},
    "chosen and rejected answer different prompts": {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "a"}, USER],
        "rejected": "b",
    },
}
GOOD_CHAT = {"prompt": [USER], "chosen": "a", "rejected": "b"}


def test_every_kind_of_odd_row_is_counted(load: Load) -> None:
    rows = [GOOD_CHAT]
    for row in ODD_CHATS.values():
        rows += [row, row, row, row]
    prepared = load(rows, dataset={"type": "passthrough"}, sequence_len=120)
    account = prepared.audit.datasets[0]
    assert (account.rows, account.kept) == (len(rows), 1)
    found = {reason: (dropped.count, dropped.rows) for reason, dropped in account.dropped.items()}
    assert found == {
        reason: (4, [1 + 4 * place, 2 + 4 * place, 3 + 4 * place]) for place, reason in enumerate(ODD_CHATS)
    }
    assert account.dropped["unknown role"].detail == "'wizard'"


def test_what_was_found_is_told_of_every_row_that_is_shown(load: Load) -> None:
    rows = [{**pair(n), piece: ""} for n, piece in enumerate(("chosen", "rejected", "chosen", "prompt"))]
    [account] = load([*rows, pair(9)]).audit.datasets
    assert account.reasons() == [
        "3 × empty completion (chosen; rejected): rows 0, 1, 2",
        "1 × empty prompt (prompt): rows 3",
    ]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_text_that_is_not_utf_8_is_named_by_its_line(
    load: Load, tmp_path: Path, num_proc: int | None
) -> None:
    path = tmp_path / "latin.jsonl"
    lines = [json.dumps(pair(n) | {"chosen": "é" * (n == 2) + "."}, ensure_ascii=False) for n in range(4)]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(DataError, match=r"datasets\.0\.path: .*line 3 of latin\.jsonl .*Save it as UTF-8"):
        load([pair(0)], dataset={"path": str(path)}, num_proc=num_proc)


def test_audit_prints_counts_reasons_and_unread_columns(load: Load) -> None:
    prepared = load([{**pair(0), "score": 1}, {**pair(1), "rejected": "", "score": 2}])
    console = Console(width=160, record=True, file=io.StringIO())
    prepared.audit.render(console)
    printed = console.export_text()
    assert "2 rows: 1 to train on, 0 to evaluate, 1 dropped" in printed
    assert "1 × empty completion (rejected): rows 1" in printed
    assert "columns not read: score" in printed
    assert prepared.audit.as_dict()["datasets"][0]["lengths"]["prompt"] == {"median": 11, "max": 11}


def test_template_without_generation_prompt_is_noted(load: Load) -> None:
    chat = load([GOOD_CHAT], tokenizer={"chat_template": "mistral"})
    assert chat.audit.datasets[0].notes == [
        "the chat template has no generation prompt: what it puts before an answer is scored"
    ]
    plain = load([pair(0)], dataset={"type": "trl.explicit"}, tokenizer={"chat_template": "mistral"})
    assert plain.audit.datasets[0].notes == []
    assert load([GOOD_CHAT]).audit.datasets[0].notes == []


@pytest.mark.parametrize(
    ("row", "chat"),
    [
        (pair(0), "trl.explicit_chat"),
        ({"prompt": "2+2?", "completion": "4", "label": True}, "kto.trl_chat"),
        (
            {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
            "hh.chat",
        ),
    ],
)
def test_a_template_that_plain_text_passes_over_is_noted(
    load: Load, byte_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], chat: str
) -> None:
    """LLaMA-Factory writes such rows with its template; the type that is named does so here."""
    assert load([row]).audit.datasets[0].notes == [
        f"read as plain text, without the chat template; type: {chat} writes the same rows with it"
    ]
    written = load([row], dataset={"type": chat})
    assert written.audit.datasets[0].notes == []
    assert byte_tokenizer.decode(written.train[0].prompt).startswith("<|im_start|>user\n")
    byte_tokenizer.chat_template = None
    assert load([row]).audit.datasets[0].notes == []


def test_text_that_is_already_marked_is_no_conversation_to_be_written(load: Load) -> None:
    marked = {**pair(0), "prompt": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"}
    assert load([marked]).audit.datasets[0].notes == []


def test_pictures_beside_the_text_are_missed(load: Load) -> None:
    """As LLaMA-Factory and TRL hold them: the text may not speak of them."""
    seen = GOOD_CHAT | {"images": ["a.png"]}
    [note] = load([GOOD_CHAT | {"images": []}, seen]).audit.datasets[0].notes
    assert note == "answers about what is in 'images' are learnt without it: text alone is read"
    assert load([GOOD_CHAT | {"images": []}]).audit.datasets[0].notes == []


def test_marks_that_are_no_tokens_are_noted(load: Load) -> None:
    notes = load([GOOD_CHAT], tokenizer={"chat_template": "gemma"}).audit.datasets[0].notes
    assert notes == [
        "<end_of_turn> is no token of the tokenizer: it is read piece by piece; "
        "tokens: ['<end_of_turn>'] adds it"
    ]
    spoken_of = GOOD_CHAT | {"chosen": "It is <|end|>, or </s>."}
    assert load([spoken_of], tokenizer={"chat_template": "chatml"}).audit.datasets[0].notes == []
    asked = {"question": "2+2?", "chosen": "4", "rejected": "5"}
    [note] = load([asked], dataset={"type": "llama3.intel"}).audit.datasets[0].notes
    assert note.startswith("<|eot_id|> is no token")
    assert load([asked], dataset={"type": "chatml.intel"}).audit.datasets[0].notes == []


def test_no_row_left_is_an_error(load: Load) -> None:
    with pytest.raises(DataError, match=r"datasets\.0 .*none of the 2 rows read.*2 × empty completion"):
        load([{**pair(0), "chosen": ""}, {**pair(1), "chosen": ""}])
    with pytest.raises(DataError, match=r"longer than sequence_len: rows 0\. Raise sequence_len, or write"):
        load([pair(0)], sequence_len=9)


def test_truncated_rows_are_counted(load: Load) -> None:
    long = {"prompt": "x" * 50, "chosen": " a", "rejected": " b"}
    account = load([pair(0), long], sequence_len=30, excess_length="truncate").audit.datasets[0]
    assert (account.kept, account.truncated) == (2, 1)


def test_a_long_row_is_named_by_its_place_in_the_dataset(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fiducial.data.rows.BATCH", 2)
    rows = [*map(pair, range(5)), {"prompt": "x" * 50, "chosen": " a", "rejected": " b"}]
    with pytest.raises(DataError, match=r"row 5: 53 tokens"):
        load(rows, sequence_len=30, excess_length="raise")


def test_merging_deduplication_and_shuffle(load: Load) -> None:
    rows = [pair(number) for number in range(20)]
    plain = load(rows)
    assert keys(load([*rows, *rows[:5]], exact_deduplication=True).train) == keys(plain.train)
    assert len(load([*rows, *rows[:5]]).train) == 25
    shuffled = keys(load(rows, shuffle=True).train)
    assert shuffled != keys(plain.train)
    assert sorted(shuffled) == sorted(keys(plain.train))
    assert shuffled == keys(load(rows, shuffle=True).train)
    assert shuffled != keys(load(rows, shuffle=True, seed=1).train)


@pytest.mark.parametrize("size", [0.25, 10])
def test_holding_out_is_deterministic_and_does_not_leak(load: Load, size: float) -> None:
    rows = [pair(number, prompt=f"Question {number % 13}?") for number in range(40)]
    first, again, other = (load(rows, val_set_size=size, seed=seed) for seed in (1, 1, 2))
    assert keys(first.evaluation) == keys(again.evaluation)
    assert keys(first.evaluation) != keys(other.evaluation)
    assert 7 <= len(keys(first.evaluation)) <= 10
    assert sorted([*keys(first.train), *keys(first.evaluation)]) == sorted(keys(load(rows).train))
    prompts = [
        {group.prompt.tobytes() for group in map(part.__getitem__, range(len(part)))}
        for part in (first.train, first.evaluation)
        if part is not None
    ]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(("size", "held_out"), [(4, 4), (0.17, 2), (0.1, 1)])
def test_as_many_are_held_out_as_asked_for_where_no_prompt_comes_twice(
    load: Load, size: float, held_out: int
) -> None:
    prepared = load([pair(number) for number in range(10)], val_set_size=size)
    assert (prepared.audit.train, prepared.audit.evaluation) == (10 - held_out, held_out)


@pytest.mark.parametrize("size", [0.001, 3, 7])
def test_impossible_holding_out(load: Load, size: float) -> None:
    with pytest.raises(DataError, match="val_set_size"):
        load([pair(number) for number in range(3)], val_set_size=size)


def test_one_prompt_cannot_be_split(load: Load) -> None:
    with pytest.raises(DataError, match="prompt on both sides"):
        load([pair(number, prompt="Same?") for number in range(6)], val_set_size=2)


def test_test_datasets_and_their_overlap(load: Load) -> None:
    long = pair(2, prompt="A longer question?")
    prepared = load([pair(0), pair(1), pair(9, prompt=pair(1)["prompt"])], [pair(1), long])
    assert (prepared.audit.train, prepared.audit.evaluation) == (3, 2)
    assert prepared.longest == prepared.evaluation.longest > prepared.train.longest
    assert prepared.audit.notes == ["1 evaluation rows have a prompt that is also trained on"]
    assert [each.role for each in prepared.audit.datasets] == ["train", "evaluation"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"streaming": True}, "streaming: .* Set max_steps"),
        ({"streaming": True, "max_steps": 1, "val_set_size": 0.5}, "val_set_size: .* number of rows"),
        ({"streaming": True, "max_steps": 1, "exact_deduplication": True}, "dataset_exact_deduplication"),
        ({"sequence_len": 1}, "at least 2 tokens"),
        ({"val_set_size": 1, "tests": [pair(3)]}, "test_datasets already"),
    ],
)
def test_settings_that_cannot_work(load: Load, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load([pair(0), pair(1)], **options)


@pytest.mark.slow
def test_processes_give_the_same_groups(load: Load) -> None:
    rows = [pair(number) for number in range(1500)] + [{**pair(0), "chosen": ""}]
    alone, shared = load(rows), load(rows, num_proc=2)
    assert keys(alone.train) == keys(shared.train)
    assert alone.audit.datasets[0].dropped == shared.audit.datasets[0].dropped
    assert shared.audit.datasets[0].dropped["empty completion"].rows == [1500]


def test_flat_arrays(load: Load) -> None:
    dataset = load([pair(number) for number in range(12)]).train.select([3, 0, 11])
    assert dataset.lengths.tolist() == [group.num_tokens for group in map(dataset.__getitem__, range(3))]
    assert dataset.longest == max(group.longest for group in map(dataset.__getitem__, range(3)))
    assert dataset.select([1]).longest == dataset[1].longest
    assert dataset.piece_lengths(1).tolist() == [len(dataset[index].completions[0]) for index in range(3)]
    assert keys(pickle.loads(pickle.dumps(dataset))) == keys(dataset)
    assert dataset.tokens.dtype == np.int32
    with pytest.raises(IndexError):
        dataset[3]


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npz"))


def test_store_is_used_and_never_stale(
    tmp_path: Path,
    write: Callable[..., Path],
    run_config: Callable[..., RunConfig],
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, path = tmp_path / "prepared", write([pair(0), {**pair(1), "chosen": ""}])

    def load(dataset: dict[str, Any] | None = None, **options: Any) -> PreparedData:
        config = run_config({"path": str(path)} | (dataset or {}), prepared_path=str(folder), **options)
        return load_groups(config, byte_tokenizer)

    first = load()
    assert len(stored(folder)) == 1
    with monkeypatch.context() as patched:
        patched.setattr("fiducial.data.prepare.tokenize_rows", None)  # nothing may be tokenized again
        again = load()
    assert keys(again.train) == keys(first.train)
    assert again.audit == first.audit
    for number, change in enumerate(
        (
            lambda: load(sequence_len=99),
            lambda: load(excess_length="truncate"),
            lambda: load(tokenizer={"chat_template": "gemma"}),
            lambda: load(tokenizer={"chat_template": "gemma", "chat_template_kwargs": {"a": 1}}),
            lambda: load({"type": "trl.explicit"}),
            lambda: path.write_text(path.read_text().replace("yes 0", "yes!0")) and load(),
            lambda: byte_tokenizer.add_tokens(["Question"]) and load(),
            lambda: setattr(byte_tokenizer, "eos_token", "<|im_end|>") or load(),
        )
    ):
        change()
        assert len(stored(folder)) == 2 + number
    assert byte_tokenizer.decode(load().train[0].completions[0]) == " yes!0<|im_end|>"
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("left", [-40, 0])
def test_damaged_store(load: Load, tmp_path: Path, left: int) -> None:
    folder = tmp_path / "prepared"
    load([pair(0)], prepared_path=str(folder))
    [path] = stored(folder)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CacheError, match="is damaged"):
        load([pair(0)], prepared_path=str(folder), dataset={"path": str(tmp_path / "rows0.jsonl")})
    with pytest.raises(CacheError, match=r"dataset_prepared_path: .* cannot be written"):
        load([pair(0)], prepared_path=str(path))  # a file


@pytest.mark.slow
def test_real_pairs(
    shared_data: Path, run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    for file, format_, rows, kept in (
        ("dpo_en_demo.json", "sharegpt", 300, 300),
        ("hh_harmless_test.jsonl.gz", "hh", 2312, 2308),
    ):
        config = run_config({"path": str(shared_data / file)}, sequence_len=50_000)
        prepared = load_groups(config, byte_tokenizer)
        [account] = prepared.audit.datasets
        assert (account.format, account.rows, account.kept) == (format_, rows, kept)
        assert account.kept >= 0.99 * account.rows
        for index in range(0, len(prepared.train), 50):
            group = prepared.train[index]
            for completion in group.completions:
                assert completion[-1] in (257, 260)
                assert not set(completion[:-1].tolist()) & {257, 260}
