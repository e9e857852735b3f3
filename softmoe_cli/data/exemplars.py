"""Exemplars: each of K images of another set is a class of its own, and the images of a class are views of that one.

Training images are the K images, of which every batch makes new views (`train_batches`). Validation and test images are
views that are made here, once: a function of the cut (`data.split_seed`), the part, the class and the view's number.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data.decode import squares
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.data.views import described, drawn_views, viewed
from softmoe_cli.errors import UsageError
from softmoe_cli.text import gibibytes

CHOICE, VALIDATION, TEST = range(3)
"""What chance is drawn for. As spawn keys of the seed they are never those that batches are drawn with."""
WITHOUT_THREADS = 2**15
"""The most numbers of the views that are made together: so few that torch starts no threads, which slow each other down
where several programs load their images at a time."""


def exemplars(source: Splits, data: Data) -> Splits:
    """`data.exemplars` training images of `source` as classes, and `data.views` views of each for validation and for
    test. Which images, in which order, depends on `data.split_seed` alone: fewer are the first of more.

    Raises:
        UsageError: the source has too few images, or the views do not fit into data.memory_gib.
    """
    assert data.exemplars is not None and data.strength is not None and data.views is not None
    train, side = source.train, source.train.side
    needed = data.exemplars * (1 + 2 * data.views) * train.channels * side**2
    if needed > data.memory_gib * 2**30:
        raise UsageError(
            f"data.views={data.views} of data.exemplars={data.exemplars:,} classes, for validation and again for test, "
            f"take {gibibytes(needed)}, more than data.memory_gib={data.memory_gib:g}; lower one of them, or raise that"
        )
    labels, images = _chosen(train, data)
    names = [
        f"{source.classes[label]} {hashlib.blake2b(image.numpy().tobytes(), digest_size=6).hexdigest()}"
        for label, image in zip(labels, images, strict=True)
    ]
    classes = torch.arange(len(images))

    def fixed(part: int) -> ImageSet:
        views = torch.cat(list(_fixed(images, data, part)))
        return ImageSet(classes.repeat(data.views or 0), views, side, train.channels)

    new = ImageSet(classes, images, side, train.channels, strength=data.strength)
    said = f"{described(data.strength)}; in training always new, {data.views} of each class for validation and for test"
    notes = source.notes | {"a view": said}
    return Splits(new, fixed(VALIDATION), fixed(TEST), names, notes)


def _chosen(train: ImageSet, data: Data) -> tuple[list[int], UInt8[Tensor, "k c s s"]]:
    """Labels and pixels of the first K different images of a random order: nobody could tell two equal ones apart."""
    assert data.exemplars is not None
    order = _chance(data, CHOICE).permutation(len(train))
    found: dict[bytes, tuple[int, Tensor]] = {}
    done = 0
    while done < len(order) and len(found) < data.exemplars:
        index = order[done : done + data.exemplars - len(found)]
        done += len(index)
        some = train.subset(index)
        if some.images is not None:
            pixels = torch.stack(list(some.images))
        else:
            assert some.files is not None
            pixels = squares(some.files, data)
        for label, image in zip(some.labels.tolist(), pixels, strict=True):
            found.setdefault(image.numpy().tobytes(), (label, image))
    if len(found) < data.exemplars:
        raise UsageError(
            f"data.exemplars={data.exemplars} is more than the {len(found):,} different training images of "
            f"data.source={data.source}; lower it"
        )
    labels, images = zip(*found.values(), strict=True)
    return list(labels), torch.stack(images)


def _fixed(images: UInt8[Tensor, "k c s s"], data: Data, part: int) -> Iterator[UInt8[Tensor, "b c s s"]]:
    """The first view of every class, then the second of every class, and so on."""
    assert data.views is not None and data.strength is not None
    together = max(1, WITHOUT_THREADS // images[0].numel())
    for view in range(data.views):
        for number, some in enumerate(images.split(together)):
            chance = torch.Generator().manual_seed(int(_chance(data, part, view, number).integers(2**63)))
            views = drawn_views(together, data.strength, chance)  # as many for the last, whatever the number of classes
            yield viewed(some, views.of(slice(len(some)), some.device))


def _chance(data: Data, *purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(data.split_seed, spawn_key=purpose))
