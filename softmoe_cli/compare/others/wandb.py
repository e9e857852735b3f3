"""W&B's files of a run (run-ID.wandb), offline and online ones.

Records in the framing of LevelDB's log (blocks of 32 KiB; checksum, length, kind, part) behind a head of seven bytes,
each a protobuf message whose definition the installed wandb has; it has no reader of its own since its version 0.24.
"""

import zlib
from pathlib import Path
from typing import Any

from softmoe_cli.compare.others.told import Cells, Damaged, Told, flat, last_values, others_bytes, parsed_json
from softmoe_cli.text import printable

LOG_BLOCK, RECORD_HEAD = 32768, 7
WHOLE_RECORD, FIRST_PART, MIDDLE_PART, LAST_PART = 1, 2, 3, 4
MAGIC = b":W&B\xe1\xbe"
WANDB_NAMES = {"device_s": "_runtime"}


def read_wandb(path: Path) -> Told:
    """The run of a file.

    Raises:
        Damaged: the file is cut short or damaged, or the run did not end well.
    """
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    records = _records(path)
    told = Told(path, "W&B", finished=path.stat().st_mtime, names=WANDB_NAMES)
    ended: int | None = None
    steps: list[Cells] = []
    for text in records:
        record = wandb_internal_pb2.Record()
        try:
            record.ParseFromString(text)
        except DecodeError as error:
            raise Damaged("holds a record that is none of W&B's") from error
        kind = record.WhichOneof("record_type")
        if kind == "run":
            _settings(told, record.run.config)
            for key in ("run_id", "display_name", "run_group", "project"):
                if getattr(record.run, key):
                    told.summary[key] = printable(getattr(record.run, key))
        elif kind == "config":
            _settings(told, record.config)
        elif kind == "history":
            steps.append(_items(record.history.item) | {"_step": record.history.step.num})
        elif kind == "summary":
            told.summary |= _items(record.summary.update)
        elif kind == "exit":
            ended = record.exit.exit_code
    told.history = [row for row in steps if len(row) > 1]
    told.summary = last_values(told.history) | told.summary
    if ended is None:
        raise Damaged("has no end: the run was killed, or goes on")
    if ended:
        raise Damaged(f"is of a run that failed (exit status {ended})")
    return told


def _settings(told: Told, config: Any) -> None:
    told.settings |= {key: value for key, value in _items(config.update).items() if not key.startswith("_wandb")}


def _items(items: Any) -> Cells:
    """Names, also nested ones, and the JSON that stands with them."""
    found: Cells = {}
    for item in items:
        name = ".".join(item.nested_key) or item.key
        found |= flat(parsed_json(item.value_json, f"'{printable(name)}'"), name)
    return found


def _records(path: Path) -> list[bytes]:
    data = others_bytes(path)
    if not data:
        raise Damaged("is empty")
    if data[:6] != MAGIC:
        raise Damaged("is no file of W&B's")
    at, parts, found = RECORD_HEAD, None, []
    while at < len(data):
        left = LOG_BLOCK - at % LOG_BLOCK
        if left < RECORD_HEAD:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6 : at + 7]
        body = data[at + RECORD_HEAD : at + RECORD_HEAD + size]
        if len(data) < at + RECORD_HEAD + size or not kind:
            raise Damaged(f"is cut short after {at:,} bytes")
        if size > left - RECORD_HEAD or zlib.crc32(kind + body) != int.from_bytes(data[at : at + 4], "little"):
            raise Damaged(f"is damaged at byte {at:,}: a checksum does not fit")
        if (kind[0] in (WHOLE_RECORD, FIRST_PART)) != (parts is None) or kind[0] not in (
            WHOLE_RECORD,
            FIRST_PART,
            MIDDLE_PART,
            LAST_PART,
        ):
            raise Damaged(f"is damaged at byte {at:,}: a record is not whole")
        parts = (parts or b"") + body
        if kind[0] in (WHOLE_RECORD, LAST_PART):
            found.append(parts)
            parts = None
        at += RECORD_HEAD + size
    if parts is not None:
        raise Damaged("is cut short within its last record")
    return found
