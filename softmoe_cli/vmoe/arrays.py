"""Arrays as JAX programs put them into files: numbers of a type, in a shape. Reading them runs nothing."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch
from torch import Tensor

from softmoe_cli.errors import first_line

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
"""Types of numbers that weights may have."""
CHUNKED = "__msgpack_chunked_array__"
"""The key by which flax marks an array that it has cut into pieces, because it has more than 2^30 bytes."""

_DEEPEST = 100
"""Dicts in dicts: models have about 6, and Python can follow some hundreds."""


class Fault(Exception):
    """What is wrong with a file, as the end of a sentence about it."""


@dataclass(frozen=True)
class Array:
    """An array as it lies in a file, row after row."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes

    def tensor(self, name: str) -> Tensor:
        """Its numbers in float32, or Fault."""
        kind = DTYPES.get(self.dtype)
        if kind is None:
            raise Fault(f"{name} is of {self.dtype}, which no weight is")
        if any(side < 0 for side in self.shape) or math.prod(self.shape) * kind.itemsize != len(self.data):
            raise Fault(f"{name} is said to be {self.shape} and holds {len(self.data)} bytes of {self.dtype}")
        if not self.data:
            raise Fault(f"{name} is empty")
        return torch.frombuffer(bytearray(self.data), dtype=kind).reshape(self.shape).float()


@dataclass(frozen=True)
class Extent:
    """A box in an array: where it begins and ends, by axis."""

    ends: tuple[tuple[int, int], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.ends)


@dataclass(frozen=True)
class Indexed:
    """What vmoe's index says of an array: its shape, and the numbers of the files that hold its pieces."""

    shape: tuple[int, ...]
    shards: tuple[int, ...]


def unpacked(path: Path) -> Any:
    """What a msgpack file holds: dicts, lists and plain values, with `Array`, `Extent` and `Indexed` for what flax and
    vmoe write as extensions.

    Raises:
        Fault: it is no such file, or damaged.
    """
    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=_extension, raw=False, strict_map_key=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:  # ValueError: truncated as well
        raise Fault(f"{path.name} is no msgpack of flax's, or is truncated or damaged ({first_line(error)})") from error


def _extension(code: int, data: bytes) -> Any:
    """flax's extensions 1 (array) and 3 (number), vmoe's 6 (extent) and 8 (of an index); others stay as they are."""
    if code in (1, 3):
        shape, dtype, numbers = msgpack.unpackb(data, raw=True)
        if not isinstance(numbers, bytes):  # bytes() of a number would make as many
            raise ValueError("an array without numbers")
        return Array(sides(shape), str(dtype, "ascii"), numbers)
    if code == 6:
        return _box(data)
    if code == 8:
        described, _, shards = msgpack.unpackb(data, raw=True)
        shape, *_ = msgpack.unpackb(described, raw=True)
        return Indexed(sides(shape), sides(shards))
    return msgpack.ExtType(code, data)


def _box(data: bytes) -> Extent:
    ends = [msgpack.unpackb(each, raw=True) for each in msgpack.unpackb(data, raw=True)]
    return Extent(tuple((start, stop) for start, stop in ([*sides(each[:2])] for each in ends)))


def sides(numbers: Any) -> tuple[int, ...]:
    """The shape that a file says an array has.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(numbers, list) or not all(type(each) is int and 0 <= each < 2**48 for each in numbers):
        raise ValueError("a shape that is none")
    return tuple(numbers)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts with its path, a/b/c, in the order in which JAX numbers them: by key. An array that
    flax has cut is one value."""
    if path.count("/") > _DEEPEST:
        raise Fault(f"it holds dicts in dicts, more than {_DEEPEST} deep")
    if isinstance(tree, Mapping) and CHUNKED not in tree:
        for key in sorted(tree, key=str):
            yield from leaves(tree[key], f"{path}/{key}" if path else str(key))
    elif isinstance(tree, Mapping):
        yield path, _joined(tree, path)
    elif tree is not None:
        yield path, tree


def _joined(tree: Mapping[str, Any], path: str) -> Array:
    """An array that flax has cut into pieces."""
    try:
        shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
        pieces = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        dtypes = {each.dtype for each in pieces}
        (dtype,) = dtypes
        return Array(sides(list(shape)), dtype, b"".join(each.data for each in pieces))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Fault(f"{path} is cut into pieces that do not fit") from error
