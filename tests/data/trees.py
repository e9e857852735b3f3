"""Small image sets in folders or in memory, and what the tests of several files do with them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.config.recipe import Augment
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.batches import Batch, train_batches
from softmoe_cli.data.decode import centre
from softmoe_cli.data.picture import opened
from softmoe_cli.data.sets import load
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.errors import UsageError
from tests.oracles import compose

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")
SIDE = 8


def write_image(path: Path, rng: np.random.Generator, size: tuple[int, int] = (11, 9), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_tree(root: Path, per_class: int = 6, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        for i in range(per_class):
            write_image(root / name / f"{i}.png", rng, (SIDE + i, SIDE + 3))
    return root


def folder(root: Path, **changes: object) -> Data:
    data = compose("data=folder", "data.root=x", f"data.image_size={SIDE}").data
    for key, value in ({"root": str(root), "workers": 0} | changes).items():
        assert hasattr(data, key)
        setattr(data, key, value)
    return data


def in_memory(n: int = 10, channels: int = 3, side: int = SIDE) -> ImageSet:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, side, side), generator=rng, dtype=torch.uint8)
    return ImageSet(torch.arange(n) % 3, pixels, side, channels)


def same(a: Splits, b: Splits) -> bool:
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("train", "validation", "test")]
    return a.classes == b.classes and all(
        torch.equal(x.labels, y.labels) and files(x) == files(y) and torch.equal(pixels(x), pixels(y)) for x, y in pairs
    )


def pixels(images: ImageSet) -> Tensor:
    if images.images is not None:
        assert isinstance(images.images, Tensor)
        return images.images
    stored = images.files
    assert stored is not None
    return torch.stack(
        [centre(opened(stored, i, images.channels, 100.0), images.side, None) for i in range(len(images))]
    )


def files(images: ImageSet) -> list[Path]:
    return [] if images.files is None else images.files.places


def decode(file: Path, side: int, channels: int) -> Tensor:
    return centre(opened(Stored.files(file.parent, [file.name]), 0, channels, 100.0), side, None)


def refused(data: Data, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(data)


def augment(**changes: object) -> Augment:
    config = compose().augment
    for key, value in ({"crop": "none", "hflip": 0.0} | changes).items():
        assert hasattr(config, key)
        setattr(config, key, value)
    return config


def batches(
    images: ImageSet, data: Data, change: Augment, *, first_step: int = 0, batch_size: int = 4, seed: int = 0,
    image_size: int = SIDE, in_chans: int | None = None, num_classes: int = 3, label_smoothing: float = 0.1,
    rows: Tensor | slice = slice(None),
) -> Iterator[Batch]:  # fmt: skip
    return train_batches(
        images, data, change, image_size=image_size, in_chans=in_chans or images.channels, num_classes=num_classes,
        batch_size=batch_size, label_smoothing=label_smoothing, seed=seed, first_step=first_step, device=CPU,
        rows=rows,
    )  # fmt: skip
