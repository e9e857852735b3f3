"""Finds the archives of a set, whose names say their part and number, and reads the files beside them."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli.config.data import MOST_CLASSES, Data
from softmoe_cli.data import archives
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.folders import Listing, Passed, class_text, parts_on_disk, told_apart, visible
from softmoe_cli.errors import UsageError

PART_WORD = re.compile(r"(?:^|[-_./])(train|val|test)(?:ing|id|idation)?(?=[-_./\d]|$)", re.IGNORECASE)
NUMBERED = re.compile(r"(.*-)(\d+)(-of-(\d+).*)")
ENDINGS = {"webdataset": r"\.tar", "tfds": r"\.tfrecord-\d+-of-\d+", "arrow": r"\.arrow"}
MANY_CLASSES = 2**16
"""Labels above this number that leave most classes without an image are taken for ids, not for classes (ImageNet-21k
has 21,841 classes)."""


@dataclass(frozen=True)
class Said:
    """What a file beside the archives says: the classes' names, and the columns of images and of labels."""

    file: Path
    names: list[str]
    columns: tuple[str, str] | None = None


def archives_by_part(data: Data, passed: Passed) -> dict[str, list[Path]]:
    """Part -> its archives, by the last word train, val(id, idation) or test in their names below data.root.

    A single part is called ""; train and test alone are taken for train and val.

    Raises:
        UsageError: no archives, archives of several sets, or names of which some say a part and some do not.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise UsageError(f"data.root={data.root} is not a folder")
    assert data.format is not None
    ending = re.compile(rf".*{ENDINGS[data.format]}", re.DOTALL)
    files, copies = [], 0
    for place, whole in visible(root, passed):
        name = os.path.basename(place)
        if not ending.fullmatch(name):
            if not name.lower().endswith((".json", ".txt", ".md")):
                passed.file(place)
        elif data.format == "arrow" and name.startswith("cache-"):  # map and filter leave such copies
            passed.add("cached copies (cache-*.arrow)", place)
            copies += 1
        elif whole:
            files.append(Path(place))
        else:
            raise UsageError(f"{place} is a link that leads nowhere, a pipe or a device")
    if copies and not files:
        raise UsageError(f"data.root={data.root} holds cached copies only (cache-*.arrow); use save_to_disk")
    if not files:
        raise UsageError(f"data.root={data.root} holds no file of data.format={data.format} (*{ENDINGS[data.format]})")
    parts: dict[str, list[Path]] = {}
    for file in sorted(files):
        words = PART_WORD.findall(str(file.relative_to(root)))
        parts.setdefault(words[-1].lower() if words else "", []).append(file)
    _one_set(root, parts)
    _whole(files)
    if len(parts) == 1:
        return {"": next(iter(parts.values()))}
    if "" in parts:
        raise UsageError(f"{parts[''][0]} does not say whether it is train, val or test, while others do")
    return {part: parts[lies] for part, lies in parts_on_disk(root, parts).items()}


def _one_set(root: Path, parts: dict[str, list[Path]]) -> None:
    """Raises UsageError where archives lie as those of several sets do (versions, configurations, copies).

    The archives of a part lie in one folder; folders of several parts differ in what says the part only.
    """
    by_part = [list(dict.fromkeys(file.parent for file in files)) for files in parts.values()]
    several = next((folders for folders in by_part if len(folders) > 1), None)
    if several is None:
        rest = {
            tuple(w for w in folder.relative_to(root).parts if not PART_WORD.search(w)): folder for (folder,) in by_part
        }
        several = list(rest.values())
    if len(several) > 1:
        more = f" and {len(several) - 2} more folders" if len(several) > 2 else ""
        raise UsageError(
            f"data.root={root} has archives in {several[0]} and in {several[1]}{more}: versions or copies of a set, or "
            "several sets. Name one folder with data.root, or put a set's archives into one folder, or into one for "
            "each of train, val and test"
        )


def _whole(files: Sequence[Path]) -> None:
    """Raises UsageError where files that say how many they are, as in `-00003-of-01024`, are fewer."""
    sets: Counter[tuple[Path, str, str, int]] = Counter()
    for file in files:
        if name := NUMBERED.fullmatch(file.name):
            sets[file.parent, name[1], name[3], int(name[4])] += 1
    for (folder, start, end, whole), there in sets.items():
        if there != whole:
            raise UsageError(
                f"{folder}/{start}*{end}: {there} files are there of {whole}; get the others, or rename those that are "
                f"there to {start}*-of-{there:05}"
            )


@dataclass(frozen=True, eq=False)
class _Index:
    """The images of an archive, its different labels, and which of these each image has."""

    stored: Stored
    labels: list[int | str]
    each: np.ndarray


def shards(data: Data) -> Listing:
    passed = Passed()
    parts = archives_by_part(data, passed)
    said = _said([file for files in parts.values() for file in files], data)
    read = {file: _indexed(file, data, said.get(file)) for files in parts.values() for file in files}
    _no_copies(read)
    where: dict[int | str, Path] = {}
    for file, index in read.items():
        for label in index.labels:
            where.setdefault(label, file)
    numbers = [label for label in where if isinstance(label, int)]
    names = [label for label in where if isinstance(label, str)]
    for part, files in parts.items():
        if not any(len(read[file].stored) for file in files):
            more = f", nor do the {len(files) - 1:,} others of {part or 'the set'}" if len(files) > 1 else ""
            raise UsageError(f"{files[0]} holds no image{more}")
    if numbers and names:
        number, name = numbers[0], names[0]
        raise UsageError(
            f"data.root={data.root} has numbers for labels, such as {number} in {where[number]}, and names, such as "
            f"{name!r} in {where[name]}"
        )
    remarks: list[str] = []
    if names:
        classes = sorted(names)
        position: dict[Any, int] = {name: i for i, name in enumerate(classes)}
        coded = {file: [position[label] for label in index.labels] for file, index in read.items()}
    else:
        largest = max(numbers)
        own = {file: each for file, each in said.items() if each.names}
        if not own:
            _no_ids(largest, len(numbers), where[largest], data)
        first = next((own[file] for file in read if file in own), Said(Path(), [str(n) for n in range(largest + 1)]))
        classes = first.names
        coded = {file: _renumbered(file, index, own.get(file, first), first, remarks) for file, index in read.items()}
    found = {}
    for part, files in parts.items():
        labels = [np.array(coded[file], np.int64)[read[file].each] for file in files]
        found[part] = Stored.joined(read[file].stored for file in files), np.concatenate(labels)
    return Listing([class_text(name) for name in classes], found, [], passed, tuple(dict.fromkeys(remarks)))


def _no_ids(largest: int, different: int, file: Path, data: Data) -> None:
    """Raises UsageError for labels that are ids and no classes' numbers: a list of classes, and a model's head, as long
    as the largest id would take all memory."""
    if largest >= MANY_CLASSES and largest + 1 > max(2 * different, data.num_classes or 0):
        way_out = ""
        if largest < MOST_CLASSES:
            way_out = f"; or, if there are so many, set data.num_classes={largest + 1}"
        raise UsageError(
            f"{file} has the label {largest}, but data.root={data.root} has {different:,} different labels in all: "
            f"numbers that leave most classes without an image are ids. Number the classes from 0{way_out}"
        )


def _renumbered(file: Path, index: _Index, own: Said, first: Said, remarks: list[str]) -> list[int]:
    """Translates an archive's different labels into numbers of the first archive's class names.

    Raises:
        UsageError: a number that has no name, or names that the other archives do not have.
    """
    labels = [label for label in index.labels if isinstance(label, int)]
    if max(labels, default=-1) >= len(own.names):
        raise UsageError(
            f"{own.file} names {len(own.names):,} classes, but {file} has a label {max(labels)} (labels count from 0)"
        )
    if own.names == first.names:
        return labels
    odd = sorted(set(own.names) ^ set(first.names))
    if odd or len(set(own.names)) < len(own.names):
        raise UsageError(
            f"{first.file} and {own.file} name different classes"
            + (f": {told_apart(odd)}" if odd else ", and one of them twice")
        )
    remarks.append(f"{own.file} has the classes in another order than {first.file}; each is taken by its name")
    number = {name: i for i, name in enumerate(first.names)}
    return [number[own.names[label]] for label in labels]


def _no_copies(read: dict[Path, _Index]) -> None:
    """Raises UsageError for an archive that is there twice, as copy or link: equal in size, index and three images."""
    like: dict[Any, list[Path]] = defaultdict(list)
    for file, index in read.items():
        stored = index.stored
        columns = (stored.name, stored.offset, stored.size, index.each)
        like[file.stat().st_size, *(column[:4096].tobytes() for column in columns)].append(file)
    for files in like.values():
        seen: dict[Any, Path] = {}
        for file in files if len(files) > 1 else []:
            stored = read[file].stored
            some = {0, len(stored) // 2, len(stored) - 1} if len(stored) else ()
            twin = seen.setdefault(tuple(stored.read(i) for i in some), file)
            if twin is not file and some:
                raise UsageError(f"{twin} and {file} hold the same images; put one of them elsewhere")


def _indexed(file: Path, data: Data, said: Said | None) -> _Index:
    """The index of one archive: read once as long as the file's size and time stay as they are."""
    columns = said.columns if said is not None else None
    key = (data.format, file.resolve(), file.stat().st_size, file.stat().st_mtime_ns, data.label, columns)
    if key not in _indices:
        if data.format == "arrow":
            assert columns is not None
            images, labels = archives.arrow(file, *columns)
        else:
            read = {"webdataset": archives.webdataset, "tfds": archives.tfrecords}[str(data.format)]
            images, labels = read(file, data.label)
        known: dict[int | str, int] = {}
        each = np.fromiter((known.setdefault(label, len(known)) for label in labels), np.int32, len(labels))
        _indices[key] = _Index(Stored.ranges(file, images), list(known), each)
    return _indices[key]


_indices: dict[Any, _Index] = {}


def _said(files: Iterable[Path], data: Data) -> dict[Path, Said]:
    """Archive -> what the nearest description file of its format says of it.

    Raises:
        UsageError: one that cannot be read; an Arrow file that has none.
    """
    kinds = {
        "webdataset": "classnames.txt",
        "tfds": f"{data.label or 'label'}.labels.txt",
        "arrow": "dataset_info.json",
    }
    read: dict[Path, Said] = {}
    found = {}
    for file in files:
        place = _beside(file, Path(data.root), kinds[str(data.format)])
        if place is not None:
            if place not in read:
                read[place] = _features(place, data) if data.format == "arrow" else Said(place, _lines(place))
            found[file] = read[place]
        elif data.format == "arrow":
            raise UsageError(
                f"{file.parent} has no dataset_info.json with features; save_to_disk of Hugging Face writes it"
            )
    return found


def _lines(place: Path) -> list[str]:
    """The lines of a file with one name on each line."""
    text = read_text(place).rstrip()
    names = [line.strip() for line in text.split("\n")] if text else []
    if "" in names:
        raise UsageError(f"{place} has an empty line between its names; each line names a class, from number 0 on")
    return names


def _beside(file: Path, root: Path, name: str) -> Path | None:
    """The file of that name in the archive's folder, or in the nearest one above, up to data.root."""
    folders = [file.parent, *file.parent.parents][: len(file.relative_to(root).parts)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def read_text(file: Path) -> str:
    """A text file that belongs to a set.

    Raises:
        UsageError: not in UTF-8.
        OSError: it cannot be read.
    """
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not in UTF-8: byte {error.start} is 0x{raw[error.start]:02x}; save it again as UTF-8"
        ) from error
    if "\0" in text:
        raise UsageError(f"{file} is not in UTF-8 but looks like UTF-16; save it again as UTF-8")
    return text


def _features(place: Path, data: Data) -> Said:
    """The columns of images and labels in a dataset_info.json, and the names of the labels."""
    text = read_text(place)
    try:
        features = {str(name): each for name, each in json.loads(text)["features"].items() if isinstance(each, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{place} does not describe a data set") from error
    columns = _arrow_columns(features, data)
    names = features[columns[1]].get("names")
    return Said(place, [str(name) for name in names] if isinstance(names, list) else [], columns)


def _arrow_columns(features: dict[str, Any], data: Data) -> tuple[str, str]:
    """The one column of images and the one of class labels, or the one named."""
    kinds = {name: each.get("_type") for name, each in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [data.label] if data.label else [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1 or labels[0] not in features:
        raise UsageError(
            f"data.root={data.root} has columns {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}; one "
            "must be an Image, and one a ClassLabel or named by data.label"
        )
    return images[0], labels[0]
