"""`softmoe data check`: reads every image of a data set before a long run does."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from softmoe_cli import data
from softmoe_cli.archives import Stored
from softmoe_cli.config import DataCheckConfig, UsageError
from softmoe_cli.device import cores
from softmoe_cli.listing import Listing, listing
from softmoe_cli.terminal import Screen
from softmoe_cli.text import aligned, gibibytes

SHOWN = 10
"""Examples of each kind of fault that the table names; JSON has all."""
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image: its size on disk, its digest, or why it cannot be read."""

    width: int
    height: int
    mode: str
    size: int
    digest: bytes
    fault: str | None = None


class _Files(Dataset):
    def __init__(self, stored: Stored, channels: int) -> None:
        self.stored, self.channels = stored, channels

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, i: int) -> Seen:
        """The digest is of size and decoded pixels, so that the same picture in another file is found."""
        try:
            image = data.opened(self.stored, i, self.channels)
        except UsageError as error:
            return Seen(0, 0, "", 0, b"", str(error))
        digest = hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()
        size = int(self.stored.size[i])
        return Seen(*image.size, image.mode, size if size >= 0 else self.stored.place(i).stat().st_size, digest)


def check(config: DataCheckConfig) -> int:
    """Prints what a data set holds and what is wrong with it; 1 if anything is.

    Raises:
        UsageError: there is nothing to read.
    """
    report = inspect(config)
    print(json.dumps(report)) if config.format == "json" else _show(report)
    return 1 if report["faults"] else 0


def inspect(config: DataCheckConfig) -> dict[str, Any]:
    """`data`, `classes`, `images`, a row per part as `parts`, and `faults`: kind, sentence, and the places concerned.

    A part is a split of the run (train, validation, test), or what lies on disk where it cannot be split.
    """
    settings = dataclasses.replace(config.data, memory_gib=0, image_size=1)  # no image is cut here
    faults: list[dict[str, Any]] = []
    if settings.format is None:
        splits = data.load(settings)
        parts = {part: getattr(splits, part) for part in SPLITS}
        classes = splits.classes
    else:
        found = listing(settings)
        faults += [_fault("classes", sentence) for sentence in found.faults]
        classes = found.classes
        parts = _parts(settings, found, faults)
    seen = {part: list(_look(images, settings)) for part, images in parts.items()}
    for part, images in parts.items():
        faults += _unreadable(part, images, seen[part])
        if part == "train":
            counts = np.bincount(images.labels.numpy(), minlength=len(classes))
            empty = [name for name, count in zip(classes, counts, strict=True) if not count]
            if empty and not any(fault["kind"] == "classes" for fault in faults):
                faults.append(_fault("classes", f"{len(empty)} classes have no training image", empty))
    faults += _duplicates(parts, seen)
    rows = [_row(part, images, seen[part], len(classes)) for part, images in parts.items() if len(images)]
    return {"data": settings.name, "classes": len(classes), "images": sum(map(len, parts.values())), "parts": rows} | {
        "faults": faults
    }


def _fault(kind: str, sentence: str, places: list[str] | None = None) -> dict[str, Any]:
    return {"kind": kind, "sentence": sentence, "places": places or []}


def _parts(settings: Any, found: Listing, faults: list[dict[str, Any]]) -> dict[str, data.ImageSet]:
    """As a run would split them; as they lie on disk where it could not."""
    on_disk = {
        part or "all": data.ImageSet(torch.from_numpy(labels), None, settings.image_size, settings.channels, stored)
        for part, (stored, labels) in found.parts.items()
    }
    if not faults:
        try:
            splits = data.split(on_disk, found.classes, settings)
        except UsageError as error:
            faults.append(_fault("split", str(error)))
        else:
            return {part: getattr(splits, part) for part in SPLITS if len(getattr(splits, part))}
    return on_disk


def _look(images: data.ImageSet, settings: Any) -> Iterator[Seen]:
    if images.images is not None:
        for image in images.images:
            digest = hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()
            yield Seen(images.side, images.side, "L" if images.channels == 1 else "RGB", image.numel(), digest)
        return
    assert images.files is not None
    workers = cores() if settings.workers is None else settings.workers
    yield from DataLoader(
        _Files(images.files, images.channels),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=64 if workers else None,
        generator=torch.Generator(),
        worker_init_fn=data.prepare_worker,
    )


def _unreadable(part: str, images: data.ImageSet, seen: list[Seen]) -> Iterator[dict[str, Any]]:
    broken = [each.fault for each in seen if each.fault is not None]
    if broken:
        yield _fault("unreadable", f"{part}: {len(broken)} of {len(images)} images cannot be read", broken)


def _duplicates(parts: dict[str, data.ImageSet], seen: dict[str, list[Seen]]) -> Iterator[dict[str, Any]]:
    """The same pixels in two parts, and with two labels in one."""
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


def _place(images: data.ImageSet, i: int) -> str:
    return str(images.files.place(i)) if images.files is not None else f"image {i}"


def _row(part: str, images: data.ImageSet, seen: list[Seen], classes: int) -> dict[str, Any]:
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
    size = gibibytes(sum(row["mib"] for row in report["parts"]) * 2**20)
    screen.say(f"{report['data']}: {report['images']:,} images in {report['classes']:,} classes, {size}")
    head = ["part", "images", "per class: fewest", "median", "most", "width", "height", "again in the part"]
    cells = [
        [row["part"], f"{row['images']:,}", f"{row['per_class_min']:,}", f"{row['per_class_median']:,.0f}",
         f"{row['per_class_max']:,}", _sides(row, "width"), _sides(row, "height"), f"{row['again']:,}"]
        for row in report["parts"]
    ]  # fmt: skip
    screen.say(aligned([head, *cells], markdown=False))
    for fault in report["faults"]:
        screen.say(f"wrong: {fault['sentence']}")
        for place in fault["places"][:SHOWN]:
            screen.say(f"  {place}")
        if len(fault["places"]) > SHOWN:
            screen.say(f"  and {len(fault['places']) - SHOWN:,} more; format=json has all")
    if not report["faults"]:
        screen.say("every image was read; no class is empty, no image is in two parts or under two labels")


def _sides(row: dict[str, Any], key: str) -> str:
    """`500` or `100 to 500`"""
    if f"{key}_min" not in row:
        return ""
    low, high = row[f"{key}_min"], row[f"{key}_max"]
    return f"{low}" if low == high else f"{low} to {high}, median {row[f'{key}_median']:.0f}"
