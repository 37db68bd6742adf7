"""What an offline W&B run wrote: a log of protobuf records in LevelDB's format, cut into blocks of 32 KiB."""

import json
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def history(path: Path) -> list[dict[str, object]]:
    """Every logged step, as name to value."""
    from wandb.proto.wandb_internal_pb2 import Record

    steps = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            steps.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
    return steps


def _records(content: bytes) -> Iterator[bytes]:
    position, parts = FILE_HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        size = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        position += HEADER
        parts += content[position : position + size]
        position += size
        if kind in (FULL, LAST):
            yield parts
            parts = b""
