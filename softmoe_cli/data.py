"""Images and labels: embedded, from torchvision, from files; what is done to them on the way to the model.

Everything random about a training batch is a function of (seed, step): order, crop, flip, RandAugment, erasing, mixup.
A resumed run therefore sees the same batches bit for bit, with no state saved and any number of workers.
"""

import atexit
import errno
import functools
import gzip
import hashlib
import io
import math
import multiprocessing
import os
import random
import resource
import signal
import threading
import urllib.error
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup
from timm.data.mixup import one_hot
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torchvision.transforms import RandomResizedCrop

from softmoe_cli.archives import Stored
from softmoe_cli.config import Augment, Data, Model
from softmoe_cli.contents import digest
from softmoe_cli.device import cores
from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.listing import Listing, listing
from softmoe_cli.text import gibibytes, printable

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Labelled images: decoded in memory, or (`images` is None) files that are decoded as they are asked for.

    Decoded images are squares of `side` pixels with `channels` channels.
    """

    labels: Int64[Tensor, " n"]
    images: UInt8[Tensor, "n c s s"] | None
    side: int
    channels: int
    files: Stored | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "ImageSet":
        chosen = torch.as_tensor(index)
        images = None if self.images is None else self.images[chosen]
        files = None if self.files is None else self.files.subset(index)
        return ImageSet(self.labels[chosen], images, self.side, self.channels, files)


@dataclass(frozen=True)
class Splits:
    """Training images, validation images for choices, test images for the one reading at the end."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]
    notes: dict[str, str] = field(default_factory=dict)
    """Word -> what the header of a run says of the files."""

    def need(self, *parts: str) -> None:
        """Raises UsageError when a part has no images, as those have that are for evaluation only."""
        for part in parts:
            if not len(getattr(self, part)):
                raise UsageError(f"there are no {part} images: with data.test_fraction=1 all are test images")


def num_classes(data: Data, splits: Splits) -> int:
    """The width of the head: as the configuration says, else as many as the images have."""
    return data.num_classes or len(splits.classes)


def load(data: Data) -> Splits:
    """Reads the set that `data` names and cuts it.

    Raises:
        UsageError: files that are missing, unreadable or damaged, or too few of them; the message names them.
    """
    readers = {"digits": _digits, "fashion_mnist": _fashion_mnist, "cifar10": _cifar, "cifar100": _cifar}
    splits = _stored(data) if data.format is not None else readers[data.name](data)
    if data.num_classes is not None and data.num_classes < len(splits.classes):
        raise UsageError(f"data.num_classes={data.num_classes} is less than the {len(splits.classes)} classes found")
    return splits


def identity(data: Data) -> str | None:
    """A digest of the images and of what decides their classes; None for the sets that are the same everywhere.

    Raises:
        UsageError: the files cannot be used.
    """
    if data.name == "fashion_mnist" and data.format is None:  # files of these names hold other sets too
        return hashlib.sha256(b"".join(array.tobytes() for array in _idx_arrays(data))).hexdigest()
    if data.format is None:
        return None
    listed = usable(data)
    return digest(listed.parts, listed.classes)


# --- splits -----------------------------------------------------------------------------------------------------------


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
    return ", ".join(printable(name) for name, _ in emptied[:5]) + ", …" * (len(emptied) > 5)


def _with_validation(train: ImageSet, test: ImageSet, classes: list[str], data: Data) -> Splits:
    kept, held = hold_out(train.labels, data.validation_fraction, data.split_seed, "validation_fraction", classes)
    return Splits(train.subset(kept), train.subset(held), test, classes)


def _with_test(everything: ImageSet, classes: list[str], data: Data) -> Splits:
    if data.test_fraction == 1:
        nothing = everything.subset(np.arange(0))
        return Splits(nothing, nothing, everything, classes)
    kept, held = hold_out(everything.labels, data.test_fraction, data.split_seed, "test_fraction", classes)
    return _with_validation(everything.subset(kept), everything.subset(held), classes, data)


# --- the sets ---------------------------------------------------------------------------------------------------------


def _digits(data: Data) -> Splits:
    """The table that scikit-learn ships: 64 pixels and the digit in a row. To import it for this takes a second."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations is not None
    with gzip.open(Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", "rt") as rows:
        table = np.loadtxt(rows, delimiter=",")
    pixels = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0..16 in the source
    images = _convert(torch.from_numpy(pixels), data.channels)
    labels = torch.from_numpy(table[:, -1]).long()
    return _with_test(ImageSet(labels, images, 8, data.channels), [str(i) for i in range(10)], data)


def _convert(images: UInt8[Tensor, "n c s s"], channels: int) -> UInt8[Tensor, "n c2 s s"]:
    """Grey repeated to colour, or colour to luma (ITU-R 601, as PIL does)."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True).round().to(torch.uint8)


def _fashion_mnist(data: Data) -> Splits:
    arrays = [torch.from_numpy(array) for array in _idx_arrays(data)]
    train, test = (
        ImageSet(arrays[i + 1].long(), _convert(arrays[i][:, None], data.channels), 28, data.channels) for i in (0, 2)
    )
    return _with_validation(train, test, list(FASHION_CLASSES), data)


IDX_NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def _idx_arrays(data: Data) -> list[np.ndarray]:
    """Training images and labels, test images and labels.

    Raises:
        UsageError: other files by their names.
    """
    paths = _idx_paths(data)
    if len(paths) < len(IDX_NAMES):
        said = f"{', '.join(IDX_NAMES)} (also with .gz); Debian's dataset-fashion-mnist has them"
        _download("FashionMNIST", data, said)
        paths = _idx_paths(data)
    arrays = [read_idx(path) for path in paths]
    for i in (0, 2):
        images, labels = arrays[i : i + 2]
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not labels.size or labels.max() > 9:
            raise UsageError(
                f"{paths[i]} and {paths[i + 1].name} are not images of 28x28 pixels, each with a label from 0 to 9: "
                f"they have shapes {images.shape} and {labels.shape}"
            )
    return arrays


def _idx_paths(data: Data) -> list[Path]:
    folders = [Path(data.root), Path(data.root) / "FashionMNIST" / "raw", DEBIAN_FASHION]
    return [path for name in IDX_NAMES if (path := _first_existing(folders, name)) is not None]


def is_here(data: Data) -> bool:
    """Whether a set can be read as it lies there, with nothing fetched."""
    if data.format is not None or data.name == "digits":
        return True
    if data.name == "fashion_mnist":
        return len(_idx_paths(data)) == len(IDX_NAMES)
    return _cifar_part(data, train=False) is not None


def _first_existing(folders: list[Path], name: str) -> Path | None:
    candidates = [folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


LARGEST_IDX = 2**31
"""Bytes: Fashion-MNIST's largest file has 47 million, and what is gzipped can be a thousand times as large."""


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


def _cifar(data: Data) -> Splits:
    if _cifar_part(data, train=False) is None:
        _download(CIFAR[data.name][0], data, f"the folder {CIFAR[data.name][1]}")
    parts = [_cifar_part(data, train=part) for part in (True, False)]
    train, test = (
        ImageSet(
            torch.tensor(part.targets),
            _convert(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), data.channels),
            32,
            data.channels,
        )
        for part in parts
    )
    return _with_validation(train, test, list(parts[0].classes), data)


CIFAR = {"cifar10": ("CIFAR10", "cifar-10-batches-py"), "cifar100": ("CIFAR100", "cifar-100-python")}
"""torchvision's name, and the folder."""


def _cifar_part(data: Data, *, train: bool) -> Any:
    """torchvision holds every file against its known MD5 before it unpickles anything; None: one is not there, or
    another."""
    from torchvision import datasets

    try:
        return getattr(datasets, CIFAR[data.name][0])(data.root, train=train, download=False)
    except RuntimeError:
        return None


def _download(kind: str, data: Data, expected: str) -> None:
    from torchvision import datasets

    print(f"downloading {kind} to {data.root}", flush=True)
    try:
        getattr(datasets, kind)(data.root, download=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UsageError(
            f"data={data.name} is not in data.root={data.root} and cannot be downloaded "
            f"({first_line(error)}); put there {expected}"
        ) from error


# --- files ------------------------------------------------------------------------------------------------------------


def _stored(data: Data) -> Splits:
    """train, val and test as they are; or train and val; or one set, which is split.

    With train and val alone, val is the test set, as ImageNet's is in practice, and validation images are held out of
    train, so that nothing is chosen on what is reported. Files lie class by class; validation and test images come in
    an order drawn once for all runs, so that the first batch, and every group of images, has many classes.
    """
    listed = usable(data)
    total = sum(len(labels) for _, labels in listed.parts.values())
    in_memory = not data.from_file and total * data.channels * data.image_size**2 <= data.memory_gib * 2**30
    sets = {part: _image_set(stored, labels, data, in_memory) for part, (stored, labels) in listed.parts.items()}
    splits = split(sets, listed.classes, data)

    def mixed(images: ImageSet) -> ImageSet:
        return images.subset(np.random.default_rng(0).permutation(len(images)))

    return replace(splits, validation=mixed(splits.validation), test=mixed(splits.test), notes=listed.notes)


def split(sets: dict[str, ImageSet], classes: list[str], data: Data) -> Splits:
    """Parts as they lie on disk -> those of a run.

    Raises:
        UsageError: a class with no image left for training.
    """
    if list(sets) == ["train", "val", "test"]:
        return Splits(sets["train"], sets["val"], sets["test"], classes)
    if list(sets) == ["train", "val"]:
        return _with_validation(sets["train"], sets["val"], classes, data)
    return _with_test(next(iter(sets.values())), classes, data)


def usable(data: Data) -> Listing:
    """What there is to train on or to evaluate.

    Raises:
        UsageError: the files are no such set.
    """
    found = listing(data)
    if found.faults:
        raise UsageError(found.faults[0])
    return found


def _image_set(stored: Stored, labels: np.ndarray, data: Data, in_memory: bool) -> ImageSet:
    images = None
    if in_memory:
        with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
            decoded = pool.map(
                lambda i: centre(opened(stored, i, data.channels, data.max_megapixels), data.image_size, data.crop_pct),
                range(len(stored)),
            )
            images = torch.stack(list(decoded))
    return ImageSet(torch.from_numpy(labels), images, data.image_size, data.channels, stored)


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What may be decoded, whatever a file is called: Pillow knows others, of which it has programs run (PostScript)."""


Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which nobody could raise: ours is data.max_megapixels


def opened(stored: Stored, i: int, channels: int, max_megapixels: float) -> Image.Image:
    """Image i, decoded, grey or RGB.

    Raises:
        UsageError: it is no image, is cut short, too large, or cannot be read.
    """
    try:
        with Image.open(io.BytesIO(stored.read(i)), formats=FORMATS) as image:
            if image.width * image.height > max_megapixels * 1e6:  # before anything is decoded
                raise UsageError(
                    f"{stored.place(i)} is {image.width:,} x {image.height:,} pixels, and a few bytes can say that; if "
                    f"it is right, raise data.max_megapixels={max_megapixels:g}"
                )
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels have more than 8 bits; convert it to 8 bits a channel first")
            mode = "L" if channels == 1 else "RGB"
            image.load()
            return image if image.mode == mode else image.convert(mode)
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{stored.place(i)} is not an image that can be read: damaged, or none of {', '.join(FORMATS)}"
        ) from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise UsageError(f"{stored.place(i)} is not an image that can be read: {error}") from error


MOST_RESIZED = 10**8
"""Pixels."""


def centre(image: Image.Image, side: int, crop_pct: float | None) -> UInt8[Tensor, "c s s"]:
    """The centre square of an image, `side` pixels large (bicubic, antialiased).

    With crop_pct, timm's evaluation transform: the shorter side becomes floor(side / crop_pct) pixels, and of that the
    centre is kept.
    """
    width, height = image.size
    if crop_pct is None:
        cut = min(width, height)
        left, top = (width - cut) / 2, (height - cut) / 2
        return _pixels(image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut)))
    shorter = math.floor(side / crop_pct)
    w, h = (int(shorter * length / min(width, height)) for length in (width, height))
    if w * h > MOST_RESIZED:  # a line of pixels: what is far from its centre is cut off before, not after
        x, y = (max(0, length - 8 * min(width, height)) // 2 for length in (width, height))
        return centre(image.crop((x, y, width - x, height - y)), side, crop_pct)
    x, y = round((w - side) / 2), round((h - side) / 2)
    return _pixels(image.resize((w, h), Image.Resampling.BICUBIC).crop((x, y, x + side, y + side)))


def random_square(image: Image.Image, side: int, area: float, hflip: float) -> UInt8[Tensor, "c s s"]:
    """timm's training transform: a random part of random area and aspect, resized (bicubic, antialiased), perhaps
    mirrored. It draws from torch's own random state."""
    top, left, height, width = RandomResizedCrop.get_params(image, [area, 1.0], [3 / 4, 4 / 3])
    square = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    if hflip and float(torch.rand(())) < hflip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(square)


def _pixels(image: Image.Image) -> UInt8[Tensor, "c s s"]:
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


@dataclass(frozen=True)
class _Decoded(Dataset):
    """(step, list of indices) -> a decoded batch, in the worker that is asked."""

    images: ImageSet
    side: int
    crop_pct: float | None
    max_megapixels: float
    augment: Augment | None = None
    """What is done to training images here, and not to whole batches."""
    from_file: bool = False
    seed: int = 0
    batch_size: int = 0
    """Of the whole batch, of which the images are `rows`: seeds are drawn for all of it."""
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
        batch: Tensor = default_collate(squares)  # in a worker: straight into memory that the run shares
        if change is not None and change.randaugment is not None:
            seeds = _seeds(self.batch_size, self.rows, _generator(self.seed, step))
            batch = _randaugment(batch, change.randaugment, seeds)
        return batch


def _cuts_files(augment: Augment, from_file: bool) -> bool:
    return from_file and augment.crop == "resized"


def _decoded(
    decoded: _Decoded, steps: Iterator[tuple[int, Int64[Tensor, " b"]]], data: Data, device: torch.device
) -> Iterator[Tensor]:
    asked = ((step, index.tolist()) for step, index in steps)
    for batch in by_workers(decoded, asked, data, prefetch=data.prefetch, pinned=device.type == "cuda"):
        yield batch.to(device, non_blocking=True)


# --- processes that decode --------------------------------------------------------------------------------------------


class WorkersError(RunError):
    """What decodes images cannot go on, for a reason that is not in the images. The model is as it was."""


class _Answers(Dataset):
    """Another set's items, each as (item, None) or as (None, why there is none)."""

    def __init__(self, items: Dataset) -> None:
        self._items = items

    def __getitem__(self, asked: Any) -> tuple[Any, UsageError | RunError | None]:
        try:
            item = self._items[asked]
            if isinstance(item, Tensor) and get_worker_info() is not None:
                item.share_memory_()  # here, where it can still be said that it cannot: a queue would lose the item
            return item, None
        except UsageError as error:
            return None, error
        except MemoryError:
            return None, WorkersError(f"memory ran out where images are decoded; {FEWER}")
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return None, WorkersError(_no_shared_memory(first_line(error)))


FEWER = "lower data.workers, data.prefetch or the batch size, and type the same command to go on"


def _no_shared_memory(why: str) -> str:
    return f"there is no shared memory (/dev/shm) left for decoded images ({why}); make it larger, {FEWER}"


def by_workers(
    items: Dataset, order: Iterable[Any], data: Data, *, prefetch: int, pinned: bool = False
) -> Iterator[Any]:
    """`items[asked]` for each of `order`, computed in data.workers processes ahead of time, or here where that is 0.

    However this iterator ends, its processes end with it, or with `end_workers`.

    Raises:
        UsageError, RunError: as an item's own computation raised it.
        WorkersError: a process was killed, or cannot be started or talked to.
    """
    count = cores() if data.workers is None else data.workers
    loader = DataLoader(
        _Answers(items),
        sampler=order,
        batch_size=None,
        num_workers=count,
        prefetch_factor=prefetch if count else None,
        pin_memory=pinned,
        generator=torch.Generator(),  # or the loader would draw a seed from the model's random state
        worker_init_fn=_prepare_worker,
    )
    others = set(multiprocessing.active_children())
    own: list[Any] = []
    answers: Iterator[Any] | None = None
    try:
        try:
            answers = _started(loader)
        finally:  # some of them, where not all could be
            own = [process for process in multiprocessing.active_children() if process not in others]
            _working.update(own)
            _end_with(os.getpid())
        for item, fault in answers:
            if fault is not None:
                raise fault
            yield item
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        why = _why(error, own, count)
        if why is None:
            raise
        raise WorkersError(why) from error
    finally:
        answers = None  # with which torch asks them to end, unless an exception keeps it
        _end(own)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator. torch has the end of a worker raise an error wherever the main process happens to be, in
    the middle of an update too; it is enough to hear of it where the next item is asked for."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _why(error: Exception, workers: list[Any], count: int) -> str | None:
    """What happened to the processes that decode; None: nothing, the error is another."""
    if not isinstance(error, RuntimeError):  # who is at the other end may just be going
        for worker in workers:
            worker.join(0.2)
    killed = [-worker.exitcode for worker in workers if worker.exitcode is not None and worker.exitcode < 0]
    if signal.SIGBUS in killed:
        return _no_shared_memory("a process that decodes them met its end there")
    if killed:
        if killed[0] != signal.SIGKILL:
            name = signal.Signals(killed[0]).name
            return f"a process that decodes images was ended by {name}: a fault of a library, or somebody sent it"
        return f"a process that decodes images was killed, which is what the system does when memory runs out; {FEWER}"
    if any(worker.exitcode for worker in workers):
        return f"a process that decodes images has ended: what it says stands above; {FEWER}"
    if "Too many open files" in str(error) or getattr(error, "errno", None) == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"more than {limit} files are open; raise the limit (ulimit -n), or {FEWER}"
    if isinstance(error, OSError) and len(workers) < count:
        return f"data.workers={count}: only {len(workers)} processes could be started ({error.strerror}); {FEWER}"
    return None


def _prepare_worker(_number: int) -> None:
    """One thread; and signals to the whole process group are the main process's business, whose end is the worker's.
    What cannot be handed over ends the worker, or the main process would wait for it for ever."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch's handler prints what the main process says in better words
    Queue._on_queue_feeder_error = staticmethod(_hand_nothing_over)  # type: ignore[attr-defined]


def _follow() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    os._exit(0)


def _hand_nothing_over(error: Exception, _item: Any) -> None:
    os.write(2, f"softmoe: a decoded image cannot be handed over: {first_line(error)}\n".encode())
    os._exit(1)


_working: set[Any] = set()
"""The processes that decode now."""


def end_workers() -> None:
    """Ends all processes that decode, whoever still holds their iterators, as the traceback of an error does."""
    _end(list(_working))


def _end(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()  # they are deaf to what is kinder, and have nothing to lose
    for worker in workers:
        worker.join()
        _working.discard(worker)


@functools.cache
def _end_with(_process: int) -> None:
    """Has the workers of this process end before Python, or multiprocessing in a forked process, waits for them."""
    atexit.register(end_workers)
    Finalize(None, end_workers, exitpriority=0)


# --- batches ----------------------------------------------------------------------------------------------------------


def _seed(seed: int, purpose: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, purpose, number)).generate_state(1, np.uint64)[0]) >> 1


ORDER, CHANGE, MIX, ERASE, CUT = range(5)

CACHED = 2**18
"""Numbers that a CPU's cache holds, so that pixels stay in it from one operation to the next."""


def _generator(seed: int, step: int, purpose: int = CHANGE) -> torch.Generator:
    """What the changes of a batch are drawn from."""
    return torch.Generator().manual_seed(_seed(seed, purpose, step))


def _seeds(batch_size: int, rows: Int64[Tensor, " r"] | slice, rng: torch.Generator) -> Int64[Tensor, " r"]:
    """A seed for each image of a batch, of which those of `rows` are wanted: an image's own does not depend on them."""
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

    `rows` are the positions in a batch of the images that are wanted, ascending: no others are read, but for those that
    are mixed with them. What is done to an image does not depend on them.
    """
    mixup = None
    made: Int64[Tensor, " m"] | slice = rows
    kept: Int64[Tensor, " r"] | slice = slice(None)
    if augment.mixup or augment.cutmix:
        mixup = Mixup(augment.mixup, augment.cutmix, label_smoothing=label_smoothing, num_classes=num_classes)
        made, kept = _with_partners(rows, batch_size)
    off = label_smoothing / num_classes
    labels = images.labels.to(device)
    mean, std = _statistics(data, device)
    black = (-mean / std).expand(in_chans)
    side = image_size if data.from_file else images.side
    decoded = _Decoded(
        images, side, data.crop_pct, data.max_megapixels, augment, data.from_file, seed, batch_size, made
    )
    for step, (index, raw) in enumerate(_raw(decoded, data, first_step, device), start=first_step):
        rng = _generator(seed, step)
        if augment.randaugment is not None:
            seeds = _seeds(batch_size, made, rng)
            if images.images is not None:  # else done where it was decoded, with the same seeds
                raw = _randaugment(raw, augment.randaugment, seeds)
        x = _normalise(raw, in_chans, mean, std)
        if _cuts_files(augment, data.from_file):
            pass  # cut and mirrored where it was decoded
        elif augment.crop == "resized":
            x = resized_crop(x, boxes(batch_size, augment.area, rng)[made].to(device), image_size)
        else:
            reach = round(augment.shift * x.shape[-1]) if augment.crop == "shift" else 0
            if reach:
                shift = torch.randint(-reach, reach + 1, (2, batch_size), generator=rng)[:, made]
                x = shift_crop(x, shift.to(device), black)
            x = _resize(x, image_size)
        if augment.hflip and not _cuts_files(augment, data.from_file):
            flip = (torch.rand(batch_size, generator=rng) < augment.hflip)[made].to(device)
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        if augment.erase:
            x = _erased(augment.erase, x, _seeds(batch_size, made, _generator(seed, step, ERASE)))
        if mixup is None:
            yield x, one_hot(labels[index], num_classes, 1 - label_smoothing + off, off)
        else:
            mixed, targets = _mixed(mixup, x, labels[index], _seed(seed, MIX, step))
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
    mean, std = _statistics(data, device)
    indices = torch.arange(len(images)).split(batch_size)
    if turns is not None:
        indices = tuple(indices[turn] for turn in turns)
    if images.images is not None:
        raws: Iterator[Tensor] = (images.images[index] for index in indices)
    else:
        side = image_size if data.from_file else images.side
        raws = _decoded(_Decoded(images, side, data.crop_pct, data.max_megapixels), enumerate(indices), data, device)
    for index, raw in zip(indices, raws, strict=True):
        x = _resize(_normalise(raw.to(device), in_chans, mean, std), image_size)
        yield x, images.labels[index].to(device)


def first_images(
    images: ImageSet, data: Data, model: Model, count: int
) -> tuple[Float[Tensor, "b c s s"], Int64[Tensor, " b"]]:
    """The first `count` images, or all where there are fewer, as a model sees them in evaluation; and their labels."""
    size, channels = model.image_size, model.in_chans
    cpu = torch.device("cpu")
    return next(eval_batches(images, data, image_size=size, in_chans=channels, batch_size=count, device=cpu))


def _statistics(data: Data, device: torch.device) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def _normalise(
    raw: UInt8[Tensor, "b c s s"], in_chans: int, mean: Float[Tensor, " m"], std: Float[Tensor, " m"]
) -> Float[Tensor, "b c2 s s"]:
    """Pixels as the model takes them; grey is repeated first, so that each channel has its own mean and deviation."""
    x = torch.empty(len(raw), in_chans, *raw.shape[2:], device=raw.device)
    at_once = len(raw) if raw.is_cuda else max(1, CACHED // x[0].numel())
    for part, source in zip(x.split(at_once), raw.split(at_once), strict=True):
        part.copy_(source).div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    return x


def _resize(x: Float[Tensor, "b c s s"], side: int) -> Float[Tensor, "b c t t"]:
    if x.shape[-1] == side:
        return x.contiguous()
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)


def shift_crop(
    x: Float[Tensor, "b c s s"], shift: Int64[Tensor, "2 b"], fill: Float[Tensor, " c"]
) -> Float[Tensor, "b c s s"]:
    """Each image moved by its own (down, right) pixels; what comes in from outside is `fill`."""
    b, c, s, _ = x.shape
    reach = int(shift.abs().max())
    padded = fill.view(1, c, 1, 1).repeat(b, 1, s + 2 * reach, s + 2 * reach)
    padded[:, :, reach : reach + s, reach : reach + s] = x
    along = torch.arange(s, device=x.device)
    rows = (along + reach - shift[0, :, None])[:, None, :, None]
    columns = (along + reach - shift[1, :, None])[:, None, None, :]
    images = torch.arange(b, device=x.device).view(b, 1, 1, 1)
    channels = torch.arange(c, device=x.device).view(1, c, 1, 1)
    return padded[images, channels, rows, columns]


def boxes(count: int, area: float, rng: torch.Generator) -> Float[Tensor, "b 4"]:
    """Random crops (top, left, height, width) as shares of the side: area uniform in [area, 1], aspect log-uniform
    in [3/4, 4/3], cut to the image where one side would stick out."""
    areas = torch.empty(count).uniform_(area, 1, generator=rng)
    aspect = torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng).exp()
    height, width = (areas / aspect).sqrt().clamp(max=1), (areas * aspect).sqrt().clamp(max=1)
    top, left = torch.rand(2, count, generator=rng)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], dim=1)


def resized_crop(x: Float[Tensor, "b c s s"], box: Float[Tensor, "b 4"], side: int) -> Float[Tensor, "b c t t"]:
    """Each image's box, bilinearly resized to `side` pixels in one pass."""
    top, left, height, width = box.unbind(1)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _randaugment(
    raw: UInt8[Tensor, "b c s s"], operations: list[int], seeds: Int64[Tensor, " b"]
) -> UInt8[Tensor, "b c s s"]:
    """torchvision's RandAugment, image by image; it draws from torch's own random state, which is put back."""
    from torchvision.transforms.v2 import RandAugment

    change = RandAugment(num_ops=operations[0], magnitude=operations[1])
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(raw, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            changed.append(change(image))
    return torch.stack(changed)


def _erased(probability: float, x: Float[Tensor, "b c s s"], seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c s s"]:
    """timm's random erasing with noise, of 2% to 33% of an image's area, image by image. It draws boxes from Python's
    and noise from torch's random state; both are put back. Noise is drawn on the CPU: the same on every device."""
    erase = RandomErasing(probability, mode="pixel", device="cpu")
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(x := x.contiguous(), seeds.tolist(), strict=True):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            erase(image)  # in place
    random.setstate(before)
    return x


def _mixed(
    mixup: Mixup, x: Float[Tensor, "b c s s"], labels: Int64[Tensor, " b"], seed: int
) -> tuple[Float[Tensor, "b c s s"], Float[Tensor, "b classes"]]:
    """timm's mixup and cutmix; they draw from numpy's global state, which is put back."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    mixed: tuple[Tensor, Tensor] = mixup(x.contiguous(), labels)
    np.random.set_state(before)
    return mixed[0], mixed[1].to(x.dtype)
