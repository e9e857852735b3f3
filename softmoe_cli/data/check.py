"""`softmoe data check`: reads every image of a data set before a long run does."""

import contextlib
import dataclasses
import hashlib
import io
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from softmoe_cli import programs
from softmoe_cli.config.commands import DataCheckConfig
from softmoe_cli.config.data import Data
from softmoe_cli.data import sets, workers
from softmoe_cli.data.archives import IMAGE_ENDINGS, Stored
from softmoe_cli.data.folders import HIDDEN_FILES, Listing, Passed
from softmoe_cli.data.listing import check_num_classes, listing
from softmoe_cli.data.picture import IMAGE_FORMATS, opened
from softmoe_cli.data.splits import ImageSet, split
from softmoe_cli.data.suit import shorter_sides, side_for
from softmoe_cli.errors import UsageError
from softmoe_cli.terminal import Screen
from softmoe_cli.text import aligned, gibibytes, printable

EXAMPLES_SHOWN = 10
"""Examples of each kind of fault that the table names; JSON has all."""
SPLITS = ("train", "validation", "test")
BESIDE = {
    "orientation": "have an EXIF orientation other than 1; they are seen as they lie in the file, as by timm",
    "transparency": "have an alpha channel or a transparent colour, which is dropped",
    "frames": "have further frames or pages; the first is seen",
}
"""What a file may say of its picture beside the pixels, and what softmoe does with it."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image: its size on disk, its digest, or why it cannot be read."""

    width: int
    height: int
    mode: str
    size: int
    digest: bytes
    fault: str | None = None
    beside: tuple[str, ...] = ()
    """The keys of BESIDE that the image has."""


class _Files(Dataset):
    def __init__(self, stored: Stored, channels: int, max_megapixels: float) -> None:
        self.stored, self.channels, self.max_megapixels = stored, channels, max_megapixels

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> Seen:
        """The digest is of size and decoded pixels, so that the same picture in another file is found."""
        try:
            image = opened(self.stored, i, self.channels, self.max_megapixels)
            raw = self.stored.read(i)
        except (UsageError, OSError) as error:
            return Seen(0, 0, "", 0, b"", str(error))
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
        return Seen(*image.size, image.mode, len(raw), digest, beside=tuple(_beside(raw)))


def _beside(raw: bytes) -> Iterator[str]:
    """The keys of BESIDE that an image has. What cannot be read because it is damaged counts as absent."""
    with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as image:
        has = {
            "orientation": lambda: image.getexif().get(ExifTags.Base.Orientation) in range(2, 9),
            "transparency": lambda: image.has_transparency_data,
            "frames": lambda: getattr(image, "is_animated", False),
        }
        for kind, told in has.items():
            with contextlib.suppress(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, struct.error):
                if told():
                    yield kind


def check_data(config: DataCheckConfig) -> int:
    """Prints what a data set holds and what is wrong with it; returns 1 if anything is wrong.

    Raises:
        UsageError: there is nothing to read.
    """
    report = inspect(config)
    programs.reply(report) if config.format == "json" else _show(report)
    return 1 if report["faults"] else 0


def inspect(config: DataCheckConfig) -> dict[str, Any]:
    """`data`, `classes`, `images`, a row per part as `parts`, what was `passed_over` (kind, files, the first), `notes`,
    and `faults`: kind, sentence, and the places concerned.

    A part is a split of the run (train, validation, test), or what lies on disk where it cannot be split.
    """
    if config.data.sets is not None:
        raise UsageError("data=mix is of several sets; check them one by one, with the same data.root")
    settings = dataclasses.replace(config.data, memory_gib=0, image_size=1)  # no image is cut here
    faults: list[dict[str, Any]] = []
    passed, notes = Passed(), list[str]()
    if settings.format is None:
        splits = sets.load(_with_side(config.data))
        notes += [f"{word}: {said}" for word, said in splits.notes.items()]
        parts = {part: getattr(splits, part) for part in SPLITS}
        classes = splits.classes
    else:
        found = listing(settings)
        faults += [_fault("classes", sentence) for sentence in found.faults]
        classes, passed, notes = found.classes, found.passed, list(found.remarks)
        parts = _parts(settings, found, faults)
    seen = {part: list(_read_images(images, settings)) for part, images in parts.items()}
    for part, images in parts.items():
        faults += _unreadable(part, images, seen[part])
    if not any(fault["kind"] == "classes" for fault in faults):
        faults += _lacking(parts, classes)
    faults += _duplicates(parts, seen)
    rows = [_row(part, images, seen[part], len(classes)) for part, images in parts.items() if len(images)]
    if settings.format == "folder" and str(passed):
        notes.append(f"images are files that end with {' '.join(IMAGE_ENDINGS)}, below a folder for their class")
    beside = Counter(kind for several in seen.values() for each in several for kind in each.beside)
    notes += [f"{beside[kind]:,} images {words}" for kind, words in BESIDE.items() if beside[kind]]
    return {
        "data": settings.name,
        "classes": len(classes),
        "images": sum(map(len, parts.values())),
        "parts": rows,
        "passed_over": [
            {"kind": kind, "files": n, "first": first} for kind, (n, first) in sorted(passed.kinds.items())
        ],
        "notes": notes,
        "faults": faults,
    }


def _with_side(data: Data) -> Data:
    """The data with a number of pixels: exemplars are known by what they show at their size."""
    if data.image_size != "auto":
        return data
    return dataclasses.replace(data, image_size=side_for(shorter_sides(data.made_of), None))


def _fault(kind: str, sentence: str, places: list[str] | None = None) -> dict[str, Any]:
    return {"kind": kind, "sentence": sentence, "places": places or []}


def _parts(settings: Any, found: Listing, faults: list[dict[str, Any]]) -> dict[str, ImageSet]:
    """The images as a run would split them, or as they lie on disk if a run could not split them."""
    on_disk = {
        part or "all": ImageSet(torch.from_numpy(labels), None, settings.image_size, settings.channels, stored)
        for part, (stored, labels) in found.parts.items()
    }
    if not faults:
        try:
            check_num_classes(settings, found.classes)
            splits = split(on_disk, found.classes, settings)
        except UsageError as error:
            faults.append(_fault("split", str(error)))
        else:
            return {part: getattr(splits, part) for part in SPLITS if len(getattr(splits, part))}
    return on_disk


def _read_images(images: ImageSet, settings: Any) -> Iterator[Seen]:
    if images.images is not None:
        for image in images.images:
            digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
            yield Seen(images.side, images.side, "L" if images.channels == 1 else "RGB", image.numel(), digest)
        return
    assert images.files is not None
    files = _Files(images.files, images.channels, settings.max_megapixels)
    yield from workers.by_workers(files, range(len(files)), settings, prefetch=64)


def _unreadable(part: str, images: ImageSet, seen: list[Seen]) -> Iterator[dict[str, Any]]:
    broken = [each.fault for each in seen if each.fault is not None]
    if broken:
        yield _fault("unreadable", f"{part}: {len(broken)} of {len(images)} images cannot be read", broken)


def _lacking(parts: dict[str, ImageSet], classes: list[str]) -> Iterator[dict[str, Any]]:
    """Classes without training images, and others that not every part has."""
    there = {part: set(images.labels.tolist()) for part, images in parts.items()}
    trained = there.get("train", set())
    for part, word in {"train": "training", "validation": "validation", "test": "test"}.items():
        wanted = range(len(classes)) if part == "train" else sorted(trained)
        if lacking := [classes[i] for i in wanted if part in there and i not in there[part]]:
            yield _fault("classes", f"{len(lacking)} of {len(classes)} classes have no {word} image", lacking)


def _duplicates(parts: dict[str, ImageSet], seen: dict[str, list[Seen]]) -> Iterator[dict[str, Any]]:
    """Finds the same pixels in two parts, and the same pixels with two labels in one part."""
    first = {part: _first(seen[part]) for part in parts}
    names = list(parts)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            both = [(first[a][each.digest], k) for k, each in enumerate(seen[b]) if each.digest in first[a]]
            if both:
                places = [f"{_place(parts[a], j)} = {_place(parts[b], k)}" for j, k in both]
                yield _fault("duplicates", f"{len(both)} images of {b} are in {a} too, pixel for pixel", places)
    for part, images in parts.items():
        labels = images.labels.tolist()
        odd = [
            (first[part][each.digest], k)
            for k, each in enumerate(seen[part])
            if not each.fault and labels[first[part][each.digest]] != labels[k]
        ]
        if odd:
            places = [f"{_place(images, j)} = {_place(images, k)}" for j, k in odd]
            yield _fault("labels", f"{part}: {len(odd)} images are in another class too, pixel for pixel", places)


def _first(seen: list[Seen]) -> dict[bytes, int]:
    """Digest -> the first image that has it."""
    found: dict[bytes, int] = {}
    for i, each in enumerate(seen):
        if each.fault is None:
            found.setdefault(each.digest, i)
    return found


def _place(images: ImageSet, i: int) -> str:
    return str(images.files.place(i)) if images.files is not None else f"image {i}"


def _row(part: str, images: ImageSet, seen: list[Seen], classes: int) -> dict[str, Any]:
    """Numbers of one part. Sides are of the images that can be read, in pixels."""
    good = [each for each in seen if each.fault is None]
    counts = np.bincount(images.labels.numpy(), minlength=classes)
    row: dict[str, Any] = {"part": part, "images": len(images), "mib": sum(each.size for each in good) / 2**20}
    row |= {"per_class_min": int(counts.min()), "per_class_median": float(np.median(counts))}
    row |= {"per_class_max": int(counts.max()), "again": len(good) - len({each.digest for each in good})}
    for key, sides in {"width": [each.width for each in good], "height": [each.height for each in good]}.items():
        if sides:
            row |= {f"{key}_min": min(sides), f"{key}_median": float(np.median(sides)), f"{key}_max": max(sides)}
    return row | {"modes": dict(Counter(each.mode for each in good))}


def _show(report: dict[str, Any]) -> None:
    screen = Screen()

    def say(line: str) -> None:
        screen.say(printable(line))

    size = gibibytes(sum(row["mib"] for row in report["parts"]) * 2**20)
    screen.say(f"{report['data']}: {report['images']:,} images in {report['classes']:,} classes, {size}")
    head = ["part", "images", "per class: fewest", "median", "most", "width", "height", "again in the part"]
    cells = [
        [row["part"], f"{row['images']:,}", f"{row['per_class_min']:,}", f"{row['per_class_median']:,.0f}",
         f"{row['per_class_max']:,}", _sides(row, "width"), _sides(row, "height"), f"{row['again']:,}"]
        for row in report["parts"]
    ]  # fmt: skip
    screen.say(aligned([head, *cells], markdown=False))
    for each in report["passed_over"]:
        say(f"passed over: {each['files']:,} {each['kind']}, such as {each['first']}")
    for note in report["notes"]:
        say(f"note: {note}")
    for fault in report["faults"]:
        say(f"wrong: {fault['sentence']}")
        for place in fault["places"][:EXAMPLES_SHOWN]:
            say(f"  {place}")
        if len(fault["places"]) > EXAMPLES_SHOWN:
            say(f"  and {len(fault['places']) - EXAMPLES_SHOWN:,} more; format=json has all")
    if not report["faults"]:
        others = any(each["kind"] != HIDDEN_FILES for each in report["passed_over"])
        read = f"each of these {report['images']:,} images" if others else "every image"
        say(f"{read} was read; no class is empty, no image is in two parts or under two labels")


def _sides(row: dict[str, Any], key: str) -> str:
    """`500` or `100 to 500`"""
    if f"{key}_min" not in row:
        return ""
    low, high = row[f"{key}_min"], row[f"{key}_max"]
    return f"{low}" if low == high else f"{low} to {high}, median {row[f'{key}_median']:.0f}"
