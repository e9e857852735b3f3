"""Where the bytes of every image lie: files in folders, or ranges of tar files, TFRecord files and Arrow files.

All of them are read the same way: so many bytes of a file from an offset on. An archive is therefore as good as a
folder: any image at any time, from any process, with no state. An index is built once per process from headers; image
data are not read for it.
"""

import itertools
import json
import mmap
import os
import re
import stat
import tarfile
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli.errors import UsageError

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp",
    ".gif",
)  # fmt: skip
LARGEST_IMAGE, LARGEST_LABEL, LONGEST_NAME, LONGEST_CLASS = 2**30, 2**24, 1024, 1000
"""Limits: bytes of an image, of a .cls or .json and of a name below its holder; letters of a class's name. No real file
has more, but a few wrong bytes in a file may claim more."""
SAMPLE = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""WebDataset: what stands before the first dot of a member's name is the sample, what follows is the field."""

Range = tuple[str, int, int]
"""Name, offset and size in bytes."""


@dataclass(frozen=True, eq=False)
class Stored:
    """The places of n images, in arrays: Python objects by the million cost memory in every process that decodes."""

    holders: tuple[Path, ...]
    """Folders and archives."""
    holder: np.ndarray
    """int32 n: which of the holders."""
    name: np.ndarray
    """bytes n: below the folder, or inside the archive."""
    offset: np.ndarray
    """int64 n: of the first byte in the archive; -1: a file of its own."""
    size: np.ndarray
    """int64 n: in bytes; -1: that of the file."""

    @classmethod
    def files(cls, root: Path, names: Sequence[str]) -> "Stored":
        """Files below a folder."""
        return cls.ranges(root, [(name, -1, -1) for name in names])

    @classmethod
    def ranges(cls, holder: Path, ranges: Sequence[Range]) -> "Stored":
        """Parts of an archive.

        Raises:
            UsageError: a name that is too long: all are kept in the width of the longest.
        """
        longest = max((name for name, _, _ in ranges), key=len, default="")
        if len(longest) > LONGEST_NAME:
            raise UsageError(
                f"{holder} has a name of {len(longest):,} letters, {longest[:40]}…; {LONGEST_NAME} are enough"
            )
        names = np.array([name.encode(errors="surrogateescape") for name, _, _ in ranges], dtype=bytes)
        places = np.array([place for _, *place in ranges], dtype=np.int64).reshape(-1, 2)
        return cls((holder,), np.zeros(len(ranges), np.int32), names, places[:, 0].copy(), places[:, 1].copy())

    @classmethod
    def joined(cls, parts: Iterable["Stored"]) -> "Stored":
        """The images of all parts, one part after the other."""
        known: dict[Path, int] = {}
        several, holders = list(parts), []
        for part in several:
            numbers = [known.setdefault(holder, len(known)) for holder in part.holders]
            holders.append(np.array(numbers, np.int32)[part.holder])
        empty = cls.ranges(Path(), [])
        several, holders = [*several, empty], [*holders, empty.holder]
        columns = (np.concatenate([getattr(part, key) for part in several]) for key in ("name", "offset", "size"))
        return cls(tuple(known), np.concatenate(holders), *columns)

    def __len__(self) -> int:
        return len(self.holder)

    def subset(self, index: np.ndarray) -> "Stored":
        return Stored(self.holders, self.holder[index], self.name[index], self.offset[index], self.size[index])

    def place(self, i: int) -> Path:
        """What people call image i: its file, or the archive's path and the name inside."""
        return self.holders[self.holder[i]] / self.name[i].decode(errors="surrogateescape")

    @property
    def places(self) -> list[Path]:
        return [self.place(i) for i in range(len(self))]

    def read(self, i: int) -> bytes:
        """The bytes of image i.

        Raises:
            OSError: the file cannot be read, is a pipe or a device, is too large for an image, or ends too early.
        """
        alone = self.offset[i] < 0
        path = self.place(i) if alone else self.holders[self.holder[i]]
        with open(
            os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0
        ) as file:  # a pipe would wait for a writer
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("it is no file but a pipe, a device or a folder")
            size = status.st_size if alone else int(self.size[i])
            if size > LARGEST_IMAGE:
                raise OSError(f"it has {size:,} bytes, more than an image has")
            file.seek(0 if alone else int(self.offset[i]))
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{path} has become shorter")
        return data


# --- tar --------------------------------------------------------------------------------------------------------------


def tar_members(path: Path) -> list[Range]:
    """The regular files in a tar, in their order.

    Raises:
        UsageError: not a tar, a compressed one, one that is cut short or goes on behind its end, or one with an image
            that is a link or sparse.
    """
    members = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.size < 0:
                    raise tarfile.ReadError(f"{name} has a size below 0")
                if member.isreg() and not member.issparse():
                    members.append((name, member.offset_data, member.size))
                elif is_image(name) and not member.isdir():
                    raise UsageError(
                        f"{path}: {name} is a link, sparse, or no file; pack the files themselves (tar --dereference "
                        "--hard-dereference)"
                    )
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            end = tar.offset  # tarfile stops at any header that it cannot read
        with path.open("rb") as file:
            file.seek(end)
            block = file.read(512)
            rest = iter(lambda: file.read(1 << 20), b"")
            if len(block) < 512 or any(block) or any(more.count(0) < len(more) for more in rest):
                raise tarfile.ReadError(
                    f"its end, at byte {end}, is no end of a tar, or another one follows in the file"
                )
    except UsageError:
        raise
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(
            f"{path} cannot be read as a tar: {error or 'not a tar'}; it must be uncompressed and whole"
        ) from error
    return members


def tar_images(path: Path) -> tuple[list[Range], list[str]]:
    """The members that are images by their names, and the names of the others.

    Raises:
        UsageError: as `tar_members`, or two of one name.
    """
    members = tar_members(path)
    images = [member for member in members if is_image(member[0])]
    twice = [name for name, times in Counter(name for name, *_ in images).items() if times > 1]
    if twice:
        raise UsageError(f"{path} holds {twice[0]} twice, as tars do that were added to; pack it anew from the files")
    return images, [name for name, _, _ in members if not is_image(name)]


def is_image(name: str) -> bool:
    """Whether a name ends like an image's and is not hidden, or below a hidden folder."""
    return name.lower().endswith(IMAGE_ENDINGS) and not any_hidden(name)


def any_hidden(name: str) -> bool:
    """Whether a path is hidden, or below a hidden folder."""
    return (name.startswith(".") or "/." in name or "@eaDir" in name) and any(map(is_hidden, name.split("/")))


def is_hidden(name: str) -> bool:
    """Whether a program keeps a file of this name for itself: a dot in front, or a NAS's previews."""
    return (name.startswith(".") and name not in (".", "..")) or name == "@eaDir"


# --- WebDataset -------------------------------------------------------------------------------------------------------

Labelled = tuple[list[Range], list[int | str]]
"""Images and, for each, its label: a number, or the name of a class."""


def webdataset(path: Path, label: str | None) -> Labelled:
    """The samples of a shard: https://github.com/webdataset/webdataset, "files with the same name belong together".

    Args:
        label: the field of a sample's .json that holds its label; None: its .cls does.

    Raises:
        UsageError: a shard that is no tar, or a sample without image or label, or with two.
    """
    samples: dict[str, dict[str, Range]] = {}
    for member in tar_members(path):
        parts = None if any_hidden(member[0]) else SAMPLE.fullmatch(member[0])
        if parts is None:
            continue
        fields = samples.setdefault(parts[1], {})
        if parts[2].lower() in fields:
            raise UsageError(f"{path} holds {member[0]} twice")
        fields[parts[2].lower()] = member
    images, labels = [], []
    with path.open("rb") as file:
        for key, fields in samples.items():
            pictures = [member for field, member in fields.items() if f".{field}" in IMAGE_ENDINGS]
            if len(pictures) != 1:
                raise UsageError(f"{path}: sample {key} has {len(pictures)} images; it must have one{_dotted(fields)}")
            field = "cls" if label is None else "json"
            if field not in fields:
                raise UsageError(
                    f"{path}: sample {key} has no .{field}, only {', '.join(f'.{each}' for each in fields)}; "
                    "data.label=KEY reads the label from a sample's .json, data.label=null from its .cls"
                )
            _, at, size = fields[field]
            if size > LARGEST_LABEL:
                raise UsageError(f"{path}: sample {key} has a .{field} of {size:,} bytes; it must hold a label")
            file.seek(at)
            images.append(pictures[0])
            labels.append(_label(file.read(size), label, f"{path}: sample {key}"))
    return images, labels


def _dotted(fields: dict[str, Range]) -> str:
    """What is wrong with a sample that has no image: its fields, or a dot too many in the image's name."""
    dotted = [name for field, (name, _, _) in fields.items() if "." in field and f".{field}".endswith(IMAGE_ENDINGS)]
    if not dotted:
        return f" (its fields: {', '.join(f'.{field}' for field in itertools.islice(fields, 5))})"
    return (
        f". A sample's name ends at its first dot, so that {dotted[0]} is its field "
        f".{dotted[0].rpartition('/')[2].partition('.')[2]}; write other dots as _"
    )


def _label(raw: bytes, key: str | None, sample: str) -> int | str:
    try:
        value: Any = raw.decode("utf-8-sig").strip()
        if key is not None:  # a number with too many digits for a class becomes a float, which is no label
            value = json.loads(value, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))[key]
        elif value.isdecimal() and len(value) < 19:
            value = int(value)
    except UnicodeDecodeError as error:
        raise UsageError(f"{sample}: its .{'cls' if key is None else 'json'} is no text in UTF-8") from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise UsageError(f"{sample}: its .json holds no data.label={key}") from error
    return _checked(value, key is None, sample)


def _checked(value: Any, written: bool, where: str) -> int | str:
    """Checks a label that was found. `written`: it was stored as text, so that a text of digits means a number."""
    if type(value) is str and (len(value) > LONGEST_CLASS or (written and value.isdecimal())):
        raise UsageError(f"{where}: its label {value[:20]}… of {len(value):,} letters is no class")
    if type(value) not in (int, str) or re.fullmatch(r"|-\d+", str(value)):
        raise UsageError(f"{where}: its label {value!r} is neither a number from 0 nor a name")
    return typing.cast(int | str, value)


# --- TFRecord ---------------------------------------------------------------------------------------------------------


def tfrecords(path: Path, label: str | None) -> Labelled:
    """The images of a TFDS file, as encoded (`image`), with the integer feature `label`, or the one named.

    A TFRecord file is: length (8 bytes), its checksum (4), that many bytes, their checksum (4), and again. The bytes
    are a tf.train.Example: https://www.tensorflow.org/tutorials/load_data/tfrecord. Long values are skipped over.

    Raises:
        UsageError: a file that is cut short, or a record without image or label.
    """
    images: list[Range] = []
    labels: list[int | str] = []
    wanted = (label or "label").encode()
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return [], []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = 0
            while start < len(data):
                end = start + 12 + int.from_bytes(data[start : start + 8], "little")
                if end + 4 > len(data):
                    raise UsageError(f"{path} is cut short, or no TFRecord file: record {len(images)} ends beyond it")
                try:
                    features = dict(_features(data, start + 12, end))
                    ((_, image, size),) = _values(data, *features[b"image"], kind=1)
                    value = _integer(data, *features[wanted])
                except (ValueError, KeyError, IndexError) as error:
                    raise UsageError(
                        f"{path}: record {len(images)} is no Example with one encoded `image` and one whole number "
                        f"`{wanted.decode()}`; data.label names another feature"
                    ) from error
                images.append((f"{len(images):08d}", image, size))
                labels.append(value)
                start = end + 4
    return images, labels


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """A number in protobuf's variable length, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no number")


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field of a message; a bare number ends where it starts."""
    while start < end:
        tag, start = _varint(data, start)
        if tag & 7 == 2:
            size, start = _varint(data, start)
            if start + size > end:
                raise ValueError("a field ends beyond its message")
            yield tag >> 3, start, start + size
            start += size
        elif tag & 7 == 0:
            yield tag >> 3, start, start
            start = _varint(data, start)[1]
        else:
            raise ValueError("a field of another type")


def _features(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Example.features.feature: name -> where the Feature lies."""
    for _, a, b in _fields(data, start, end):
        for _, entry, entry_end in _fields(data, a, b):
            (_, key, key_end), (_, value, value_end) = _fields(data, entry, entry_end)
            yield data[key:key_end], (value, value_end)


def _values(data: mmap.mmap, start: int, end: int, *, kind: int) -> Iterator[Range]:
    """The values of a Feature's list (1 bytes, 3 int64): (unused, start, size)."""
    for number, a, b in _fields(data, start, end):
        if number != kind:
            raise ValueError("a list of another type")
        yield from (("", c, d - c) for _, c, d in _fields(data, a, b))


def _integer(data: mmap.mmap, start: int, end: int) -> int:
    """The one value of an int64 list, packed (as TensorFlow writes) or not."""
    ((_, at, size),) = _values(data, start, end, kind=3)
    value, stop = _varint(data, at)
    if (size and stop != at + size) or value >> 63:
        raise ValueError("several numbers, or one below 0")
    return value


# --- Arrow ------------------------------------------------------------------------------------------------------------


def arrow(path: Path, image: str, label: str) -> Labelled:
    """The images in an Arrow file of a Hugging Face data set (`save_to_disk`, or its cache), which are bytes as they
    were encoded, with an integer label.

    Raises:
        UsageError: pyarrow is missing, or a file that it cannot read or that has other columns.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise UsageError("data=arrow needs pyarrow: pip install 'softmoe-cli[arrow]'") from error
    images: list[Range] = []
    labels: list[int | str] = []
    size = path.stat().st_size
    try:
        with pa.memory_map(str(path)) as file:
            base = file.read_buffer(1).address
            file.seek(0)
            for batch in pa.ipc.open_stream(file):
                rows, numbers = batch.column(image), batch.column(label)
                for column in (rows, numbers):  # check the file's sizes: they may lead out of memory
                    column.validate(full=True)
                pictures = rows.field("bytes")
                kind = pictures.type
                if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                    raise UsageError(f"{path}: {image} holds {kind}; images must be bytes as they were encoded")
                if rows.null_count or pictures.null_count or numbers.null_count:
                    raise UsageError(f"{path}: {image} or {label} is missing in some rows, or images are only named")
                if not len(rows):
                    continue
                _, ends, values = pictures.buffers()
                edges = np.frombuffer(ends, np.int64 if pa.types.is_large_binary(kind) else np.int32)
                edges = edges[pictures.offset : pictures.offset + len(pictures) + 1].astype(np.int64)
                start = values.address - base
                if not 0 <= start <= start + edges[-1] <= size:
                    raise UsageError(f"{path} is compressed; save it again without")
                images += [
                    (f"{len(images) + i:08d}", start + int(a), int(b - a))
                    for i, (a, b) in enumerate(itertools.pairwise(edges.tolist()))
                ]
                labels += _arrow_labels(numbers, f"{path}, {label}")
    except (pa.ArrowException, KeyError, OSError, AttributeError) as error:
        raise UsageError(f"{path} is no Arrow file with images in {image} and labels in {label}: {error}") from error
    return images, labels


def _arrow_labels(column: Any, where: str) -> list[int | str]:
    """The values of a column. Whole numbers and truth values are converted all at once."""
    values: list[Any] = column.to_pylist()
    values = [int(value) if isinstance(value, bool) else value for value in values]
    if all(type(value) is int for value in values) and min(values) >= 0:
        return values
    return [_checked(value, False, where) for value in values]
