"""Labelled images, and which of them are held out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data.archives import Stored
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: decoded in memory, or (`images` is None) files that are decoded as they are asked for.

    Decoded images are squares of `side` pixels with `channels` channels. Where `strength` is a number, every training
    batch has new views of them, of that strength (`softmoe_cli/data/views.py`); who reads them otherwise sees the
    images themselves.
    """

    labels: Int64[Tensor, " n"]
    images: UInt8[Tensor, "n c s s"] | None
    side: int
    channels: int
    files: Stored | None = None
    strength: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "ImageSet":
        chosen = torch.as_tensor(index)
        images = None if self.images is None else self.images[chosen]
        files = None if self.files is None else self.files.subset(index)
        return replace(self, labels=self.labels[chosen], images=images, files=files)


@dataclass(frozen=True)
class Splits:
    """Training images, validation images for choices, test images for the one reading at the end."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    """Word -> what the header of a run says of the files."""
    test_is_cut: bool = False
    """Whether the test images are cut by `data.split_seed`, so that another cut has other ones."""

    def need(self, *parts: str) -> None:
        """Raises UsageError if one of the parts has no images, as in sets that are for evaluation only."""
        for part in parts:
            if not len(getattr(self, part)):
                raise UsageError(f"there are no {part} images: with data.test_fraction=1 all are test images")


def by_class(labels: Int64[Tensor, " n"]) -> list[np.ndarray]:
    """For each class that has images, ascending, their numbers, ascending: in one pass, however many classes."""
    order = labels.numpy().argsort(kind="stable")
    counts = np.bincount(labels.numpy())
    return np.split(order, counts[counts > 0].cumsum()[:-1])


def hold_out(
    labels: Int64[Tensor, " n"], fraction: float, seed: int, key: str, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: of every class the share `fraction`, rounded, at least one image.

    Raises:
        UsageError: a class with no image left for training.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    emptied = []
    for index in by_class(labels):
        count = max(1, round(len(index) * fraction))
        if count >= len(index):
            emptied.append((classes[int(labels[index[0]])], len(index)))
        held[rng.permutation(index)[:count]] = True
    if emptied:
        name, images = emptied[0]
        others = f" ({len(emptied) - 1} more classes have too few: {_some(emptied[1:])})" if emptied[1:] else ""
        rest = "" if key == "test_fraction" else " that are not for testing"
        raise UsageError(
            f"data.{key}={fraction:g} leaves no image of class {printable(name)} for training: it has {images} "
            f"in all{rest}{others}; add images (a class needs 3, or 2 beside test images of your own), take the class "
            "away, or bring train, val and test of your own, which nothing is taken from"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _some(emptied: list[tuple[str, int]]) -> str:
    return ", ".join(printable(name) for name, _ in emptied[:5]) + (", …" if len(emptied) > 5 else "")


def with_validation(train: ImageSet, test: ImageSet, classes: list[str], data: Data) -> Splits:
    kept, held = hold_out(train.labels, data.validation_fraction, data.split_seed, "validation_fraction", classes)
    return Splits(train.subset(kept), train.subset(held), test, classes)


def with_test(everything: ImageSet, classes: list[str], data: Data) -> Splits:
    if data.test_fraction == 1:
        nothing = everything.subset(np.arange(0))
        return Splits(nothing, nothing, everything, classes)
    kept, held = hold_out(everything.labels, data.test_fraction, data.split_seed, "test_fraction", classes)
    cut = with_validation(everything.subset(kept), everything.subset(held), classes, data)
    return replace(cut, test_is_cut=True)


def split(sets: dict[str, ImageSet], classes: list[str], data: Data) -> Splits:
    """Parts as they lie on disk -> those of a run.

    Raises:
        UsageError: a class with no image left for training.
    """
    if list(sets) == ["train", "val", "test"]:
        return Splits(sets["train"], sets["val"], sets["test"], classes)
    if list(sets) == ["train", "val"]:
        return with_validation(sets["train"], sets["val"], classes, data)
    return with_test(next(iter(sets.values())), classes, data)
