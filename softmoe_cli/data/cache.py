"""Decoded images in one file on disk, which is mapped into memory: what was read lately stays there, of all the rest
only the rows that a batch asks for are read.

The file is numpy's (`.npy`): uint8 of shape (images, channels, side, side), part by part and in each part as listed.
Its name has the set's digest and all that decides the pixels, so that other images, another side or another decoder
make another file, and what lies there is used without decoding anything.
"""

import fcntl
import glob
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data import contents
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.decode import squares
from softmoe_cli.data.folders import Listing
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import clear, written_whole
from softmoe_cli.text import gibibytes

TOGETHER = 256
"""Images that are decoded and then written."""


@dataclass(frozen=True)
class Mapped:
    """Rows of a file of pixels, which stay on disk until they are asked for."""

    pixels: np.ndarray
    """uint8 (all images of the file, c, s, s), mapped."""
    rows: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c s s"]:
        return torch.from_numpy(self.pixels[self.rows[index.numpy(force=True)]])

    def __iter__(self) -> Iterator[UInt8[Tensor, "c s s"]]:
        return (torch.from_numpy(self.pixels[row].copy()) for row in self.rows)

    def subset(self, index: np.ndarray) -> "Mapped":
        return Mapped(self.pixels, self.rows[index])


def cached(listed: Listing, data: Data) -> dict[str, Mapped]:
    """The squares of every part, from `data.cache`, where they are written if they are not there yet. Of several
    processes one writes, and the others wait for it.

    Raises:
        UsageError: an image cannot be read, the folder cannot be used, or the file there is damaged.
        RunError: the disk is too small, or cannot be written.
    """
    assert data.cache is not None
    files = [stored for stored, _ in listed.parts.values()]
    shape = (sum(map(len, files)), data.channels, data.image_size, data.image_size)
    path = Path(data.cache) / f"{_digest(listed, data)}-{data.image_size}px-{data.name.replace('/', '_')[:60]}.npy"
    if not path.is_file():
        _write_once(path, files, shape, data)
    pixels = _opened(path, shape)
    ends = itertools.accumulate(map(len, files))
    rows = (np.arange(end - len(stored), end) for stored, end in zip(files, ends, strict=True))
    return {part: Mapped(pixels, its) for part, its in zip(listed.parts, rows, strict=True)}


def _digest(listed: Listing, data: Data) -> str:
    """16 letters for the images and for all that is done to them until they are squares."""
    pixels = [contents.digest(listed.parts, listed.classes), data.image_size, data.channels, data.crop_pct]
    return hashlib.sha256(json.dumps([*pixels, PIL.__version__]).encode()).hexdigest()[:16]


def _opened(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        pixels: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path) from error
    if pixels.shape != shape or pixels.dtype != np.uint8 or not pixels.flags.c_contiguous:
        raise _damaged(path)
    return pixels


def _damaged(path: Path) -> UsageError:
    return UsageError(f"{path} is damaged, or no file of decoded images; remove it, and it is made anew")


def _write_once(path: Path, files: list[Stored], shape: tuple[int, ...], data: Data) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(f"data.cache={data.cache} is no folder to write to: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.is_file():
            return  # another process was writing it
        need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
        if need > free:
            raise RunError(
                f"data.cache={data.cache} needs {gibibytes(need)} for {shape[0]:,} images of {shape[2]} pixels, and "
                f"{gibibytes(free)} are free there; make room, or lower data.image_size"
            )
        print(f"softmoe: decoding {shape[0]:,} images once, into {path} ({gibibytes(need)})", file=sys.stderr)
        _write(path, files, shape, data)
    finally:
        os.close(lock)


def _write(path: Path, files: list[Stored], shape: tuple[int, ...], data: Data) -> None:
    """The file appears whole or not at all: a killed process leaves a hidden one, which the next one removes."""
    for left in path.parent.glob(f".{glob.escape(path.name[:60])}-*"):
        clear(left)  # the lock is held: nobody writes it
    with written_whole(path) as file:
        head = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, head)
        for stored in files:
            for start in range(0, len(stored), TOGETHER):
                some = stored.subset(np.arange(start, min(start + TOGETHER, len(stored))))
                file.write(squares(some, data).numpy().data)
