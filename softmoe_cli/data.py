"""Images and labels: embedded, from torchvision, from a folder; what is done to them on the way to the model.

Everything random about a training batch is a function of (seed, step): order, crop, flip, RandAugment, erasing, mixup.
A resumed run therefore sees the same batches bit for bit, with no state saved and any number of workers.
"""

import gzip
import hashlib
import math
import os
import random
import signal
import urllib.error
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from timm.data import Mixup
from timm.data.mixup import one_hot
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from softmoe_cli.config import Augment, Data, UsageError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
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
    files: list[Path] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: np.ndarray) -> "ImageSet":
        chosen = torch.as_tensor(index)
        images = None if self.images is None else self.images[chosen]
        return ImageSet(
            self.labels[chosen], images, self.side, self.channels, [self.files[i] for i in index if self.files]
        )


@dataclass(frozen=True)
class Splits:
    """Training images, validation images for choices, test images for the one reading at the end."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    classes: list[str]


def load(data: Data) -> Splits:
    """Reads the set that `data` names and cuts it.

    Raises:
        UsageError: files that are missing, unreadable or damaged, or too few of them; the message names them.
    """
    readers = {
        "digits": _digits,
        "fashion_mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "folder": _folder,
    }
    splits = readers[data.name](data)
    if data.num_classes is not None and data.num_classes < len(splits.classes):
        raise UsageError(f"data.num_classes={data.num_classes} is less than the {len(splits.classes)} classes found")
    return splits


def identity(data: Data) -> str | None:
    """A digest of which files a folder holds and how large they are; None for the sets that are the same everywhere.

    Raises:
        UsageError: the folder cannot be used.
    """
    if data.name != "folder":
        return None
    digest, root = hashlib.sha256(), Path(data.root)
    for tree in _trees(data).values():
        for file in (file for files in tree.values() for file in files):
            digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


# --- splits -----------------------------------------------------------------------------------------------------------


def hold_out(labels: Int64[Tensor, " n"], fraction: float, seed: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: of every class the share `fraction`, rounded, at least one image.

    Raises:
        UsageError: a class with no image left for training.
    """
    rng = np.random.default_rng(seed)
    kept, held = [], []
    for label in labels.unique().tolist():
        index = rng.permutation((labels == label).nonzero().flatten().numpy())
        count = max(1, round(len(index) * fraction))
        if count >= len(index):
            raise UsageError(
                f"data.{key}={fraction:g} leaves no image of class {label} for training: it has {len(index)} in all"
            )
        held.append(index[:count])
        kept.append(index[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def _with_validation(train: ImageSet, test: ImageSet, classes: list[str], data: Data) -> Splits:
    kept, held = hold_out(train.labels, data.validation_fraction, data.split_seed, "validation_fraction")
    return Splits(train.subset(kept), train.subset(held), test, classes)


def _with_test(everything: ImageSet, classes: list[str], data: Data) -> Splits:
    kept, held = hold_out(everything.labels, data.test_fraction, data.split_seed, "test_fraction")
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
    names = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    root = Path(data.root)
    folders = [root, root / "FashionMNIST" / "raw", DEBIAN_FASHION]
    paths = [_first_existing(folders, name) for name in names]
    if None in paths:
        _download("FashionMNIST", data, f"{', '.join(names)} (also with .gz); Debian's dataset-fashion-mnist has them")
        paths = [_first_existing(folders, name) for name in names]
    arrays = [torch.from_numpy(read_idx(path)) for path in paths if path is not None]
    train, test = (
        ImageSet(arrays[i + 1].long(), _convert(arrays[i][:, None], data.channels), 28, data.channels) for i in (0, 2)
    )
    return _with_validation(train, test, list(FASHION_CLASSES), data)


def _first_existing(folders: list[Path], name: str) -> Path | None:
    candidates = [folder / f"{name}{ending}" for folder in folders for ending in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in MNIST's idx format, gzipped or not.

    Raises:
        UsageError: a file that is not idx, or is cut short.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise UsageError(f"{path} is no idx file of bytes: it must begin with 00 00 08")
    head = 4 + 4 * raw[3]
    if len(raw) < head:
        raise UsageError(f"{path} is cut short: {len(raw)} bytes where its header alone has {head}")
    shape = np.frombuffer(raw[4:head], dtype=">u4").astype(int)
    if len(raw) != head + shape.prod():
        raise UsageError(f"{path} is cut short: {len(raw)} bytes where its header promises {head + shape.prod()}")
    return np.frombuffer(raw, dtype=np.uint8, offset=head).reshape(shape).copy()


def _cifar(data: Data) -> Splits:
    from torchvision import datasets

    kind = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}[data.name]
    expected = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[data.name]
    make = getattr(datasets, kind)
    try:  # torchvision holds every file against its known MD5 before it unpickles anything
        parts = [make(data.root, train=part, download=False) for part in (True, False)]
    except RuntimeError:
        _download(kind, data, f"the folder {expected}")
        parts = [make(data.root, train=part, download=False) for part in (True, False)]
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


def _download(kind: str, data: Data, expected: str) -> None:
    from torchvision import datasets

    print(f"downloading {kind} to {data.root}", flush=True)
    try:
        getattr(datasets, kind)(data.root, download=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UsageError(
            f"data={data.name} is not in data.root={data.root} and cannot be downloaded "
            f"({str(error).splitlines()[0]}); put there {expected}"
        ) from error


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(data: Data) -> Splits:
    """train/ and val/ (and test/) with a folder per class, or one tree that is split.

    With test/, the three are taken as they are. With train/ and val/ alone, val/ is the test set, as ImageNet's
    is in practice, and validation images are held out of train/, so that nothing is chosen on what is reported.
    """
    trees = _trees(data)
    parts, classes = list(trees), list(next(iter(trees.values())))
    total = sum(len(files) for tree in trees.values() for files in tree.values())
    in_memory = total * data.channels * data.image_size**2 <= data.memory_gib * 2**30
    sets = {part: _read_tree(tree, data, in_memory) for part, tree in trees.items()}
    if parts == ["train", "val", "test"]:
        return Splits(sets["train"], sets["val"], sets["test"], classes)
    if parts == ["train", "val"]:
        return _with_validation(sets["train"], sets["val"], classes, data)
    return _with_test(sets[""], classes, data)


def _trees(data: Data) -> dict[str, dict[str, list[Path]]]:
    """Part (train, val, test, or "" for a single tree) -> class name -> image files."""
    root = Path(data.root)
    if not root.is_dir():
        raise UsageError(f"data.root={data.root} is not a folder")
    names = {path.name.lower(): path.name for path in root.iterdir() if path.is_dir()}
    for part in ("train", "val", "test"):
        if part in names and names[part] != part:
            raise UsageError(f"{root / names[part]} must be called {part}, or it would be taken for a class")
    parts: list[str] = [part for part in ("train", "val", "test") if part in names]
    if parts in (["train"], ["val"], ["test"], ["train", "test"], ["val", "test"]):
        raise UsageError(f"data.root={data.root} has {' and '.join(parts)} only; it needs train and val, or classes")
    trees = {part: _tree(root / part) for part in parts} if parts else {"": _tree(root)}
    classes = list(next(iter(trees.values())))
    for part, tree in trees.items():
        odd = sorted(set(tree) ^ set(classes))
        if odd:
            raise UsageError(f"{root / part} and {root / parts[0]} have different classes: {', '.join(odd[:5])}")
    return trees


def _tree(root: Path) -> dict[str, list[Path]]:
    """Class name -> its image files, both sorted."""
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        tree = {folder.name: _images_in(folder) for folder in folders}
    except PermissionError as error:
        raise UsageError(f"{error.filename} cannot be read: no permission") from error
    if not tree:
        raise UsageError(f"{root} has no class folders; it needs one folder of images per class")
    empty = [name for name, files in tree.items() if not files]
    if empty:
        raise UsageError(f"class folder {root / empty[0]} holds no image ({', '.join(IMAGE_ENDINGS)})")
    if len(tree) < 2:
        raise UsageError(f"{root} has one class folder only, {next(iter(tree))}; there is nothing to tell apart")
    return tree


def _images_in(folder: Path) -> list[Path]:
    """The images at any depth, links followed; a link that leads back up is followed once."""
    found: list[Path] = []
    seen: set[str] = set()
    for base, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(base) / name for name in names]
    return sorted(path for path in found if path.suffix.lower() in IMAGE_ENDINGS and not path.name.startswith("."))


def _raise(error: OSError) -> None:
    raise error


def _read_tree(tree: dict[str, list[Path]], data: Data, in_memory: bool) -> ImageSet:
    files = [file for members in tree.values() for file in members]
    labels = torch.tensor([label for label, members in enumerate(tree.values()) for _ in members])
    images = None
    if in_memory:
        with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
            images = torch.stack(list(pool.map(lambda file: decode(file, data.image_size, data.channels), files)))
    return ImageSet(labels, images, data.image_size, data.channels, files)


def decode(file: Path, side: int, channels: int) -> UInt8[Tensor, "c s s"]:
    """The centre square of an image whose shorter side is resized to `side` (bicubic, antialiased).

    Raises:
        UsageError: a file that is no image, is cut short, or cannot be read.
    """
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels have more than 8 bits; convert it to 8 bits a channel first")
            converted = image.convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{file} is not an image that can be read: {error}") from error
    width, height = converted.size
    cut = min(width, height)
    left, top = (width - cut) / 2, (height - cut) / 2
    square = converted.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut))
    return torch.from_numpy(np.array(square)).view(side, side, channels).permute(2, 0, 1).contiguous()


class _Decoded(Dataset):
    """Lists of indices -> decoded batches, in the worker that is asked."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, index: list[int]) -> tuple[Tensor | None, str]:
        try:
            one = self.images
            return torch.stack([decode(one.files[i], one.side, one.channels) for i in index]), ""
        except UsageError as error:  # as text: an exception would lose its meaning between processes
            return None, str(error)


def _prepare_worker(_number: int) -> None:
    """One thread; and signals to the whole process group are the main process's business."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _decoded(images: ImageSet, indices: Iterator[Int64[Tensor, " b"]], workers: int) -> Iterator[Tensor]:
    loader = DataLoader(
        _Decoded(images),
        sampler=map(Tensor.tolist, indices),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # or the loader would draw a seed from the model's random state
        worker_init_fn=_prepare_worker,
    )
    for batch, fault in loader:
        if fault:
            raise UsageError(fault)
        yield batch


# --- batches ----------------------------------------------------------------------------------------------------------


def _seed(seed: int, purpose: int, number: int) -> int:
    return int(np.random.SeedSequence((seed, purpose, number)).generate_state(1, np.uint64)[0]) >> 1


ORDER, CHANGE, MIX, ERASE = range(4)


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
    raws = _raw(images, data, batch_size, seed, first_step, device, made)
    for step, (index, raw) in enumerate(raws, start=first_step):
        rng = torch.Generator().manual_seed(_seed(seed, CHANGE, step))
        if augment.randaugment is not None:
            raw = _randaugment(raw, augment.randaugment, torch.randint(2**62, (batch_size,), generator=rng)[made])
        x = _normalise(raw, in_chans, mean, std)
        if augment.crop == "resized":
            x = resized_crop(x, boxes(batch_size, augment.area, rng)[made].to(device), image_size)
        else:
            reach = round(augment.shift * x.shape[-1]) if augment.crop == "shift" else 0
            if reach:
                shift = torch.randint(-reach, reach + 1, (2, batch_size), generator=rng)[:, made]
                x = shift_crop(x, shift.to(device), black)
            x = _resize(x, image_size)
        if augment.hflip:
            flip = (torch.rand(batch_size, generator=rng) < augment.hflip)[made].to(device)
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
        if augment.erase:
            rng = torch.Generator().manual_seed(_seed(seed, ERASE, step))
            x = _erased(augment.erase, x, torch.randint(2**62, (batch_size,), generator=rng)[made])
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
    images: ImageSet,
    data: Data,
    batch_size: int,
    seed: int,
    first_step: int,
    device: torch.device,
    rows: Int64[Tensor, " r"] | slice,
) -> Iterator[tuple[Int64[Tensor, " r"], UInt8[Tensor, "r c s s"]]]:
    order = (index[rows] for index in stream(len(images), batch_size, seed, first_step))
    if images.images is not None:
        pixels = images.images.to(device)
        for index in order:
            moved = index.to(device)
            yield moved, pixels[moved]
    else:
        again = (index[rows] for index in stream(len(images), batch_size, seed, first_step))
        for index, batch in zip(order, _decoded(images, again, data.workers), strict=False):
            yield index.to(device), batch.to(device)


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
        raws = _decoded(images, iter(indices), data.workers)
    for index, raw in zip(indices, raws, strict=True):
        x = _resize(_normalise(raw.to(device), in_chans, mean, std), image_size)
        yield x, images.labels[index].to(device)


def _statistics(data: Data, device: torch.device) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def _normalise(
    raw: UInt8[Tensor, "b c s s"], in_chans: int, mean: Float[Tensor, " m"], std: Float[Tensor, " m"]
) -> Float[Tensor, "b c2 s s"]:
    """Pixels as the model takes them; grey is repeated first, so that each channel has its own mean and deviation."""
    x = raw.to(mean.dtype).div_(255).expand(-1, in_chans, -1, -1)
    return x.sub(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))


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
