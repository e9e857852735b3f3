"""What lies at `data.root`: parts (train, val, test), classes, and the place and label of every image.

data.format=folder: a folder per class, or a tar per class, or a tar of such folders; in train/ and val/ (and test/), or
train.tar and val.tar, or one such tree. The other formats are sets of files whose names say the part. Visible files of
one set are read; other files are refused, or counted as passed over.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from softmoe_cli.config.data import Data
from softmoe_cli.data.cut import cut
from softmoe_cli.data.folders import Listing, appearance, folder
from softmoe_cli.data.shards import shards
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable


def listing(data: Data) -> Listing:
    """Lists the files of `data`; of archives it reads the index, and never image data.

    Raises:
        UsageError: files that are missing, damaged or may not be read, or names that do not say which part they
            belong to.
    """
    try:
        listed = folder(Path(data.root)) if data.format == "folder" else shards(data)
    except OSError as error:
        raise UsageError(f"{error.filename or data.root} cannot be read: {error.strerror or error}") from error
    if len(listed.classes) < 2:
        one = f"one {'class folder' if data.format == 'folder' else 'class'} only, {printable(listed.classes[0])}"
        listed.faults.append(f"data.root={data.root} has {one}; there is nothing to tell apart")
    listed.faults.extend(_alike(listed.classes))
    return listed


def usable(data: Data) -> Listing:
    """The listing of a set that can be used for training or evaluation.

    Raises:
        UsageError: the files have a fault.
    """
    listed = listing(data)
    if listed.faults:
        raise UsageError(listed.faults[0])
    return listed


def check_cut(listed: Listing, data: Data) -> None:
    """Raises UsageError if a set cannot be cut for a run: a class has too few images, or there are too many classes."""
    cut({part: labels for part, (_, labels) in listed.parts.items()}, listed.classes, data)
    check_num_classes(data, listed.classes)


def check_num_classes(data: Data, classes: Sequence[str]) -> None:
    """Raises UsageError if there are more classes than data.num_classes says."""
    if data.num_classes is not None and data.num_classes < len(classes):
        raise UsageError(f"data.num_classes={data.num_classes} is less than the {len(classes)} classes found")


def _alike(classes: Iterable[str]) -> Iterator[str]:
    """Sentences about classes whose names look the same."""
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(appearance(name), name)) != name:
            yield f"the classes {other!a} and {name!a} look alike; if they are one, write them alike"
