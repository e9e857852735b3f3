"""Files of the sets that softmoe knows by name: found on the disk or downloaded, and read into arrays. Only a download
imports torch."""

import gzip
import math
import urllib.error
import zlib
from pathlib import Path

import numpy as np

from softmoe_cli.config.data import Data
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.text import gibibytes

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
IDX_NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def idx_arrays(data: Data) -> list[np.ndarray]:
    """Training images and labels, test images and labels.

    Raises:
        UsageError: files of these names hold something else.
    """
    paths = idx_paths(data)
    if len(paths) < len(IDX_NAMES):
        said = f"{', '.join(IDX_NAMES)} (also with .gz); Debian's dataset-fashion-mnist has them"
        download("FashionMNIST", data, said)
        paths = idx_paths(data)
    arrays = [read_idx(path) for path in paths]
    for i in (0, 2):
        images, labels = arrays[i : i + 2]
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not labels.size or labels.max() > 9:
            raise UsageError(
                f"{paths[i]} and {paths[i + 1].name} are not images of 28x28 pixels, each with a label from 0 to 9: "
                f"they have shapes {images.shape} and {labels.shape}"
            )
    return arrays


def idx_paths(data: Data) -> list[Path]:
    """The four files of the first folder that has them all: other sets go by these names, and files of two folders may
    be of two sets. Nothing where no folder has all."""
    for folder in (Path(data.root), Path(data.root) / "FashionMNIST" / "raw", DEBIAN_FASHION):
        pairs = [(folder / name, folder / f"{name}.gz") for name in IDX_NAMES]
        paths = [path for pair in pairs if (path := next(filter(Path.is_file, pair), None)) is not None]
        if len(paths) == len(IDX_NAMES):
            return paths
    return []


LARGEST_IDX = 2**31
"""The most bytes: Fashion-MNIST's largest file has 47 million, and a gzipped file may unpack to a thousand times its
size."""


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's idx format, gzipped or not.

    Raises:
        UsageError: a file that is not idx, or has not the bytes that its header promises, or promises too many.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = file.read(4)
            if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
                raise UsageError(f"{path} is no idx file of bytes: it must begin with 00 00 08")
            head = 4 + 4 * raw[3]
            raw += file.read(head - 4)
            if len(raw) < head:
                raise UsageError(f"{path} is cut short: {len(raw)} bytes where its header alone has {head}")
            shape = np.frombuffer(raw[4:], dtype=">u4").tolist()
            promised = math.prod(shape)
            if promised > LARGEST_IDX:
                raise UsageError(
                    f"{path} promises {gibibytes(promised)}, more than the {gibibytes(LARGEST_IDX)} that are read at "
                    "once; a set of that size belongs into files of its own: data=folder or data=webdataset"
                )
            pixels = file.read(promised + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if len(pixels) != promised:
        many = f"{head + len(pixels)} bytes" if len(pixels) < promised else "more bytes"
        raise UsageError(
            f"{path} is {'cut short' if len(pixels) < promised else 'too long'}: {many} where its header promises "
            f"{head + promised}"
        )
    return np.frombuffer(pixels, dtype=np.uint8).reshape(shape).copy()


def download(kind: str, data: Data, expected: str) -> None:
    """Has torchvision download a set to `data.root`.

    Raises:
        UsageError: it cannot; the message says what is `expected` there.
    """
    from torchvision import datasets

    print(f"downloading {kind} to {data.root}", flush=True)
    try:
        getattr(datasets, kind)(data.root, download=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UsageError(
            f"data={data.name} is not in data.root={data.root} and cannot be downloaded "
            f"({first_line(error)}); put there {expected}"
        ) from error
