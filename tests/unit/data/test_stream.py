"""Streamed groups: those of stored data, each once a pass, read no further ahead than needed."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from fiducial.config.schema import RunConfig
from fiducial.data.audit import DatasetAudit
from fiducial.data.prepare import PreparedData, load_groups
from fiducial.data.reading import choose_reading
from fiducial.data.row_stream import BLOCK, RowStream
from fiducial.data.running_audit import RunningAudit
from fiducial.data.stream import SAMPLE, GroupStream, Shuffling, StreamedDataset, in_turn
from fiducial.data.templates import choose_template
from fiducial.data.tokenize import GroupTokenizer, Tokenized, TokenizedGroup
from fiducial.errors import DataError
from fiducial.training.dataloader import Process, step_dataloader

Keys = list[tuple[str, ...]]


def pair(number: int, prompt: str | None = None) -> dict[str, Any]:
    return {"prompt": prompt or f"Question {number}?", "chosen": f" yes {number}", "rejected": f" no{number}"}


def keys(groups: Any) -> Keys:
    return [group.keys for group in groups]


@pytest.fixture
def load(
    write: Callable[..., Path], run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., PreparedData]:
    """Streamed, each list of rows from a file of its own; with `max_steps: None`, stored."""

    def load_files(*files: list[dict[str, Any]], **options: Any) -> PreparedData:
        tests = [{"path": str(write(options.pop("tests")))}] if "tests" in options else []
        options = {"max_steps": sum(map(len, files)), **options}
        cfg = run_config(
            *({"path": str(write(rows))} for rows in files),
            tests=tests,
            streaming=options["max_steps"] is not None,
            **options,
        )
        return load_groups(cfg, byte_tokenizer)

    return load_files


def stored(load: Callable[..., PreparedData], *files: list[dict[str, Any]], **options: Any) -> Keys:
    train = load(*files, max_steps=None, **options).train
    return keys(train[index] for index in range(len(train)))


def test_unshuffled_rows_come_as_stored_pass_after_pass(load: Callable[..., PreparedData]) -> None:
    rows = [pair(number) for number in range(2 * BLOCK + 7)]
    rows[BLOCK]["chosen"] = ""
    whole = stored(load, rows)
    prepared = load(rows, max_steps=3 * len(whole) - 5)
    assert len(prepared.train) == 3 * len(whole) - 5
    assert keys(prepared.train) == (3 * whole)[:-5]


def test_datasets_give_one_row_each_in_turn(load: Callable[..., PreparedData]) -> None:
    first, second = [pair(number) for number in range(5)], [pair(number) for number in range(10, 12)]
    merged = [first[0], second[0], first[1], second[1], *first[2:]]
    assert keys(load(first, second).train) == stored(load, merged)
    assert list(in_turn([iter("ab"), iter(""), iter("c")])) == [(0, "a"), (2, "c"), (0, "b")]


def test_every_place_of_the_buffer_is_drawn_from() -> None:
    drawn = list(Shuffling(0, 4).shuffle(range(400), number=0))
    assert {0, 1, 2, 3} <= set(drawn[:100])


def test_a_long_row_is_named_by_its_place_in_the_stream(load: Callable[..., PreparedData]) -> None:
    rows = [pair(number) for number in range(BLOCK + 4)]
    rows[BLOCK + 2]["chosen"] = " yes" * 40
    with pytest.raises(DataError, match=rf"row {BLOCK + 2}: .* sequence_len is 100"):
        load(rows, sequence_len=100, excess_length="raise")


@pytest.mark.parametrize("lengths", [[5], [1, 4], [1, 2, 9], [3, 3, 8, 9], [2, 2, 2, 7], [1, 6, 6, 6]])
def test_lengths_counted_one_by_one_have_their_median(lengths: list[int]) -> None:
    running = RunningAudit(DatasetAudit("rows", "trl.explicit"))
    for length in reversed(lengths):
        piece = np.arange(length, dtype=np.int32)
        running.count(Tokenized(TokenizedGroup(piece, (piece, piece))))
    expected = {"median": int(np.median(lengths)), "max": max(lengths)}
    assert running.so_far().lengths == {"prompt": expected, "chosen": expected, "rejected": expected}


@pytest.mark.parametrize("buffer", [1, 2, 7, 40, 100])
def test_every_pass_is_shuffled_by_its_own_seed(load: Callable[..., PreparedData], buffer: int) -> None:
    rows = [pair(number) for number in range(40)]
    options = {"shuffle": True, "shuffle_buffer": buffer, "max_steps": 80}
    whole, drawn = stored(load, rows), keys(load(rows, **options).train)
    assert sorted(drawn[:40]) == sorted(drawn[40:]) == sorted(whole)
    assert drawn == keys(load(rows, **options).train)
    if buffer > 1:
        assert drawn[:40] != whole != drawn[40:] != drawn[:40]
        assert drawn != keys(load(rows, **options, seed=7).train)
    else:
        assert drawn == 2 * whole
    places = [whole.index(key) for key in drawn[:40]]
    assert all(place < drawn_at + buffer for drawn_at, place in enumerate(places))


def test_it_begins_anew_each_time(load: Callable[..., PreparedData]) -> None:
    train = load([pair(number) for number in range(20)], shuffle=True, max_steps=30).train
    begun = iter(train)
    next(begun)
    assert keys(train) == keys(train)


class Counted:
    """Endless rows that count how many were read, and how many times they were begun."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.read = 0
        for number in count():
            self.read += 1
            yield pair(number)


def test_what_is_read_ahead_is_bounded(
    run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = run_config({"path": "endless"})
    tokenize = GroupTokenizer(byte_tokenizer, choose_template(cfg.tokenizer, byte_tokenizer), 100)
    source = Counted()
    assert cfg.data is not None
    work, blank = choose_reading(cfg.data.datasets[0], [pair(0)], list(pair(0)), tokenize, where="datasets.0")
    dataset = StreamedDataset("datasets.0", RowStream(source, "endless"), work, blank)
    stream = GroupStream([dataset], Shuffling(0, 50), length=1000)
    assert source.read == SAMPLE
    assert len(stream.sample) == SAMPLE
    for taken, _ in enumerate(stream, start=1):
        assert taken < source.read <= taken + 50 + BLOCK
    assert taken == 1000
    assert stream.audit().datasets[0].rows <= 1000 + 50 + 1


ODD = [
    {"prompt": "x" * 200, "chosen": "a", "rejected": "b"},
    {"prompt": "Q?", "chosen": "a" * 200, "rejected": "b"},
    {"prompt": "Q?", "chosen": "a", "rejected": "a"},
    {"prompt": "Q?", "chosen": None, "rejected": "a"},
]


@pytest.mark.parametrize("excess", ["drop", "truncate"])
def test_the_account_is_that_of_stored_rows(load: Callable[..., PreparedData], excess: str) -> None:
    rows = [pair(number**3) for number in range(BLOCK)] + ODD + [pair(7, "Q" * 9)] + ODD[::-1]
    options = {"excess_length": excess, "sequence_len": 120}
    prepared = load(rows, max_steps=3 * len(rows), **options)
    list(prepared.train)
    expected = load(rows, max_steps=None, **options).account()
    account = prepared.account()
    assert _counts(account.datasets[0]) == _counts(expected.datasets[0])
    assert (account.train, account.evaluation) == (expected.train, 0)
    assert account.notes == ["streamed: read 4 times, the last time perhaps in part; rows are counted once"]


def _counts(account: DatasetAudit) -> dict[str, Any]:
    return {key: value for key, value in asdict(account).items() if key != "name"}


def test_the_account_goes_on_while_rows_are_read(load: Callable[..., PreparedData]) -> None:
    rows = [pair(number) for number in range(3 * SAMPLE)]
    prepared = load(rows, max_steps=2 * SAMPLE)
    assert prepared.audit.notes == [f"streamed: this is the account of the {SAMPLE} rows read so far"]
    assert prepared.audit.train == SAMPLE
    drawn = iter(prepared.train)
    list(islice(drawn, SAMPLE + 1))
    assert prepared.account().datasets[0].rows == SAMPLE + 2
    assert prepared.audit.train == SAMPLE
    assert prepared.account().datasets[0].lengths["prompt"] == {"median": 13, "max": 13}


def test_held_out_prompts_are_never_trained_on(load: Callable[..., PreparedData]) -> None:
    rows = [pair(number, prompt=f"Question {number % 7}?") for number in range(28)]
    prepared = load(rows, val_set_size=3, max_steps=100, shuffle=True)
    whole = stored(load, rows)
    assert prepared.evaluation is not None
    assert keys(map(prepared.evaluation.__getitem__, range(3))) == whole[:3]
    assert set(keys(prepared.train)) == {key for row, key in enumerate(whole) if row % 7 > 2}
    account = prepared.account()
    assert (account.train, account.evaluation) == (16, 3)
    assert "12 rows have a held-out prompt and are not trained on" in account.notes


def test_evaluated_prompts_that_are_trained_on_are_counted(load: Callable[..., PreparedData]) -> None:
    prepared = load([pair(0), pair(1), pair(2)], tests=[pair(1), pair(5)], max_steps=5)
    assert len(set(keys(prepared.train))) == 3
    account = prepared.account()
    assert "1 training rows have a prompt that is also evaluated" in account.notes
    assert [each.role for each in account.datasets] == ["train", "evaluation"]
    assert (account.train, account.evaluation) == (3, 2)


def test_processes_read_the_stream_and_share_each_step(load: Callable[..., PreparedData]) -> None:
    rows = [pair(number) for number in range(13)]
    stream = load(rows, shuffle=True, shuffle_buffer=4, max_steps=20).train
    alone = list(step_dataloader(stream, 4, Process(), shuffle_seed=None))
    shares = [
        list(step_dataloader(stream, 2, Process(rank, 2), shuffle_seed=None, num_workers=3))
        for rank in range(2)
    ]
    assert len(alone) == 5
    for step, groups in enumerate(alone):
        first, second = keys(shares[0][step]), keys(shares[1][step])
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(keys(groups))


def test_length_is_that_of_all_processes(
    write: Callable[..., Path], run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    cfg = run_config({"path": str(write([pair(0)]))}, streaming=True, max_steps=7)
    assert len(load_groups(cfg, byte_tokenizer, num_processes=3).train) == 21


def test_groups_longer_than_the_sample_are_bounded(load: Callable[..., PreparedData]) -> None:
    prepared = load([pair(0)], sequence_len=77, max_steps=2)
    assert (prepared.longest, prepared.train.longest) == (77, 77)
    assert isinstance(prepared.train, GroupStream)
    assert prepared.sample.longest < 77


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([{**pair(0), "chosen": ""}] * 3, {}, r"datasets\.0 .*none of the 3 rows read.*empty completion"),
        ([pair(0), pair(1)], {"val_set_size": 2}, "val_set_size: holding out 2 rows.*leaves none"),
        ([pair(0, "Q?")] * 9, {"val_set_size": 2}, "val_set_size: holding out 2 rows.*leaves none"),
        ([{"text": "a"}], {}, "Its columns are: text"),
    ],
)
def test_data_that_gives_nothing_to_train_on(
    load: Callable[..., PreparedData], rows: list[dict[str, Any]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        load(rows, max_steps=5, **options)


def test_a_dataset_that_gives_nothing_among_others_is_named(load: Callable[..., PreparedData]) -> None:
    with pytest.raises(DataError, match=r"datasets\.1 "):
        load([pair(number) for number in range(20)], [{**pair(0), "chosen": ""}] * 3)


def test_a_file_emptied_while_it_is_read_ends_the_run(load: Callable[..., PreparedData]) -> None:
    prepared = load([pair(0)], max_steps=3)
    assert isinstance(prepared.train, GroupStream)
    object.__setattr__(prepared.train._datasets[0].rows, "rows", [{**pair(0), "chosen": ""}])
    with pytest.raises(DataError, match=r"datasets\.0: a whole pass over the data gave nothing"):
        list(prepared.train)


def test_a_row_without_a_column_is_odd(load: Callable[..., PreparedData]) -> None:
    rows = [pair(0), {"prompt": "Q?", "chosen": "a"}, pair(1)]
    prepared = load(rows, max_steps=2)
    assert prepared.account().datasets[0].dropped["a field is missing"].rows == [1]


@pytest.mark.slow
def test_real_pairs(
    shared_data: Path, run_config: Callable[..., RunConfig], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    dataset = {"path": str(shared_data / "hh_harmless_test.jsonl.gz")}
    options = {"sequence_len": 50_000}
    plain = load_groups(run_config(dataset, **options), byte_tokenizer)
    streamed = load_groups(
        run_config(dataset, **options, streaming=True, max_steps=len(plain.train)), byte_tokenizer
    )
    assert keys(streamed.train) == keys(plain.train[index] for index in range(len(plain.train)))
    assert streamed.account().datasets[0].kept == 2308
