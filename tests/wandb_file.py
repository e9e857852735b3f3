"""Reads a W&B offline file, for which W&B has no public reader: records in the framing of LevelDB's log, each a
protobuf message whose definition W&B does not publish. A test can see with it what was recorded."""

import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def recorded(folder: Path, wait_s: float = 300) -> tuple[Path, list[Any]]:
    """The one .wandb file below `folder` and its records. W&B writes it in a process of its own, which may take longer
    than the run's."""
    until = time.monotonic() + wait_s
    while True:
        files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        found = records(files[0]) if files else []
        if any(each.WhichOneof("record_type") == "exit" for each in found) or time.monotonic() > until:
            assert len(files) == 1, f"{len(files)} W&B files in {folder}"
            return files[0], found
        time.sleep(0.1)


def records(path: Path) -> list[Any]:
    """Every record of a .wandb file, in order."""
    data, position, part, found = path.read_bytes(), HEAD, b"", []  # the file begins with a head of the same size
    while position + HEAD <= len(data):
        if BLOCK - position % BLOCK < HEAD:
            position += BLOCK - position % BLOCK
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + HEAD + size > len(data):
            break  # the record is still being written
        part = (b"" if kind in (FULL, FIRST) else part) + data[position + HEAD : position + HEAD + size]
        position += HEAD + size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
    return found
