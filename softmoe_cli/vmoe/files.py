"""The files of a checkpoint of JAX programs, and the weights that they hold, by their official names.

Three kinds: vmoe's own, an `.index` with shards of data beside it; flax's msgpack; and archives of arrays, `.npz`.
"""

import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softmoe_cli.errors import first_line
from softmoe_cli.vmoe.arrays import Array, Extent, Fault, Indexed, leaves, sides, unpacked

FIRST = "embedding/kernel"
"""The weight by which a ViT is known."""
PREFIXES = ("", *(f"{a}{b}" for a in ("", "opt/target/", "optimizer/target/", "target/") for b in ("params/", "")))
"""Where a training state may keep its parameters."""
INDEX_VERSION = "20220622"
CHUNKS = "__msgpack_array_chunk_a87ca2__"
"""The key by which vmoe marks a file of pieces of arrays."""


def parameters_in(path: Path) -> dict[str, Tensor]:
    """The parameters in the files of a checkpoint, float32, by names such as Encoder/encoderblock_0/LayerNorm_0/scale;
    optimizer states, steps and so on are left out.

    Raises:
        Fault: nothing there, or nothing that can be used, with what is wrong.
        OSError: the system does not let us read it.
    """
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    index = prefix.with_name(f"{prefix.name}.index")
    if index.is_file():
        return _of_shards(prefix, index)
    if not path.exists():
        raise Fault(f"there is neither a file {path.name} nor {index.name}")
    if path.is_dir():
        raise Fault(
            "it is a folder, as orbax and tensorstore write them, which need JAX; restore it there and write "
            "flax.serialization.to_bytes(params) to a file"
        )
    if ".data-" in path.name:
        raise Fault(f"it is one of several files; name what comes before .data-: {path.name.partition('.data-')[0]}")
    if zipfile.is_zipfile(path):
        return _of_archive(path)
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise Fault("it is an archive that ends too early; copy it again")
    found = {name: value for name, value in leaves(unpacked(path)) if isinstance(value, Array)}
    start = _start(list(found))
    return {name.removeprefix(start): value.tensor(name) for name, value in found.items() if name.startswith(start)}


def _start(names: list[str]) -> str:
    """What the names of all parameters begin with."""
    for prefix in PREFIXES:
        if prefix + FIRST in names:
            return prefix
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    raise Fault(f"it holds no ViT: there is no {FIRST} among its {len(names)} arrays ({shown or 'none'})")


# --- vmoe's own -------------------------------------------------------------------------------------------------------


def _of_shards(prefix: Path, index: Path) -> dict[str, Tensor]:
    said = unpacked(index)
    if (
        not isinstance(said, dict)
        or not isinstance(said.get("index"), dict)
        or type(said.get("shard_count")) is not int
    ):
        raise Fault(f"{index.name} is no index of vmoe's")
    if said.get("version") != INDEX_VERSION:
        raise Fault(
            f"{index.name} says version {said.get('version')}, and only {INDEX_VERSION} is known: older files do not "
            "say the order of their arrays; restore it with vmoe and save it again"
        )
    entries = list(leaves(said["index"]))
    if not all(isinstance(entry, Indexed) for _, entry in entries):
        raise Fault(f"{index.name} is no index of vmoe's")
    start = _start([name for name, _ in entries])
    wanted = {number: (name, entry) for number, (name, entry) in enumerate(entries) if name.startswith(start)}
    count = said["shard_count"]
    files = {number: prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{count:05d}") for number in _shards(wanted)}
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        raise Fault(f"{missing[0]} is missing{f' and {len(missing) - 1} more' if missing[1:] else ''}")
    if empty := [name for name, entry in wanted.values() if 0 in entry.shape]:
        raise Fault(f"{index.name} says that {empty[0]} is empty")
    if sum(math.prod(entry.shape) for _, entry in wanted.values()) > sum(
        file.stat().st_size for file in files.values()
    ):
        raise Fault(f"{index.name} says more than its files hold; they are of different checkpoints, or truncated")
    whole = {number: torch.full(entry.shape, math.nan) for number, (_, entry) in wanted.items()}
    for file in files.values():
        for number, extent, piece in _pieces(file):
            if number in wanted:
                _fill(whole[number], extent, piece, f"{file.name}: {wanted[number][0]}")
    for number, (name, _) in wanted.items():
        if whole[number].isnan().any():
            raise Fault(f"a part of {name} is in none of its files, or no number; copy them again")
    return {name.removeprefix(start): whole[number] for number, (name, _) in wanted.items()}


def _shards(wanted: dict[int, tuple[str, Indexed]]) -> list[int]:
    return sorted({shard for _, entry in wanted.values() for shard in entry.shards})


def _pieces(file: Path) -> Iterator[tuple[int, Extent, list[Array]]]:
    """Each piece in a file of data: the number of its array, where it belongs, and its numbers in one or more parts."""
    said = unpacked(file)
    if not isinstance(said, dict) or CHUNKS not in said:
        raise Fault(f"{file.name} is no file of vmoe's data")
    for key, pieces in said.items():
        if key == CHUNKS:
            continue
        try:
            number, found = int(key), [(list(parts), extent) for parts, extent in pieces]
        except (ValueError, TypeError) as error:
            raise Fault(f"{file.name} is no file of vmoe's data") from error
        for parts, extent in found:
            if not isinstance(extent, Extent) or not parts or not all(isinstance(part, Array) for part in parts):
                raise Fault(f"{file.name} is no file of vmoe's data")
            yield number, extent, parts


def _fill(whole: Tensor, extent: Extent, parts: list[Any], name: str) -> None:
    """Puts a piece where it belongs."""
    numbers = torch.cat([part.tensor(name).flatten() for part in parts])
    ends = zip(extent.ends, whole.shape, strict=False)
    if len(extent.ends) != whole.ndim or not all(0 <= start < stop <= side for (start, stop), side in ends):
        raise Fault(f"{name} is {tuple(whole.shape)}, and a piece of it is said to be at {extent.ends}")
    if numbers.numel() != math.prod(extent.shape):
        raise Fault(f"{name} has a piece of {numbers.numel()} numbers where {extent.shape} belong")
    whole[tuple(slice(start, stop) for start, stop in extent.ends)] = numbers.reshape(extent.shape)


# --- archives of arrays -----------------------------------------------------------------------------------------------


UNREADABLE = (
    zipfile.BadZipFile, zlib.error, tokenize.TokenError, EOFError, KeyError, IndexError, ValueError, TypeError,
    SyntaxError, OverflowError, MemoryError, RuntimeError,
)  # fmt: skip
"""What zipfile and numpy raise of archives that are damaged, have a password (RuntimeError, of which RecursionError and
NotImplementedError are kinds too), or whose headers are no numpy's."""


def _of_archive(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            start = _start(names)
            return {
                name.removeprefix(start): _member(archive, name).tensor(name)
                for name in names
                if name.startswith(start)
            }
    except UNREADABLE as error:
        raise Fault(f"it is no archive of arrays, or is truncated or damaged ({first_line(error)})") from error


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    """One array of an archive, read without numpy's loader, which would take a file's word for its size."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Fault(f"{name} is compressed as no array of numpy's is")
    with archive.open(entry) as file:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(file)
        if dtype.hasobject:
            raise Fault(f"{name} is a pickle, which can run code when opened")
        shape = sides(list(shape))
        size = math.prod(shape) * dtype.itemsize
        data = file.read(min(size, entry.file_size) + 1)  # not all: a little file can hold gigabytes of zeros
    if len(data) > size:
        raise Fault(f"{name} is said to be {shape} of {dtype.name} and holds more than {size} bytes")
    kind = "bfloat16" if dtype == np.dtype("V2") else dtype.name  # numpy knows no bfloat16 and keeps its two bytes
    if columns_first or not dtype.isnative:
        numbers = np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")
        data = numbers.astype(dtype.newbyteorder("=")).tobytes()
    return Array(shape, kind, data)
