"""A folder per class, or a tar per class, or a tar of such folders: parts, classes and images in them."""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from softmoe_cli.data import archives
from softmoe_cli.data.archives import IMAGE_ENDINGS, Range, Stored, is_hidden, is_image, tar_images
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable

DATA_PARTS = ("train", "val", "test")
PART_FOLDER = re.compile(r"(train|val|test)(?:ing|id|idation)?", re.IGNORECASE)
HIDDEN_FILES, LOOSE, OTHERS = "hidden", "images beside the class folders", "files and folders beside the parts"

Tree = dict[str, Stored]
"""Class name -> its images, both sorted."""


@dataclass
class Passed:
    """Files that are not read, by kind (an ending, or a place): how many, and the first one."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, place: str | Path) -> None:
        count, first = self.kinds.get(kind, (0, str(place)))
        self.kinds[kind] = count + 1, min(first, str(place))

    def file(self, place: str) -> None:
        """Notes a file that is no image, or no archive, by its name."""
        ending = os.path.splitext(place)[1].lower()
        usual = re.fullmatch(r"\.[a-z0-9_~-]{1,10}", ending)
        self.add(ending if usual else "with other endings" if ending else "without an ending", place)

    def __str__(self) -> str:
        """The files in words, without the hidden files that programs keep for themselves."""
        return ", ".join(f"{count:,} {kind}" for kind, (count, _) in sorted(self.kinds.items()) if kind != HIDDEN_FILES)


@dataclass(frozen=True)
class Listing:
    """Images by part; a single part is called ""."""

    classes: list[str]
    parts: dict[str, tuple[Stored, np.ndarray]]
    """Part -> images, and the number of each one's class."""
    faults: list[str]
    """Sentences about classes that have no images, that not every part has, or that look alike; and about images that
    are none."""
    passed: Passed
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> dict[str, str]:
        """Word -> what the header of a run says of the set beside its sizes."""
        notes = {"passed over": f"{self.passed}; softmoe data check names them"} if str(self.passed) else {}
        first = next(iter(self.parts.values()))[1]
        empty = np.flatnonzero(np.bincount(first, minlength=len(self.classes)) == 0)
        if len(empty):
            some = ", ".join(printable(self.classes[i]) for i in empty[:3])
            if len(empty) > 3:
                some += ", …"
            notes["without images"] = f"{len(empty):,} of {len(self.classes):,} classes: {some}"
            if empty.tolist() == [0] and self.classes[:2] == ["0", "1"]:
                notes["without images"] += " (labels begin with 1)"
        return notes | ({"labels": "; ".join(self.remarks)} if self.remarks else {})


def appearance(name: str) -> str:
    """What people see of a name: one form of each letter, no zero-width letters, no spaces around it."""
    seen = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(seen.split())


def told_apart(names: Sequence[str]) -> str:
    """Some names; with their code points where two look alike."""
    looks = Counter(map(appearance, names))
    some = [f"{name!a}" if looks[appearance(name)] > 1 else printable(name) for name in names[:6]]
    if len(looks) == len(names):
        return ", ".join(some)
    return ", ".join(some) + " (they look alike, but are written with other characters; write them alike)"


def class_text(name: str) -> str:
    """A class's name as every file can hold it: bytes that are not UTF-8 as escapes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    return name


@dataclass
class _Walk:
    """What a walk through folders meets beside images."""

    passed: Passed = field(default_factory=Passed)
    broken: list[str] = field(default_factory=list)
    """Names of images that are no files: links that lead nowhere, pipes, devices."""


def folder(root: Path) -> Listing:
    walk = _Walk()
    if root.is_dir():
        trees = _folder_trees(root, walk)
    elif root.is_file() and root.suffix == ".tar":
        trees = _tar_trees(root, walk)
    else:
        nor_a_tar = ", nor a .tar of one" if root.exists() else ""
        raise UsageError(f"data.root={root} is not a folder{nor_a_tar}")
    classes = sorted({name for _, tree in trees.values() for name in tree})
    faults = [_empty(place / name) for place, tree in trees.values() for name in tree if not len(tree[name])]
    (first, tree), *others = trees.values()
    for place, other in others:
        odd = sorted(set(other) ^ set(tree))
        if odd:
            faults.append(f"{place} and {first} have different classes: {told_apart(odd)}")
    if walk.broken:
        more = f", and {len(walk.broken) - 1:,} others are too" if len(walk.broken) > 1 else ""
        broken = f"{min(walk.broken)} is a link that leads nowhere, a pipe or a device{more}"
        faults.insert(0, f"{broken}; get the image, or take it away")  # this may be why a class has no images
    numbers = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part, (_, tree) in trees.items():
        labels = [np.full(len(images), numbers[name], np.int64) for name, images in tree.items()]
        parts[part] = Stored.joined(tree.values()), np.concatenate(labels)
    return Listing([class_text(name) for name in classes], parts, faults, walk.passed)


def _empty(place: Path) -> str:
    return f"class folder {place} holds no image ({', '.join(IMAGE_ENDINGS)})"


def _folder_trees(root: Path, walk: _Walk) -> dict[str, tuple[Path, Tree]]:
    entries = _entries(root, walk.passed)
    folders = {path.name for path in entries if path.is_dir()}
    _named(root, folders)
    found = {part: root / part if part in folders else root / f"{part}.tar" for part in DATA_PARTS}
    found = {part: place for part, place in found.items() if place.exists()}
    if not found:
        return {"": (root, _tree(root, root, walk))}
    for path in entries:
        if path not in found.values():
            walk.passed.add(OTHERS, path)
    return {part: (found[lies], _tree(root, found[lies], walk)) for part, lies in parts_on_disk(root, found).items()}


def _named(root: Path, names: Iterable[str]) -> None:
    """Raises UsageError for folders that are parts under other names and would be taken for classes."""
    parts = [(name, part) for name in sorted(names) if (part := PART_FOLDER.fullmatch(name)) is not None]
    for name, part in parts:
        if name not in DATA_PARTS and (len(parts) > 1 or name.lower() in DATA_PARTS):  # a single "valid" may be a class
            raise UsageError(
                f"{root / name} must be called {part[1].lower()}, or it would be taken for a class; if it is one, "
                f"call it {name}_"
            )


def parts_on_disk(root: Path, found: Iterable[str]) -> dict[str, str]:
    """Part -> its name on disk. A test part beside train, without a val, serves as val: Hugging Face and Kaggle cut
    many sets like this."""
    parts = [part for part in DATA_PARTS if part in found]
    if parts == ["train", "test"]:
        return {"train": "train", "val": "test"}
    if parts not in (["train", "val"], ["train", "val", "test"]):
        named = f"; if {parts[0]} is a class, call it {parts[0]}_" if len(parts) == 1 else ""
        raise UsageError(
            f"data.root={root} has {' and '.join(parts)} only; it needs train and val (or test), or classes{named}"
        )
    return {part: part for part in parts}


def _tree(root: Path, place: Path, walk: _Walk) -> Tree:
    """The classes of a part: folders, or a tar for each, or folders inside a tar."""
    if place.is_file():
        return _by_folder(place, _images_of(place, walk), walk)
    entries = _entries(place, walk.passed)
    folders = [path for path in entries if path.is_dir()]
    tars = [path for path in entries if path.suffix == ".tar" and path.is_file()]
    packed = [tar for tar in tars if not (place / tar.stem).is_dir()]
    if folders and packed:
        raise UsageError(
            f"{place} has class folders, and {packed[0].name} beside them; unpack it, or put it elsewhere if it is "
            "no class"
        )
    for path in entries:
        if is_image(path.name) and path not in folders:
            walk.passed.add(LOOSE, path)
        elif folders and path in tars:
            walk.passed.add("unpacked .tar", path)
        elif path not in folders and path not in tars:
            walk.passed.file(str(path))
    if not folders and tars:
        return {tar.stem: Stored.ranges(tar, sorted(_images_of(tar, walk))) for tar in tars}
    tree = {folder.name: Stored.files(root, _images_in(root, folder, walk)) for folder in folders}
    if not tree:
        raise UsageError(f"{place} has no class folders; it needs one folder of images per class")
    return tree


def _entries(folder: Path, passed: Passed) -> list[Path]:
    entries = sorted(folder.iterdir())
    for path in entries:
        if is_hidden(path.name):
            passed.add(HIDDEN_FILES, path)
    return [path for path in entries if not is_hidden(path.name)]


def _images_in(root: Path, folder: Path, walk: _Walk) -> list[str]:
    """The images at any depth, below root."""
    above, found = len(str(folder)) - len(str(folder.relative_to(root))), []
    for path, whole in visible(folder, walk.passed):
        if not path.lower().endswith(IMAGE_ENDINGS):
            walk.passed.file(path)
        elif whole:
            found.append(path[above:])
        else:
            walk.broken.append(path)
    return sorted(found, key=lambda name: name.split("/"))


def visible(top: Path, passed: Passed) -> Iterator[tuple[str, bool]]:
    """Everything below a folder at any depth, and whether it is a regular file. Links are followed; a link that leads
    back up is followed once. Hidden names are passed over.

    Raises:
        OSError: a folder that cannot be read.
    """
    folders, seen = [str(top)], set()
    while folders:
        folder = folders.pop()
        if (real := os.path.realpath(folder)) in seen:
            continue
        seen.add(real)
        inner = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    passed.add(HIDDEN_FILES, entry.path)
                elif _is(entry, os.DirEntry.is_dir):
                    inner.append(entry.path)
                else:
                    yield entry.path, _is(entry, os.DirEntry.is_file)
        folders += sorted(inner, reverse=True)


def _is(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """False for links in a circle, and for those that lead where nobody may look."""
    try:
        return kind(entry)
    except OSError:
        return False


def _images_of(tar: Path, walk: _Walk) -> list[Range]:
    images, others = tar_images(tar)
    for name in others:
        if archives.any_hidden(name):
            walk.passed.add(HIDDEN_FILES, tar / name)
        else:
            walk.passed.file(f"{tar}/{name}")
    return images


def _tar_trees(root: Path, walk: _Walk) -> dict[str, tuple[Path, Tree]]:
    """Reads a tar as if it were the folder that was packed, with or without that folder's own name."""
    images = _images_of(root, walk)
    tops = {name.split("/")[0] for name, _, _ in images}
    if len(tops) == 1 and not tops & set(DATA_PARTS) and all(name.count("/") > 1 for name, _, _ in images):
        top = len(next(iter(tops))) + 1
        images = [(name[top:], offset, size) for name, offset, size in images]
        tops = {name.split("/")[0] for name, _, _ in images}
    _named(root, tops)
    if not tops & set(DATA_PARTS):
        return {"": (root, _by_folder(root, images, walk))}
    below: dict[str, list[Range]] = defaultdict(list)
    for name, at, size in images:
        part, _, rest = name.partition("/")
        if part in DATA_PARTS:
            below[part].append((rest, at, size))
        else:
            walk.passed.add(OTHERS, root / name)
    return {
        part: (root / lies, _by_folder(root, below[lies], walk)) for part, lies in parts_on_disk(root, below).items()
    }


def _by_folder(tar: Path, images: Sequence[Range], walk: _Walk) -> Tree:
    """The images, grouped by the first folder of their names."""
    tree: dict[str, list[Range]] = {}
    for image in sorted(images):
        folder, slash, _ = image[0].partition("/")
        if slash:
            tree.setdefault(folder, []).append(image)
        else:
            walk.passed.add(LOOSE, tar / image[0])
    if not tree:
        raise UsageError(f"{tar} has no class folders; it needs one folder of images per class")
    return {name: Stored.ranges(tar, tree[name]) for name in sorted(tree)}
