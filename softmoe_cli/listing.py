"""What lies at `data.root`: parts (train, val, test), classes, and the place and label of every image.

data.format=folder: a folder per class, or a tar per class, or a tar of such folders; in train/ and val/ (and test/),
or train.tar and val.tar, or one such tree. The other formats are sets of files whose names say the part.
What is visible and of one set is read; the rest is refused, or counted as passed over.
"""

import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli import archives
from softmoe_cli.archives import IMAGE_ENDINGS, Range, Stored, is_hidden, is_image, tar_images
from softmoe_cli.config import MOST_CLASSES, Data
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable

PARTS = ("train", "val", "test")
PART_WORD = re.compile(r"(?:^|[-_./])(train|val|test)(?:ing|id|idation)?(?=[-_./\d]|$)", re.IGNORECASE)
PART_FOLDER = re.compile(r"(train|val|test)(?:ing|id|idation)?", re.IGNORECASE)
NUMBERED = re.compile(r"(.*-)(\d+)(-of-(\d+).*)")
ENDINGS = {"webdataset": r"\.tar", "tfds": r"\.tfrecord-\d+-of-\d+", "arrow": r"\.arrow"}
MANY_CLASSES = 2**16
"""Above this, numbers that leave most classes without an image are ids and no classes (ImageNet-21k has 21,841)."""
HIDDEN, LOOSE, OTHERS = "hidden", "images beside the class folders", "files and folders beside the parts"

Tree = dict[str, Stored]
"""Class name -> its images, both sorted."""


@dataclass
class Passed:
    """What is not read, by kind (an ending, or a place): how many, and the first of them."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, kind: str, place: str | Path) -> None:
        count, first = self.kinds.get(kind, (0, str(place)))
        self.kinds[kind] = count + 1, min(first, str(place))

    def file(self, place: str) -> None:
        """One that is no image, or no archive, by its name."""
        ending = os.path.splitext(place)[1].lower()
        usual = re.fullmatch(r"\.[a-z0-9_~-]{1,10}", ending)
        self.add(ending if usual else "with other endings" if ending else "without an ending", place)

    def __str__(self) -> str:
        """Programs' own hidden files are no news."""
        return ", ".join(f"{count:,} {kind}" for kind, (count, _) in sorted(self.kinds.items()) if kind != HIDDEN)


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
            some = ", ".join(printable(self.classes[i]) for i in empty[:3]) + ", …" * (len(empty) > 3)
            notes["without images"] = f"{len(empty):,} of {len(self.classes):,} classes: {some}"
            if empty.tolist() == [0] and self.classes[:2] == ["0", "1"]:
                notes["without images"] += " (labels begin with 1)"
        return notes | ({"labels": "; ".join(self.remarks)} if self.remarks else {})


def listing(data: Data) -> Listing:
    """Lists the files of `data`; of archives it reads the index, and never image data.

    Raises:
        UsageError: files that are missing, damaged or may not be read, or names that do not say which part they
            belong to.
    """
    try:
        found = _folder(Path(data.root)) if data.format == "folder" else _shards(data)
    except OSError as error:
        raise UsageError(f"{error.filename or data.root} cannot be read: {error.strerror or error}") from error
    found.faults.extend(_alike(found.classes))
    return found


def _alike(classes: Iterable[str]) -> Iterator[str]:
    """Classes that are told apart by what nobody sees."""
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(_look(name), name)) != name:
            yield f"the classes {other!a} and {name!a} look alike; if they are one, write them alike"


def _look(name: str) -> str:
    """What people see of a name: one form of each letter, no zero-width letters, no spaces around it."""
    seen = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) not in ("Cf", "Cc"))
    return " ".join(seen.split())


def _told_apart(names: Sequence[str]) -> str:
    """Some names; with their code points where two look alike."""
    looks = Counter(map(_look, names))
    some = [f"{name!a}" if looks[_look(name)] > 1 else printable(name) for name in names[:6]]
    if len(looks) == len(names):
        return ", ".join(some)
    return ", ".join(some) + " (they look alike, but are written with other characters; write them alike)"


def _text(name: str) -> str:
    """A class's name as every file can hold it: bytes that are not UTF-8 as escapes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    return name


# --- folders ----------------------------------------------------------------------------------------------------------


@dataclass
class _Walk:
    """What is met on the way beside images."""

    passed: Passed = field(default_factory=Passed)
    broken: list[str] = field(default_factory=list)
    """By an image's name, what is none: links that lead nowhere, pipes, devices."""


def _folder(root: Path) -> Listing:
    walk = _Walk()
    if root.is_dir():
        trees = _folder_trees(root, walk)
    elif root.is_file() and root.suffix == ".tar":
        trees = _tar_trees(root, walk)
    else:
        raise UsageError(f"data.root={root} is not a folder" + ", nor a .tar of one" * root.exists())
    classes = sorted({name for _, tree in trees.values() for name in tree})
    faults = [_empty(place / name) for place, tree in trees.values() for name in tree if not len(tree[name])]
    (first, tree), *others = trees.values()
    for place, other in others:
        odd = sorted(set(other) ^ set(tree))
        if odd:
            faults.append(f"{place} and {first} have different classes: {_told_apart(odd)}")
    if len(classes) < 2:
        faults.append(f"{first} has one class folder only, {classes[0]}; there is nothing to tell apart")
    if walk.broken:
        more = f", and {len(walk.broken) - 1:,} others are too" if len(walk.broken) > 1 else ""
        broken = f"{min(walk.broken)} is a link that leads nowhere, a pipe or a device{more}"
        faults.insert(0, f"{broken}; get the image, or take it away")  # it may be why a class has none
    numbers = {name: number for number, name in enumerate(classes)}
    parts = {}
    for part, (_, tree) in trees.items():
        labels = [np.full(len(images), numbers[name], np.int64) for name, images in tree.items()]
        parts[part] = Stored.joined(tree.values()), np.concatenate(labels)
    return Listing([_text(name) for name in classes], parts, faults, walk.passed)


def _empty(place: Path) -> str:
    return f"class folder {place} holds no image ({', '.join(IMAGE_ENDINGS)})"


def _folder_trees(root: Path, walk: _Walk) -> dict[str, tuple[Path, Tree]]:
    entries = _entries(root, walk.passed)
    folders = {path.name for path in entries if path.is_dir()}
    _named(root, folders)
    found = {part: root / part if part in folders else root / f"{part}.tar" for part in PARTS}
    found = {part: place for part, place in found.items() if place.exists()}
    if not found:
        return {"": (root, _tree(root, root, walk))}
    for path in entries:
        if path not in found.values():
            walk.passed.add(OTHERS, path)
    return {part: (found[lies], _tree(root, found[lies], walk)) for part, lies in _complete(root, found).items()}


def _named(root: Path, names: Iterable[str]) -> None:
    """Raises UsageError for parts by other names, which would be taken for classes."""
    parts = [(name, part) for name in sorted(names) if (part := PART_FOLDER.fullmatch(name)) is not None]
    for name, part in parts:
        if name not in PARTS and (len(parts) > 1 or name.lower() in PARTS):  # a single "valid" may be a class
            raise UsageError(
                f"{root / name} must be called {part[1].lower()}, or it would be taken for a class; if it is one, "
                f"call it {name}_"
            )


def _complete(root: Path, found: Iterable[str]) -> dict[str, str]:
    """Part -> what it is called on disk: test alone beside train is val, as Hugging Face and Kaggle cut many sets."""
    parts = [part for part in PARTS if part in found]
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
            passed.add(HIDDEN, path)
    return [path for path in entries if not is_hidden(path.name)]


def _images_in(root: Path, folder: Path, walk: _Walk) -> list[str]:
    """The images at any depth, below root."""
    above, found = len(str(folder)) - len(str(folder.relative_to(root))), []
    for path, whole in _visible(folder, walk.passed):
        if not path.lower().endswith(IMAGE_ENDINGS):
            walk.passed.file(path)
        elif whole:
            found.append(path[above:])
        else:
            walk.broken.append(path)
    return sorted(found, key=lambda name: name.split("/"))


def _visible(top: Path, passed: Passed) -> Iterator[tuple[str, bool]]:
    """What lies below a folder at any depth, and whether it is a regular file; links are followed, one that leads back
    up once. What is hidden is passed over.

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
                    passed.add(HIDDEN, entry.path)
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
            walk.passed.add(HIDDEN, tar / name)
        else:
            walk.passed.file(f"{tar}/{name}")
    return images


def _tar_trees(root: Path, walk: _Walk) -> dict[str, tuple[Path, Tree]]:
    """A tar as if it were the folder that was packed, with or without that folder's own name."""
    images = _images_of(root, walk)
    tops = {name.split("/")[0] for name, _, _ in images}
    if len(tops) == 1 and not tops & set(PARTS) and all(name.count("/") > 1 for name, _, _ in images):
        top = len(next(iter(tops))) + 1
        images = [(name[top:], offset, size) for name, offset, size in images]
        tops = {name.split("/")[0] for name, _, _ in images}
    _named(root, tops)
    if not tops & set(PARTS):
        return {"": (root, _by_folder(root, images, walk))}
    below: dict[str, list[Range]] = defaultdict(list)
    for name, at, size in images:
        part, _, rest = name.partition("/")
        if part in PARTS:
            below[part].append((rest, at, size))
        else:
            walk.passed.add(OTHERS, root / name)
    return {part: (root / lies, _by_folder(root, below[lies], walk)) for part, lies in _complete(root, below).items()}


def _by_folder(tar: Path, images: Sequence[Range], walk: _Walk) -> Tree:
    """By the first folder of their names."""
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


# --- sets of archives -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a file beside the archives says of them: the classes' names, and the columns of images and of labels."""

    file: Path
    names: list[str]
    columns: tuple[str, str] | None = None


def shards(data: Data, passed: Passed) -> dict[str, list[Path]]:
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
    for place, whole in _visible(root, passed):
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
    return {part: parts[lies] for part, lies in _complete(root, parts).items()}


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


def _shards(data: Data) -> Listing:
    passed = Passed()
    parts = shards(data, passed)
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
    return Listing([_text(name) for name in classes], found, [], passed, tuple(dict.fromkeys(remarks)))


def _no_ids(largest: int, different: int, file: Path, data: Data) -> None:
    """Raises UsageError for numbers that are no classes' numbers: a list of classes, and a model's head, as wide as
    they are large would take all memory."""
    if largest >= MANY_CLASSES and largest + 1 > max(2 * different, data.num_classes or 0):
        way_out = f"; or, if there are so many, set data.num_classes={largest + 1}" * (largest < MOST_CLASSES)
        raise UsageError(
            f"{file} has the label {largest}, but data.root={data.root} has {different:,} different labels in all: "
            f"numbers that leave most classes without an image are ids. Number the classes from 0{way_out}"
        )


def _renumbered(file: Path, index: _Index, own: Said, first: Said, remarks: list[str]) -> list[int]:
    """An archive's different labels as numbers of the first one's names.

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
            + (f": {_told_apart(odd)}" if odd else ", and one of them twice")
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
    """What is said of each archive in the nearest file of the kind that its format has.

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
    """A name a line."""
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
