"""What the model sees, batch by batch.

Everything random about a training batch is a function of (seed, step): order, crop, flip, RandAugment, erasing, mixup.
A resumed run therefore sees the same batches bit for bit, with no state saved and any number of workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from timm.data import Mixup
from timm.data.mixup import one_hot
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from softmoe_cli.config import Augment, Data, Model
from softmoe_cli.data.decode import centre, opened, random_square
from softmoe_cli.data.pixels import (
    boxes,
    erased,
    mixed_images,
    normalise,
    pixel_statistics,
    randaugment,
    resize,
    resized_crop,
    shift_crop,
)
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.data.workers import by_workers


@dataclass(frozen=True)
class _Decoded(Dataset):
    """(step, list of indices) -> a decoded batch, in the worker that is asked."""

    images: ImageSet
    side: int
    crop_pct: float | None
    max_megapixels: float
    augment: Augment | None = None
    """The changes to training images that are made here, image by image, and not on whole batches."""
    from_file: bool = False
    seed: int = 0
    batch_size: int = 0
    """The size of the whole batch, of which `rows` are the images: seeds are drawn for all of it."""
    rows: Int64[Tensor, " r"] | slice = field(default_factory=lambda: slice(None))

    def __getitem__(self, asked: tuple[int, list[int]]) -> UInt8[Tensor, "b c s s"]:
        (step, index), files, change = asked, self.images.files, self.augment
        assert files is not None
        pictures = (opened(files, i, self.images.channels, self.max_megapixels) for i in index)
        if change is None or not _cuts_files(change, self.from_file):
            squares = [centre(picture, self.side, self.crop_pct) for picture in pictures]
        else:
            squares = []
            with torch.random.fork_rng(devices=[]):
                seeds = _seeds(self.batch_size, self.rows, _generator(self.seed, step, CUT))
                for picture, seed in zip(pictures, seeds.tolist(), strict=True):
                    torch.default_generator.manual_seed(seed)
                    squares.append(random_square(picture, self.side, change.area, change.hflip))
        batch: Tensor = default_collate(squares)  # a worker writes straight into memory that the run shares
        if change is not None and change.randaugment is not None:
            seeds = _seeds(self.batch_size, self.rows, _generator(self.seed, step))
            batch = randaugment(batch, change.randaugment, seeds)
        return batch


def _cuts_files(augment: Augment, from_file: bool) -> bool:
    return from_file and augment.crop == "resized"


def _decoded(
    decoded: _Decoded, steps: Iterator[tuple[int, Int64[Tensor, " b"]]], data: Data, device: torch.device
) -> Iterator[Tensor]:
    asked = ((step, index.tolist()) for step, index in steps)
    for batch in by_workers(decoded, asked, data, prefetch=data.prefetch, pinned=device.type == "cuda"):
        yield batch.to(device, non_blocking=True)


def _seed(seed: int, purpose: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, purpose, number)).generate_state(1, np.uint64)[0]) >> 1


ORDER, CHANGE, MIX, ERASE, CUT = range(5)


def _generator(seed: int, step: int, purpose: int = CHANGE) -> torch.Generator:
    """The generator that the changes of a batch are drawn from."""
    return torch.Generator().manual_seed(_seed(seed, purpose, step))


def _seeds(batch_size: int, rows: Int64[Tensor, " r"] | slice, rng: torch.Generator) -> Int64[Tensor, " r"]:
    """The seeds of the images `rows` of a batch: an image's seed does not depend on which others are asked for."""
    return torch.randint(2**62, (batch_size,), generator=rng)[rows]


def stream(length: int, batch_size: int, seed: int, first_step: int) -> Iterator[Int64[Tensor, " b"]]:
    """Indices of batch after batch: shuffled epochs laid end to end, each a function of (seed, epoch)."""
    epoch, order = -1, torch.empty(0)
    for step in range(first_step, 2**62):
        start, stop = step * batch_size, (step + 1) * batch_size
        pieces = []
        while start < stop:
            if start // length != epoch:
                epoch = start // length
                order = torch.randperm(length, generator=torch.Generator().manual_seed(_seed(seed, ORDER, epoch)))
            end = min(stop, (epoch + 1) * length)
            pieces.append(order[start - epoch * length : end - epoch * length])
            start = end
        yield torch.cat(pieces)


def train_batches(
    images: ImageSet,
    data: Data,
    augment: Augment,
    *,
    image_size: int,
    in_chans: int,
    num_classes: int,
    batch_size: int,
    label_smoothing: float,
    seed: int,
    first_step: int,
    device: torch.device,
    rows: Int64[Tensor, " r"] | slice = slice(None),
) -> Iterator[tuple[Float[Tensor, "r c s s"], Float[Tensor, "r classes"]]]:
    """Endless batches of augmented, normalised images and the shares of each class in their targets.

    `rows` are the wanted positions in a batch, ascending: only these images, and those that are mixed with them, are
    read. What is done to an image does not depend on `rows`.
    """
    mixup = None
    made: Int64[Tensor, " m"] | slice = rows
    kept: Int64[Tensor, " r"] | slice = slice(None)
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        made, kept = _with_partners(rows, batch_size)
    off = label_smoothing / num_classes
    labels = images.labels.to(device)
    mean, std = pixel_statistics(data, device)
    black = (-mean / std).expand(in_chans)
    side = image_size if data.from_file else images.side
    decoded = _Decoded(
        images, side, data.crop_pct, data.max_megapixels, augment, data.from_file, seed, batch_size, made
    )
    for step, (index, raw) in enumerate(_raw(decoded, data, first_step, device), start=first_step):
        rng = _generator(seed, step)
        if augment.randaugment is not None:
            seeds = _seeds(batch_size, made, rng)
            if images.images is not None:  # else this was done while decoding, with the same seeds
                raw = randaugment(raw, augment.randaugment, seeds)
        x = normalise(raw, in_chans, mean, std)
        if _cuts_files(augment, data.from_file):
            pass  # already cut and mirrored while decoding
        elif augment.crop == "resized":
            x = resized_crop(x, boxes(batch_size, augment.area, rng)[made].to(device), image_size)
        else:
            reach = round(augment.shift * x.shape[-1]) if augment.crop == "shift" else 0
            if reach:
                shift = torch.randint(-reach, reach + 1, (2, batch_size), generator=rng)[:, made]
                x = shift_crop(x, shift.to(device), black)
            x = resize(x, image_size)
        if augment.hflip and not _cuts_files(augment, data.from_file):
            flip = (torch.rand(batch_size, generator=rng) < augment.hflip)[made].to(device)
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        if augment.erase:
            x = erased(augment.erase, x, _seeds(batch_size, made, _generator(seed, step, ERASE)))
        if mixup is None:
            yield x, one_hot(labels[index], num_classes, 1 - label_smoothing + off, off)
        else:
            mixed, targets = mixed_images(mixup, x, labels[index], _seed(seed, MIX, step))
            yield mixed[kept], targets[kept]


def _with_partners(
    rows: Int64[Tensor, " r"] | slice, batch_size: int
) -> tuple[Int64[Tensor, " m"] | slice, Int64[Tensor, " r"] | slice]:
    """Rows and those that timm's mixup mixes them with, and which of these are the rows. Image i meets image
    b - 1 - i, so that rows with their partners, in their order, are mixed among themselves as the whole batch is."""
    if isinstance(rows, slice):
        return rows, slice(None)
    both = torch.cat([rows, batch_size - 1 - rows]).unique()
    return both, torch.searchsorted(both, rows)


def _raw(
    decoded: _Decoded, data: Data, first_step: int, device: torch.device
) -> Iterator[tuple[Int64[Tensor, " r"], UInt8[Tensor, "r c s s"]]]:
    images, seed = decoded.images, decoded.seed
    order = (index[decoded.rows] for index in stream(len(images), decoded.batch_size, seed, first_step))
    if images.images is not None:
        pixels = images.images.to(device)
        for index in order:
            moved = index.to(device)
            yield moved, pixels[moved]
    else:
        again = (index[decoded.rows] for index in stream(len(images), decoded.batch_size, seed, first_step))
        for index, batch in zip(
            order, _decoded(decoded, enumerate(again, start=first_step), data, device), strict=False
        ):
            yield index.to(device), batch


def eval_batches(
    images: ImageSet,
    data: Data,
    *,
    image_size: int,
    in_chans: int,
    batch_size: int,
    device: torch.device,
    turns: Sequence[int] | None = None,
) -> Iterator[tuple[Float[Tensor, "b c s s"], Int64[Tensor, " b"]]]:
    """Every image exactly once, in order, as it is; the last batch is short where the sizes do not divide. `turns`:
    only the batches of these numbers."""
    mean, std = pixel_statistics(data, device)
    indices = torch.arange(len(images)).split(batch_size)
    if turns is not None:
        indices = tuple(indices[turn] for turn in turns)
    if images.images is not None:
        raws: Iterator[Tensor] = (images.images[index] for index in indices)
    else:
        side = image_size if data.from_file else images.side
        raws = _decoded(_Decoded(images, side, data.crop_pct, data.max_megapixels), enumerate(indices), data, device)
    for index, raw in zip(indices, raws, strict=True):
        x = resize(normalise(raw.to(device), in_chans, mean, std), image_size)
        yield x, images.labels[index].to(device)


def first_images(
    images: ImageSet, data: Data, model: Model, count: int
) -> tuple[Float[Tensor, "b c s s"], Int64[Tensor, " b"]]:
    """The first `count` images, or all where there are fewer, as a model sees them in evaluation; and their labels."""
    size, channels = model.image_size, model.in_chans
    cpu = torch.device("cpu")
    return next(eval_batches(images, data, image_size=size, in_chans=channels, batch_size=count, device=cpu))
