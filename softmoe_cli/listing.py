"""What lies at `data.root`: parts (train, val, test), classes, and the place and label of every image.

data.format=folder: a folder per class, or a tar per class, or a tar of such folders; in train/ and val/ (and test/),
or train.tar and val.tar, or one such tree. The other formats are sets of files whose names say the part.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli import archives
from softmoe_cli.archives import IMAGE_ENDINGS, Range, Stored, is_hidden, is_image, tar_images
from softmoe_cli.config import Data, UsageError

PARTS = ("train", "val", "test")
PART_WORD = re.compile(r"(?:^|[-_./])(train|val|test)(?:ing|id|idation)?(?=[-_./\d]|$)", re.IGNORECASE)
PART_FOLDER = re.compile(r"(train|val|test)(?:ing|id|idation)?", re.IGNORECASE)
NUMBERED = re.compile(r"(.*-)(\d+)(-of-(\d+).*)")
ENDINGS = {"webdataset": r"\.tar", "tfds": r"\.tfrecord-\d+-of-\d+", "arrow": r"\.arrow"}

Tree = dict[str, Stored]
"""Class name -> its images, both sorted."""


@dataclass(frozen=True)
class Listing:
    """Images by part; a single part is called ""."""

    classes: list[str]
    parts: dict[str, tuple[Stored, np.ndarray]]
    """Part -> images, and the number of each one's class."""
    faults: list[str]
    """Sentences about classes that have no images, or that not every part has."""


def listing(data: Data) -> Listing:
    """Lists the files of `data`; of archives it reads the index, and never image data.

    Raises:
        UsageError: files that are missing or damaged, or names that do not say which part they belong to.
    """
    return _folder(Path(data.root)) if data.format == "folder" else _shards(data)


# --- folders ----------------------------------------------------------------------------------------------------------


def _folder(root: Path) -> Listing:
    if root.is_dir():
        trees = _folder_trees(root)
    elif root.is_file() and root.suffix == ".tar":
        trees = _tar_trees(root)
    else:
        raise UsageError(f"data.root={root} is not a folder" + ", nor a .tar of one" * root.exists())
    classes = sorted({name for tree in trees.values() for name in tree})
    faults = [_empty(root / part / name) for part, tree in trees.items() for name in tree if not len(tree[name])]
    first, *others = trees
    for part in others:
        odd = sorted(set(trees[part]) ^ set(trees[first]))
        if odd:
            faults.append(f"{root / part} and {root / first} have different classes: {', '.join(odd[:5])}")
    if len(classes) < 2:
        faults.append(f"{root / first} has one class folder only, {classes[0]}; there is nothing to tell apart")
    numbers = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part, tree in trees.items():
        labels = [np.full(len(images), numbers[name], np.int64) for name, images in tree.items()]
        parts[part] = Stored.joined(tree.values()), np.concatenate(labels)
    return Listing(classes, parts, faults)


def _empty(place: Path) -> str:
    return f"class folder {place} holds no image ({', '.join(IMAGE_ENDINGS)})"


def _folder_trees(root: Path) -> dict[str, Tree]:
    names = [path.name for path in root.iterdir() if path.is_dir()]
    _named(root, names)
    found = {part: root / part if part in names else root / f"{part}.tar" for part in PARTS}
    found = {part: place for part, place in found.items() if place.exists()}
    _complete(root, list(found))
    return {part: _tree(root, place) for part, place in found.items()} or {"": _tree(root, root)}


def _named(root: Path, names: Iterable[str]) -> None:
    """Raises UsageError for parts by other names, which would be taken for classes."""
    parts = [(name, part) for name in sorted(names) if (part := PART_FOLDER.fullmatch(name)) is not None]
    for name, part in parts:
        if name not in PARTS and (len(parts) > 1 or name.lower() in PARTS):  # a single "valid" may be a class
            raise UsageError(
                f"{root / name} must be called {part[1].lower()}, or it would be taken for a class; if it is one, "
                f"call it {name}_"
            )


def _complete(root: Path, parts: list[str]) -> None:
    if parts and parts not in (["train", "val"], ["train", "val", "test"]):
        raise UsageError(f"data.root={root} has {' and '.join(parts)} only; it needs train and val, or classes")


def _tree(root: Path, place: Path) -> Tree:
    """The classes of a part: folders, or a tar for each, or folders inside a tar."""
    if place.is_file():
        return _by_folder(place, tar_images(place))
    try:
        folders = sorted(path for path in place.iterdir() if path.is_dir() and not is_hidden(path.name))
        tars = sorted(place.glob("*.tar"))
        packed = [tar for tar in tars if not (place / tar.stem).is_dir()]
        if folders and packed:
            raise UsageError(
                f"{place} has class folders, and {packed[0].name} beside them; unpack it, or put it elsewhere if it is "
                "no class"
            )
        if not folders and tars:
            return {tar.stem: Stored.ranges(tar, sorted(tar_images(tar))) for tar in tars}
        tree = {folder.name: Stored.files(root, _images_in(root, folder)) for folder in folders}
    except PermissionError as error:
        raise UsageError(f"{error.filename} cannot be read: no permission") from error
    if not tree:
        raise UsageError(f"{place} has no class folders; it needs one folder of images per class")
    return tree


def _images_in(root: Path, folder: Path) -> list[str]:
    """The images at any depth, below root, links followed; a link that leads back up is followed once."""
    found: list[str] = []
    seen: set[str] = set()
    for base, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        below = os.path.relpath(base, root)
        found += [f"{below}/{name}" for name in names if is_image(name)]
    return sorted(found, key=lambda name: name.split("/"))


def _raise(error: OSError) -> None:
    raise error


def _tar_trees(root: Path) -> dict[str, Tree]:
    """A tar as if it were the folder that was packed, with or without that folder's own name."""
    images = tar_images(root)
    tops = {name.split("/")[0] for name, _, _ in images}
    if len(tops) == 1 and not tops & set(PARTS) and all(name.count("/") > 1 for name, _, _ in images):
        top = len(next(iter(tops))) + 1
        images = [(name[top:], offset, size) for name, offset, size in images]
        tops = {name.split("/")[0] for name, _, _ in images}
    _named(root, tops)
    parts = [part for part in PARTS if part in tops]
    _complete(root, parts)

    def below(part: str) -> list[Range]:
        return [(name[len(part) + 1 :], at, size) for name, at, size in images if name.startswith(f"{part}/")]

    return {part: _by_folder(root, below(part)) for part in parts} or {"": _by_folder(root, images)}


def _by_folder(tar: Path, images: Sequence[Range]) -> Tree:
    """By the first folder of their names."""
    tree: dict[str, list[Range]] = {}
    for image in sorted(images):
        folder, slash, _ = image[0].partition("/")
        if slash:
            tree.setdefault(folder, []).append(image)
    if not tree:
        raise UsageError(f"{tar} has no class folders; it needs one folder of images per class")
    return {name: Stored.ranges(tar, tree[name]) for name in sorted(tree)}


# --- sets of archives -------------------------------------------------------------------------------------------------


def shards(data: Data) -> dict[str, list[Path]]:
    """Part -> its archives, by the last word train, val(id, idation) or test in their names below data.root.

    A single part is called ""; train and test alone are taken for train and val, as Hugging Face cuts many sets.

    Raises:
        UsageError: no archives, or names of which some say a part and some do not.
    """
    root = Path(data.root)
    if not root.is_dir():
        raise UsageError(f"data.root={data.root} is not a folder")
    assert data.format is not None
    ending = re.compile(rf".*{ENDINGS[data.format]}")
    files = sorted(path for path in root.rglob("*") if ending.fullmatch(path.name) and path.is_file())
    if data.format == "arrow":
        files, copies = [file for file in files if not file.name.startswith("cache-")], len(files)
        if copies and not files:  # map and filter leave such copies
            raise UsageError(f"data.root={data.root} holds cached copies only (cache-*.arrow); use save_to_disk")
    if not files:
        raise UsageError(f"data.root={data.root} holds no file of data.format={data.format} (*{ENDINGS[data.format]})")
    _whole(files)
    parts: dict[str, list[Path]] = {}
    for file in files:
        words = PART_WORD.findall(str(file.relative_to(root)))
        parts.setdefault(words[-1].lower() if words else "", []).append(file)
    if len(parts) == 1:
        return {"": files}
    if "" in parts:
        raise UsageError(f"{parts[''][0]} does not say whether it is train, val or test, while others do")
    if set(parts) == {"train", "test"}:
        return {"train": parts["train"], "val": parts["test"]}
    _complete(root, [part for part in PARTS if part in parts])
    return {part: parts[part] for part in PARTS if part in parts}


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


def _shards(data: Data) -> Listing:
    columns = _arrow_columns(Path(data.root), data.label) if data.format == "arrow" else None
    read = {part: [_indexed(file, data, columns) for file in files] for part, files in shards(data).items()}
    said = {label for part in read.values() for _, labels in part for label in labels}
    numbers, names = ([label for label in said if isinstance(label, kind)] for kind in (int, str))
    if not said or (numbers and names):
        raise UsageError(
            f"data.root={data.root} holds no image"
            if not said
            else f"data.root={data.root} has numbers for labels, such as {numbers[0]}, and names, such as {names[0]!r}"
        )
    classes = sorted(map(str, names)) if names else _class_names(data, int(max(numbers)) + 1)
    number = {name: i for i, name in enumerate(classes)}
    parts = {}
    for part, several in read.items():
        labels = [number[each] if isinstance(each, str) else each for _, some in several for each in some]
        parts[part] = Stored.joined(stored for stored, _ in several), np.array(labels, np.int64)
    return Listing(classes, parts, [])


def _indexed(file: Path, data: Data, columns: tuple[str, str] | None) -> tuple[Stored, list[int | str]]:
    """The index of one archive: read once as long as the file's size and time stay as they are."""
    key = (data.format, file.resolve(), file.stat().st_size, file.stat().st_mtime_ns, data.label, columns)
    if key not in _indices:
        if columns is not None:
            images, labels = archives.arrow(file, *columns)
        else:
            read = {"webdataset": archives.webdataset, "tfds": archives.tfrecords}[str(data.format)]
            images, labels = read(file, data.label)
        _indices[key] = Stored.ranges(file, images), labels
    return _indices[key]


_indices: dict[Any, tuple[Stored, list[int | str]]] = {}


def _class_names(data: Data, count: int) -> list[str]:
    """What the set says of its classes, else their numbers."""
    root = Path(data.root)
    if data.format == "arrow":
        names = _arrow_names(root, data.label)
    else:
        file = root / {"webdataset": "classnames.txt", "tfds": f"{data.label or 'label'}.labels.txt"}[str(data.format)]
        names = file.read_text().splitlines() if file.is_file() else []
    if names and len(names) < count:
        raise UsageError(f"data.root={data.root} names {len(names)} classes, but has a label {count - 1}")
    return names or [str(number) for number in range(count)]


def _arrow_features(root: Path) -> dict[str, Any]:
    for file in sorted(root.rglob("dataset_info.json")):
        try:
            features = json.loads(file.read_text())["features"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file} does not describe a data set") from error
        if isinstance(features, dict):
            return features
    raise UsageError(f"data.root={root} has no dataset_info.json with features; save_to_disk of Hugging Face writes it")


def _arrow_columns(root: Path, label: str | None) -> tuple[str, str]:
    """The one column of images and the one of class labels, or the one named."""
    features = _arrow_features(root)
    kinds = {name: each.get("_type") for name, each in features.items() if isinstance(each, dict)}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [label] if label else [name for name, kind in kinds.items() if kind == "ClassLabel"]
    if len(images) != 1 or len(labels) != 1 or labels[0] not in features:
        raise UsageError(
            f"data.root={root} has columns {', '.join(f'{name} ({kind})' for name, kind in kinds.items())}; one must "
            "be an Image, and one a ClassLabel or named by data.label"
        )
    return images[0], labels[0]


def _arrow_names(root: Path, label: str | None) -> list[str]:
    feature = _arrow_features(root)[_arrow_columns(root, label)[1]]
    return [str(name) for name in feature.get("names") or []]
