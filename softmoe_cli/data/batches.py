"""What the model sees, batch by batch.

Everything random about a training batch is a function of (seed, step): order, views, crop, flip, RandAugment, erasing,
mixup. A resumed run therefore sees the same batches bit for bit, with no state saved and any number of workers.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from timm.data.mixup import Mixup, one_hot
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from softmoe_cli.config.data import Data
from softmoe_cli.config.model import Model
from softmoe_cli.config.recipe import Augment
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.decode import centre, random_square
from softmoe_cli.data.mix import MixedSet
from softmoe_cli.data.order import CHANGE, CUT, ERASE, MIX, VIEW, TaskDraws, mixed_stream, purpose_seed, stream
from softmoe_cli.data.picture import opened
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
from softmoe_cli.data.views import drawn_views, viewed
from softmoe_cli.data.workers import by_workers


class Batch(NamedTuple):
    """Images as a model sees them, what is right for them, and where the data are a mix, the task of each."""

    images: Float[Tensor, "b c s s"]
    labels: Tensor
    """Class numbers, or in training the shares of each class."""
    task: Int64[Tensor, " b"] | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return (self.images,) if self.task is None else (self.images, self.task)


@dataclass(frozen=True)
class _Changes:
    """What is done to training images. A batch has `batch_size` images, and chance is drawn for all of them; only
    `rows` of them are made.

    `at_the_file`: images are cut and mirrored where they are decoded, each from its whole file; otherwise the decoded
    squares are, batch by batch.
    """

    augment: Augment
    at_the_file: bool
    seed: int
    batch_size: int
    rows: Int64[Tensor, " r"] | slice

    def chance(self, step: int, purpose: int) -> torch.Generator:
        """The generator that is drawn from for one purpose in one batch."""
        return torch.Generator().manual_seed(purpose_seed(self.seed, purpose, step))

    def seeds(self, chance: torch.Generator) -> Int64[Tensor, " r"]:
        """A seed for each image: it does not depend on which others are made."""
        return torch.randint(2**62, (self.batch_size,), generator=chance)[self.rows]


@dataclass(frozen=True)
class _Decoder(Dataset):
    """(step, list of indices) -> their images' pixels, in the worker that is asked. Without `changes` the centres."""

    files: Stored
    channels: int
    side: int
    crop_pct: float | None
    max_megapixels: float
    changes: _Changes | None

    def __getitem__(self, asked: tuple[int, list[int]]) -> UInt8[Tensor, "b c s s"]:
        (step, index), changes = asked, self.changes
        pictures = (opened(self.files, i, self.channels, self.max_megapixels) for i in index)
        if changes is None or not changes.at_the_file:
            squares = [centre(picture, self.side, self.crop_pct) for picture in pictures]
        else:
            squares = []
            with torch.random.fork_rng(devices=[]):
                seeds = changes.seeds(changes.chance(step, CUT))
                for picture, seed in zip(pictures, seeds.tolist(), strict=True):
                    torch.default_generator.manual_seed(seed)
                    squares.append(random_square(picture, self.side, changes.augment.area, changes.augment.hflip))
        batch: Tensor = default_collate(squares)  # a worker writes straight into memory that the run shares
        if changes is not None and changes.augment.randaugment is not None:
            batch = randaugment(batch, changes.augment.randaugment, changes.seeds(changes.chance(step, CHANGE)))
        return batch


def _pixels_of_files(
    images: ImageSet,
    data: Data,
    image_size: int,
    order: Iterable[tuple[int, Int64[Tensor, " b"]]],
    changes: _Changes | None,
    device: torch.device,
) -> Iterator[UInt8[Tensor, "b c s s"]]:
    """The pixels of each batch of `order` (steps with indices), which is asked for ahead of time."""
    assert images.files is not None
    side = image_size if data.from_file else images.side
    decoder = _Decoder(images.files, images.channels, side, data.crop_pct, data.max_megapixels, changes)
    asked = ((step, index.tolist()) for step, index in order)
    for batch in by_workers(decoder, asked, data, prefetch=data.prefetch, pinned=device.type == "cuda"):
        yield batch.to(device, non_blocking=True)


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
) -> Iterator[Batch]:
    """Endless batches of augmented, normalised images and the shares of each class in their targets; of a mix with the
    task of each image.

    `rows` are the wanted positions in a batch, ascending: only these images, and those that are mixed with them, are
    read. What is done to an image does not depend on `rows`.
    """
    mixup = None
    made: Int64[Tensor, " m"] | slice = rows
    kept: Int64[Tensor, " r"] | slice = slice(None)
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        made, kept = _with_partners(rows, batch_size)
    changes = _Changes(augment, data.from_file and augment.crop == "resized", seed, batch_size, made)
    if isinstance(images, MixedSet):
        draws = TaskDraws(images, data.temperature, batch_size, seed)
        order = enumerate((index[made] for index in mixed_stream(draws, seed, first_step)), start=first_step)
        yield from _mixed_batches(images, data, order, changes, (in_chans, image_size), label_smoothing, device)
        return
    off = label_smoothing / num_classes
    labels, pixels = images.labels.to(device), _Pixels.of(data, in_chans, image_size, device)
    order = enumerate((index[made] for index in stream(len(images), batch_size, seed, first_step)), start=first_step)
    for step, index, raw in _raw(images, data, image_size, order, changes, device):
        if images.strength is not None:
            views = drawn_views(batch_size, images.strength, changes.chance(step, VIEW))
            raw = viewed(raw, views.of(made, device))
        x = _changed(raw, pixels, changes, step, from_memory=images.images is not None)
        if mixup is None:
            yield Batch(x, one_hot(labels[index], num_classes, 1 - label_smoothing + off, off))
        else:
            mixed, targets = mixed_images(mixup, x, labels[index], purpose_seed(seed, MIX, step))
            yield Batch(mixed[kept], targets[kept])


@dataclass(frozen=True)
class _Pixels:
    """How a model takes the pixels of one set."""

    mean: Float[Tensor, " m"]
    std: Float[Tensor, " m"]
    in_chans: int
    image_size: int

    @classmethod
    def of(cls, data: Data, in_chans: int, image_size: int, device: torch.device) -> "_Pixels":
        return cls(*pixel_statistics(data, device), in_chans, image_size)

    def seen(self, raw: UInt8[Tensor, "b c s s"]) -> Float[Tensor, "b c2 s s"]:
        """Normalised, of the size that they have."""
        return normalise(raw, self.in_chans, self.mean, self.std)


def _changed(
    raw: UInt8[Tensor, "r c s s"], pixels: _Pixels, changes: _Changes, step: int, *, from_memory: bool
) -> Float[Tensor, "r c2 t t"]:
    """The images of one step, changed as training sees them."""
    augment, chance = changes.augment, changes.chance(step, CHANGE)
    if augment.randaugment is not None:
        seeds = changes.seeds(chance)
        if from_memory:  # else this was done while decoding, with the same seeds
            raw = randaugment(raw, augment.randaugment, seeds)
    x = pixels.seen(raw)
    if not changes.at_the_file:
        black = (-pixels.mean / pixels.std).expand(pixels.in_chans)
        x = _cut_and_mirrored(x, changes, pixels.image_size, black, chance)
    if augment.erase:
        x = erased(augment.erase, x, changes.seeds(changes.chance(step, ERASE)))
    return x


def _mixed_batches(
    images: MixedSet,
    data: Data,
    order: Iterable[tuple[int, Int64[Tensor, " r"]]],
    changes: _Changes,
    size: tuple[int, int],
    label_smoothing: float,
    device: torch.device,
) -> Iterator[Batch]:
    """Batches of a mix: each set's images normalised as its own, and changed by no more than is natural for it.
    Smoothing stays among the classes of an image's task."""
    sets, (in_chans, image_size) = data.of_sets(), size
    pixels = [_Pixels.of(own, in_chans, image_size, device) for own in sets]
    kinds = [_natural(changes.augment, own) for own in sets]
    answers = torch.block_diag(*(torch.ones(1, own.num_classes or 0) for own in sets))
    on, rows = 1 - label_smoothing, torch.arange(changes.batch_size)[changes.rows]
    for step, index in order:
        labels, tasks = images.labels[index], images.tasks[index]
        x = torch.empty(len(index), in_chans, image_size, image_size, device=device)
        for task, part in enumerate(images.parts):
            here = tasks == task
            if here.any():
                assert part.images is not None
                raw = part.images[images.places[index[here]]].to(device)
                own = replace(changes, augment=kinds[task], rows=rows[here])
                x[here.to(device)] = _changed(raw, pixels[task], own, step, from_memory=True)
        among = answers[tasks]
        targets = among * (label_smoothing / among.sum(dim=1, keepdim=True))
        targets.scatter_add_(1, labels[:, None], torch.full((len(labels), 1), on))
        yield Batch(x, targets.to(device), tasks.to(device))


def _natural(augment: Augment, own: Data) -> Augment:
    """What is done to images of one set of a mix: no more mirrored or moved than would still be natural."""
    return replace(augment, hflip=min(augment.hflip, own.hflip), shift=min(augment.shift, own.shift))


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
    images: ImageSet,
    data: Data,
    image_size: int,
    order: Iterable[tuple[int, Int64[Tensor, " r"]]],
    changes: _Changes,
    device: torch.device,
) -> Iterator[tuple[int, Int64[Tensor, " r"], UInt8[Tensor, "r c s s"]]]:
    """Step, indices and pixels of each batch of `order`."""
    if images.images is not None:
        decoded = images.images.to(device) if isinstance(images.images, Tensor) else images.images
        for step, index in order:
            moved = index.to(device)
            yield step, moved, decoded[moved].to(device)
    else:
        order, ahead = tee(order)
        pixels = _pixels_of_files(images, data, image_size, ahead, changes, device)
        for (step, index), batch in zip(order, pixels, strict=True):
            yield step, index.to(device), batch


def _cut_and_mirrored(
    x: Float[Tensor, "b c s s"],
    changes: _Changes,
    image_size: int,
    black: Float[Tensor, " c"],
    chance: torch.Generator,
) -> Float[Tensor, "b c t t"]:
    """Each image's own part of the square, at the model's size, perhaps mirrored."""
    augment, size, rows = changes.augment, changes.batch_size, changes.rows
    if augment.crop == "resized":
        x = resized_crop(x, boxes(size, augment.area, chance)[rows].to(x.device), image_size)
    else:
        reach = round(augment.shift * x.shape[-1]) if augment.crop == "shift" else 0
        if reach:
            shift = torch.randint(-reach, reach + 1, (2, size), generator=chance)[:, rows]
            x = shift_crop(x, shift.to(x.device), black)
        x = resize(x, image_size)
    if augment.hflip:
        flip = (torch.rand(size, generator=chance) < augment.hflip)[rows].to(x.device)
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    return x


def eval_batches(
    images: ImageSet,
    data: Data,
    *,
    image_size: int,
    in_chans: int,
    batch_size: int,
    device: torch.device,
    turns: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Every image exactly once, in order, as it is; the last batch is short where the sizes do not divide. `turns`:
    only the batches of these numbers."""
    indices = torch.arange(len(images)).split(batch_size)
    if turns is not None:
        indices = tuple(indices[turn] for turn in turns)
    if isinstance(images, MixedSet):
        each = [_Pixels.of(own, in_chans, image_size, device) for own in data.of_sets()]
        for index in indices:
            yield _mixed_as_it_is(images, index, each, device)
        return
    pixels = _Pixels.of(data, in_chans, image_size, device)
    if images.images is not None:
        decoded = images.images
        raws: Iterator[Tensor] = (decoded[index] for index in indices)
    else:
        raws = _pixels_of_files(images, data, image_size, enumerate(indices), None, device)
    for index, raw in zip(indices, raws, strict=True):
        yield Batch(resize(pixels.seen(raw.to(device)), image_size), images.labels[index].to(device))


def _mixed_as_it_is(
    images: MixedSet, index: Int64[Tensor, " b"], each: Sequence[_Pixels], device: torch.device
) -> Batch:
    """A batch of a mix as evaluation sees it. `each`: how the model takes the pixels of each set."""
    tasks, places = images.tasks[index], images.places[index]
    x = torch.empty(len(index), each[0].in_chans, *[each[0].image_size] * 2, device=device)
    for task, (part, pixels) in enumerate(zip(images.parts, each, strict=True)):
        here = tasks == task
        if here.any():
            assert part.images is not None
            x[here.to(device)] = resize(pixels.seen(part.images[places[here]].to(device)), pixels.image_size)
    return Batch(x, images.labels[index].to(device), tasks.to(device))


def first_images(images: ImageSet, data: Data, model: Model, count: int) -> Batch:
    """The first `count` images, or all where there are fewer, as a model sees them in evaluation; and their labels."""
    size, channels = model.image_size, model.in_chans
    cpu = torch.device("cpu")
    return next(eval_batches(images, data, image_size=size, in_chans=channels, batch_size=count, device=cpu))
