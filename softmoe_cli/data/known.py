"""The sets that softmoe knows by name, as labelled images: digits, Fashion-MNIST, CIFAR."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data.found import download, idx_arrays
from softmoe_cli.data.splits import ImageSet, Splits, split

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def digits(data: Data) -> Splits:
    """The table that scikit-learn ships: 64 pixels and the digit in a row. Importing scikit-learn for it would take a
    second."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    with gzip.open(Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", "rt") as rows:
        table = np.loadtxt(rows, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0..16 in the source
    images = _convert(torch.from_numpy(pixels), data.channels)
    labels = torch.from_numpy(table[:, -1]).long()
    return split({"": ImageSet(labels, images, 8, data.channels)}, [str(i) for i in range(10)], data)


def _convert(images: UInt8[Tensor, "n c s s"], channels: int) -> UInt8[Tensor, "n c2 s s"]:
    """Grey repeated to colour, or colour to luma (ITU-R 601, as PIL does)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)


def fashion_mnist(data: Data) -> Splits:
    arrays = [torch.from_numpy(array) for array in idx_arrays(data)]
    train, test = (
        ImageSet(arrays[i + 1].long(), _convert(arrays[i][:, None], data.channels), 28, data.channels) for i in (0, 2)
    )
    return split({"train": train, "val": test}, list(FASHION_CLASSES), data)


def cifar(data: Data) -> Splits:
    if cifar_part(data, train=False) is None:
        download(CIFAR[data.name][0], data, f"the folder {CIFAR[data.name][1]}")
    parts = [cifar_part(data, train=part) for part in (True, False)]
    train, test = (
        ImageSet(
            torch.tensor(part.targets),
            _convert(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), data.channels),
            32,
            data.channels,
        )
        for part in parts
    )
    return split({"train": train, "val": test}, list(parts[0].classes), data)


CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
"""torchvision's name, and the folder."""


def cifar_part(data: Data, *, train: bool) -> Any:
    """A part of a CIFAR set; None if a file is missing or is another one. torchvision compares every file with its
    known MD5 before it unpickles anything."""
    from torchvision import datasets

    try:
        return getattr(datasets, CIFAR[data.name][0])(data.root, train=train, download=False)
    except RuntimeError:
        return None
