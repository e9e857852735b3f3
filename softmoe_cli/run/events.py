"""TensorBoard mirrors a run: its rows as an event file in RUN/tensorboard/, written without TensorBoard.

A file is records in TensorFlow's framing, each a protobuf message Event (tensorflow/core/util/event.proto); of Event,
Summary and SessionLog the few fields that scalars need are written here by their numbers. TensorBoard's own reader
takes them as its own.
"""

import os
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from softmoe_cli.errors import first_line
from softmoe_cli.run.rows import EVERY, named, number

FOLDER = "tensorboard"


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


CASTAGNOLI = _table()


def masked_crc(data: bytes) -> int:
    """CRC-32C as TensorFlow stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ CASTAGNOLI[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def framed(message: bytes) -> bytes:
    """A record: length, its checksum, the message, its checksum."""
    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", masked_crc(length)) + message + struct.pack("<I", masked_crc(message))


def event(step: int, values: Mapping[str, float], at: float) -> bytes:
    """An Event of scalars: wall_time (1), step (2), summary (5) of values (1) with tag (1) and simple_value (2)."""
    said = b"".join(
        _part(1, _part(1, tag.encode()) + b"\x15" + struct.pack("<f", value)) for tag, value in values.items()
    )
    return b"\x09" + struct.pack("<d", at) + b"\x10" + _varint(step) + _part(5, said)


def beginning(at: float) -> bytes:
    """The first records of a file: its version (3), and a session_log (7) with status (1) START (1) at step 0, upon
    which a TensorBoard that looks on forgets what an earlier file of the run had said."""
    clock = b"\x09" + struct.pack("<d", at)
    return framed(clock + _part(3, b"brain.Event:2")) + framed(clock + _part(7, b"\x08\x01"))


def _part(number_of_field: int, content: bytes) -> bytes:
    """A field of bytes, words or a message."""
    return _varint(number_of_field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _fits(value: Any) -> bool:
    """Whether a float32, which TensorBoard keeps, can hold it."""
    return number(value) and abs(value) < 3e38


class Events:
    """Writes rows as scalars, by step. A resumed run writes its file anew, from the rows on the disk, and removes the
    old one: no step is there twice.

    Args:
        folder: the run's.
        earlier: rows of an earlier part of this run.
        say: prints a sentence.
    """

    def __init__(self, folder: Path, earlier: Iterable[dict[str, Any]], say: Callable[[str], None]) -> None:
        self._say, self._step = say, -1
        self._file: BinaryIO | None = None
        try:
            place = folder / FOLDER
            place.mkdir(exist_ok=True)
            old = list(place.glob("events.out.tfevents.*"))
            latest = max((int(path.name.split(".")[3]) for path in old if path.name.split(".")[3].isdigit()), default=0)
            now = max(int(time.time()), latest + 1)  # files are read in the order of their names
            self._file = (place / f"events.out.tfevents.{now:010d}.{os.uname().nodename}.{os.getpid()}.0").open("xb")
            self._file.write(beginning(time.time()))
            for row in earlier:
                self._write(row)
            self._file.flush()
            for path in old:
                path.unlink()
        except OSError as error:
            self._stop(error)

    def row(self, row: dict[str, Any]) -> None:
        """Writes a row, and hands it to the system."""
        if self._file is None:
            return
        try:
            self._write(row)
            self._file.flush()
        except OSError as error:
            self._stop(error)

    def close(self, result: dict[str, Any] | None) -> None:
        """Writes the final row, if the run is done, and ends the file."""
        if self._file is None:
            return
        try:
            if result is not None:
                found = {f"result/{key}": float(value) for key, value in result.items() if _fits(value)}
                self._file.write(framed(event(max(0, self._step), found, time.time())))
            self._file.close()
        except OSError as error:
            self._stop(error)

    def _write(self, row: dict[str, Any]) -> None:
        """What every row has stands by its own name, once a step; all else behind its split, as on W&B."""
        assert self._file is not None
        new = row["step"] != self._step
        said = {
            key: float(value)
            for key, value in named(row).items()
            if _fits(value) and key != "step" and (new or key not in EVERY)
        }
        self._step = row["step"]
        self._file.write(framed(event(row["step"], said, time.time())))

    def _stop(self, error: OSError) -> None:
        self._file = None
        self._say(f"TensorBoard's file cannot be written ({first_line(error)}); the run goes on without it")
