"""TensorBoard's event files: scalars, and the hyperparameters that its `add_hparams` writes.

A file is records in TensorFlow's framing: length (8 bytes), its checksum (4), the record, its checksum (4), little
endian; a checksum is CRC-32C, rotated and shifted (tensorflow/core/lib/io/record_writer.h). A record is a protobuf
message Event; of its fields, and of those of Summary, Value, TensorProto and HParamsPluginData, the few with scalars
are read here by their numbers (tensorflow/core/util/event.proto, framework/summary.proto, framework/tensor.proto,
tensorboard/plugins/hparams/plugin_data.proto), so that no further library is needed.
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.others.told import Cells, Damaged, Told, last_values, others_bytes
from softmoe_cli.run.events import masked_crc
from softmoe_cli.text import printable, shortened

LARGEST_RECORD = 2**16
"""Records of more bytes hold images, histograms or graphs, and are passed over."""
WALL = "wall_s"
"""Seconds from the first event of a run to a row, as its history calls them."""
EVENT_NAMES = {"device_s": WALL}


def event_records(path: Path) -> Iterator[bytes]:
    """Every record of up to LARGEST_RECORD bytes.

    Raises:
        Damaged: a file that is cut short, or whose checksums do not fit.
    """
    data = others_bytes(path, f"{path.name} ")
    if not data:
        raise Damaged(f"{path.name} is empty")
    at = 0
    while at < len(data):
        head = data[at : at + 12]
        if len(head) < 12:
            raise Damaged(f"{path.name} is cut short after {at:,} bytes")
        if struct.unpack("<I", head[8:])[0] != masked_crc(head[:8]):
            raise Damaged(f"{path.name} is damaged at byte {at:,}: the checksum of a length does not fit")
        (size,) = struct.unpack("<Q", head[:8])
        body, check = data[at + 12 : at + 12 + size], data[at + 12 + size : at + 16 + size]
        if len(check) < 4:
            raise Damaged(f"{path.name} is cut short after {at:,} bytes")
        if size <= LARGEST_RECORD:
            if struct.unpack("<I", check)[0] != masked_crc(body):
                raise Damaged(f"{path.name} is damaged at byte {at:,}: the checksum of a record does not fit")
            yield body
        at += 16 + size


Fields = dict[int, list[Any]]


def fields(message: bytes) -> Fields:
    """Number of a field -> its values: whole numbers, or bytes that are a fixed number, words or a message.

    Raises:
        Damaged: no protobuf message.
    """
    found: Fields = {}
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        value: Any
        if kind == 0:
            value, at = _varint(message, at)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, at = _varint(message, at)
            if size is None or at + size > len(message) or not number:
                raise Damaged("holds a record that is no event")
            value, at = message[at : at + size], at + size
        found.setdefault(number, []).append(value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        value, at, shift = value | (byte & 0x7F) << shift, at + 1, shift + 7
        if not byte & 0x80:
            return value, at
    raise Damaged("holds a record that is no event")


def _message(found: Fields, number: int) -> Fields:
    """The last message of a field; empty where there is none."""
    values = found.get(number)
    if not values:
        return {}
    if not isinstance(values[-1], bytes):
        raise Damaged("holds a record that is no event")
    return fields(values[-1])


def _fixed(found: Fields, number: int, form: str) -> float | None:
    values = found.get(number)
    if not values:
        return None
    if not isinstance(values[-1], bytes) or len(values[-1]) < struct.calcsize(form):
        raise Damaged("holds a record that is no event")
    return float(struct.unpack_from(form, values[-1])[0])


def _words(found: Fields, number: int) -> str:
    value = (found.get(number) or [b""])[-1]
    return printable(value.decode(errors="replace")) if isinstance(value, bytes) else ""


def _scalar(value: Fields) -> float | None:
    """A value that is one number: `simple_value`, or a tensor of one float."""
    simple = _fixed(value, 2, "<f")
    tensor = _message(value, 8)
    if simple is not None or not tensor:
        return simple
    dtype = (tensor.get(1) or [0])[-1]
    form = {1: "<f", 2: "<d"}.get(dtype)
    if form is None:
        return None
    raw = (tensor.get(4) or tensor.get({1: 5, 2: 6}[dtype]) or [b""])[-1]
    return float(struct.unpack(form, raw)[0]) if isinstance(raw, bytes) and len(raw) == struct.calcsize(form) else None


def _hparams(value: Fields) -> Cells:
    """What was chosen, from a value of the plugin `hparams`: map entries of google.protobuf.Value."""
    plugin = _message(_message(value, 9), 1)
    if _words(plugin, 1) != "hparams":
        return {}
    chosen: Cells = {}
    for entry in _message(_message(plugin, 2), 3).get(1, []):
        pair = fields(entry) if isinstance(entry, bytes) else {}
        told, name = _message(pair, 2), _words(pair, 1)
        if (number := _fixed(told, 2, "<d")) is not None:
            chosen[name] = int(number) if number.is_integer() else number
        elif 4 in told:
            chosen[name] = bool(told[4][-1])
        elif 3 in told:
            chosen[name] = shortened(_words(told, 3), 200)
    return chosen


def read_events(folder: Path, files: Sequence[Path]) -> Told:
    """The run of a folder's event files, in the order of their names, which begin with the time of their start.

    Raises:
        Damaged: one of them is cut short or damaged, or there is no scalar in any.
    """
    settings: Cells = {}
    history: dict[int, Cells] = {}
    start = None
    for path in files:
        for record in event_records(path):
            event = fields(record)
            wall = _fixed(event, 1, "<d")
            start = wall if start is None else start
            step = (event.get(2) or [0])[-1]
            for each in _message(event, 5).get(1, []):
                value = fields(each) if isinstance(each, bytes) else {}
                settings |= _hparams(value)
                number = _scalar(value)
                if number is not None and isinstance(step, int):
                    seconds = {WALL: wall - start} if wall is not None and start is not None else {}
                    history.setdefault(step, {"step": step}).update({_words(value, 1): number} | seconds)
    ordered = [history[step] for step in sorted(history)]
    if not ordered and not settings:
        raise Damaged("holds no scalars")
    finished = max(path.stat().st_mtime for path in files)
    return Told(folder, "TensorBoard", settings, last_values(ordered), ordered, finished, "", EVENT_NAMES)


def with_hparams(runs: Sequence[Told]) -> list[Told]:
    """The runs; one of hyperparameters, which `add_hparams` puts into a folder of its own below its run's, is put
    together with that."""
    at = {run.place: run for run in runs}
    for run in runs:
        above = at.get(run.place.parent)
        if above is not None and run.settings:
            above.settings |= run.settings
            above.summary = run.summary | above.summary
            del at[run.place]
    return list(at.values())
