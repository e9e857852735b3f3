"""The framing and the messages of event files."""

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest

from softmoe_cli.compare.others.tensorboard import event_records, fields, read_events
from softmoe_cli.compare.others.told import Damaged
from softmoe_cli.run.events import masked_crc


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, from the polynomial (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ 0x82F63B78 if crc & 1 else crc >> 1
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_castagnolis() -> None:
    assert slow_crc32c(b"123456789") == 0xE3069283, "the check value that the standard prints"
    assert slow_crc32c(bytes(32)) == 0x8A9136AA, "RFC 3720, appendix B.4"
    data = random.Random(0).randbytes(200)
    crc = slow_crc32c(data)
    assert masked_crc(data) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def framed(record: bytes) -> bytes:
    size = struct.pack("<Q", len(record))
    return size + struct.pack("<I", masked_crc(size)) + record + struct.pack("<I", masked_crc(record))


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def part(number: int, body: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(body)) + body


def event(step: int, value: bytes, wall: float = 1.0) -> bytes:
    return b"\x09" + struct.pack("<d", wall) + b"\x10" + varint(step) + part(5, part(1, value))


def test_scalars_of_every_form(tmp_path: Path) -> None:
    """simple_value, tensors of float and double in their lists and as bytes; other tensors are no scalars."""
    tag = part(1, b"x")
    single, double = struct.pack("<f", 0.25), struct.pack("<d", 0.1)
    forms = [
        tag + b"\x15" + single,
        tag + part(8, b"\x08\x01" + part(5, single)),
        tag + part(8, b"\x08\x02" + part(6, double)),
        tag + part(8, b"\x08\x01" + part(4, single)),
        tag + part(8, b"\x08\x02" + part(4, double)),
        tag + part(8, b"\x08\x02" + part(4, double * 2)),
        tag + part(8, b"\x08\x07" + part(8, b"words")),
    ]
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(b"".join(framed(event(300 * i, form, 1.0 + i)) for i, form in enumerate(forms)))
    read = read_events(tmp_path, [file])
    assert [(line["step"], line["x"]) for line in read.history] == [
        (0, 0.25),
        (300, 0.25),
        (600, 0.1),
        (900, 0.25),
        (1200, 0.1),
    ]
    assert [line["wall_s"] for line in read.history] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_large_records_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(framed(bytes(70_000)) + framed(b"\x10\x01"))
    assert list(event_records(file)) == [b"\x10\x01"]


def test_no_bytes_make_another_error() -> None:
    """Whatever stands in a record, it is read or named."""
    random_bytes = random.Random(1)
    named = 0
    for _ in range(3000):
        data = random_bytes.randbytes(random_bytes.randrange(1, 40))
        try:
            fields(data)
        except Damaged:
            named += 1
    assert named > 1000


def test_random_records_are_read_or_named(tmp_path: Path) -> None:
    random_bytes = random.Random(2)
    file = tmp_path / "events.out.tfevents.1.host"
    whole = event(1, part(1, b"x") + b"\x15" + struct.pack("<f", 1.0))
    for _ in range(1000):
        changed = bytearray(whole)
        changed[random_bytes.randrange(len(whole))] = random_bytes.randrange(256)
        file.write_bytes(framed(bytes(changed)))
        with suppress(Damaged):
            assert read_events(tmp_path, [file]).history


def test_restarts_go_on(tmp_path: Path) -> None:
    files = []
    for i in range(2):
        file = tmp_path / f"events.out.tfevents.{i}.host"
        tag = part(1, b"x")
        file.write_bytes(
            b"".join(framed(event(step, tag + b"\x15" + struct.pack("<f", step + i))) for step in (i, i + 1))
        )
        files.append(file)
    told = read_events(tmp_path, files)
    assert [(line["step"], line["x"]) for line in told.history] == [(0, 0), (1, 2), (2, 3)], "what came later holds"


def test_a_folder_without_scalars_says_so(tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1.host"
    file.write_bytes(framed(b"\x10\x01"))
    with pytest.raises(Damaged, match="holds no scalars"):
        read_events(tmp_path, [file])
