"""Labelled images, divided into those that are trained on and those that are held out."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.cache import Mapped
from softmoe_cli.data.cut import cut
from softmoe_cli.errors import UsageError


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: decoded, in memory or in a file, or (`images` is None) files that are decoded as they are asked
    for.

    Decoded images are squares of `side` pixels with `channels` channels. Where `strength` is a number, every training
    batch has new views of them, of that strength (`softmoe_cli/data/views.py`); who reads them otherwise sees the
    images themselves.
    """

    labels: Int64[Tensor, " n"]
    images: UInt8[Tensor, "n c s s"] | Mapped | None
    side: int
    channels: int
    files: Stored | None = None
    strength: float | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "ImageSet":
        chosen = torch.as_tensor(index)
        images = self.images.subset(index) if isinstance(self.images, Mapped) else self.images
        images = images[chosen] if isinstance(images, Tensor) else images
        files = None if self.files is None else self.files.subset(index)
        return replace(self, labels=self.labels[chosen], images=images, files=files)

    def spread(self, count: int) -> "ImageSet":
        """So many of its images, each once, spread evenly from the first to the last; all where there are no more."""
        return self.subset(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64))


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


def split(sets: dict[str, ImageSet], classes: list[str], data: Data) -> Splits:
    """Parts as they lie on disk -> those of a run.

    Raises:
        UsageError: a class with no image left for training.
    """
    found = cut({part: images.labels.numpy() for part, images in sets.items()}, classes, data)
    parts = {name: sets[part] if index is None else sets[part].subset(index) for name, (part, index) in found.items()}
    train, validation, test = (parts[name] for name in ("train", "validation", "test"))
    return Splits(train, validation, test, classes, test_is_cut=len(sets) == 1 and data.test_fraction < 1)
