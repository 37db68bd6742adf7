"""One file of records: what it gives back, and that no damage to it ever becomes a number."""

from pathlib import Path

import numpy as np
import pytest

from fiducial.data.tokenize import TokenizedGroup
from fiducial.reference.cache.index import KeyIndex
from fiducial.reference.cache.names import ShardName
from fiducial.reference.cache.shards import (
    DamagedShardError,
    Record,
    Shard,
    content_key,
    encode_shard,
    prompt_digest,
)
from tiny import random_groups

GROUPS = random_groups(5)


def records_of(groups: list[TokenizedGroup]) -> list[Record]:
    rng = np.random.default_rng(0)
    return [
        Record(
            bytes.fromhex(key),
            -rng.random(len(completion), dtype=np.float32),
            prompt_digest(group.prompt),
            completion,
        )
        for group in groups
        for key, completion in zip(group.keys, group.completions, strict=True)
    ]


RECORDS = records_of(GROUPS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.arrow"
    path.write_bytes(encode_shard(RECORDS, "a reference"))
    return path


def test_records_come_back_to_the_bit(file: Path) -> None:
    shard = Shard.open(file, "a reference")
    file.unlink()  # what is open stays readable
    assert len(shard) == len(RECORDS)
    for row, record in enumerate(RECORDS):
        assert shard.keys[row].tobytes() == record.key
        assert shard.values(row).tobytes() == record.values.tobytes()
        assert shard.tokens(row).tobytes() == record.tokens.tobytes()


def test_a_completion_s_key_is_made_of_its_prompt_s_digest() -> None:
    for group in GROUPS:
        keys = [
            content_key(prompt_digest(group.prompt), completion).hex() for completion in group.completions
        ]
        assert tuple(keys) == group.keys


def test_another_reference_s_file_is_refused(file: Path) -> None:
    with pytest.raises(DamagedShardError, match="of another reference, a reference"):
        Shard.open(file, "another")


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(DamagedShardError):
        Shard.open(file, "a reference")


def test_no_flipped_bit_is_ever_read_as_a_log_prob(file: Path) -> None:
    content = file.read_bytes()
    written = {record.key: record.values.tobytes() for record in RECORDS}
    completions = {record.key: record.tokens.tobytes() for record in RECORDS}
    rng = np.random.default_rng(1)
    refused = changed = 0
    for position in rng.integers(0, len(content), 600):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            shard = Shard.open(file, "a reference")
        except DamagedShardError:
            refused += 1
            continue
        for row in range(len(shard)):
            values = shard.values(row)
            changed += values is None
            key, tokens = shard.keys[row].tobytes(), shard.tokens(row)
            assert values is None or written[key] == values.tobytes()
            assert tokens is None or completions[key] == tokens.tobytes(), "others would be found in it"
    assert refused > 10
    assert changed > 50


def test_a_file_s_name_is_its_manifest() -> None:
    content = memoryview(encode_shard(RECORDS, "a reference"))
    name = ShardName.of(content, len(RECORDS))
    assert ShardName.parse(str(name)) == name
    assert name.records == len(RECORDS)
    assert ShardName.of(content, 1).unique != name.unique
    assert name < ShardName.of(content, len(RECORDS)), "names sort by time"
    for other in ("identity.json", f".{name}.part", f"{name}.damaged", f"x{name}"):
        assert ShardName.parse(other) is None


@pytest.mark.parametrize("asked_on_the_way", [False, True])
def test_the_index_finds_what_a_dictionary_finds(asked_on_the_way: bool) -> None:
    rng = np.random.default_rng(0)
    index, naive = KeyIndex(), {}
    assert list(index.find(bytes(16))) == []
    assert len(index) == 0
    for shard, size in enumerate((200, 90, 30, 200)):
        keys = rng.integers(0, 3, (size, 16), dtype=np.uint8)
        keys[:, 2:14] = 255  # halves beyond what a signed word holds, and many equal ones
        index.add(keys, shard)
        for row, key in enumerate(keys):
            naive.setdefault(key.tobytes(), []).append((shard, row))
        if asked_on_the_way:
            assert all(list(index.find(key)) == where for key, where in naive.items())
    assert len(index) == len(naive) == 81
    assert all(list(index.find(key)) == where for key, where in naive.items())
    index.remove(2)
    left = {key: [at for at in where if at[0] != 2] for key, where in naive.items()}
    assert all(list(index.find(key)) == where for key, where in left.items())
    assert list(index.find(bytes(16))) == []
