"""One digest of the images in a set and of what decides their classes.

The digest is the same for the same set at another place or on another machine; another picture, name, label, class or
part gives another digest. Times of files are therefore not part of it: they only tell whether a file has to be read
again.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from softmoe_cli.config.data import Data
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.found import idx_arrays, idx_paths
from softmoe_cli.data.listing import check_cut, usable
from softmoe_cli.errors import UsageError

READ_WHOLE = 256 * 2**10
"""Images of up to so many bytes are read whole: a disk takes as long to look for their pieces."""
PIECES, PIECE = 16, 2**10
"""Of a larger compressed image so many pieces of so many bytes are read, spread evenly from its first byte to its
last."""
COMPRESSED = (b"\xff\xd8\xff", b"\x89PNG")
"""The first bytes of a JPEG and of a PNG, of which pieces are enough: a PNG ends with a checksum of what it shows; the
size of a JPEG, and all that follows a change, depend on the picture. That is nearly always so: of 240 JPEGs of 330 KiB
with one changed block one kept its size and all pieces. Images of other formats, WebP and GIF too, are read whole."""
AT_ONCE, THREADS = 256, 16
"""Images that a thread reads one after the other; threads, which mostly wait for a disk or a network."""

KNOWN = "SOFTMOE_KNOWN_IMAGES"
"""A variable of the environment of a sweep's jobs: the digests that the launcher has found, so that not every job reads
the set anew."""

MANY = 50_000
"""From so many images on, a message says that they are being read: it took 6 s where this was measured."""

Parts = Mapping[str, tuple[Stored, np.ndarray]]

_known: dict[str, str] = {}
"""Digests of sets, each by a digest of everything that shows that no file has changed."""


def identity(data: Data, *, to_train: bool = False) -> str | None:
    """A digest of the images and of what decides their classes; None for the sets that are the same everywhere.

    Raises:
        UsageError: the files cannot be used; with `to_train`, also where a run could not cut them.
    """
    if data.sets is not None:
        of_each = [identity(own, to_train=to_train) for own in data.of_sets()]
        return hashlib.sha256(json.dumps(of_each).encode()).hexdigest() if any(of_each) else None
    data = data.made_of
    if data.name == "fashion_mnist" and data.format is None:  # files of these names hold other sets too
        return hashlib.sha256(b"".join(array.tobytes() for array in idx_arrays(data))).hexdigest()
    if data.format is None:
        return None
    listed = usable(data)
    if to_train:
        check_cut(listed, data)
    return digest(listed.parts, listed.classes)


def must_fetch(data: Data) -> bool:
    """Whether `identity` would have to fetch images first."""
    sets = [own.made_of for own in data.of_sets()]
    return any(own.name == "fashion_mnist" and own.format is None and not idx_paths(own) for own in sets)


def digest(parts: Parts, classes: Sequence[str]) -> str:
    """The digest of the classes' names and, part by part and in their order, of the images' labels, names and contents.

    Raises:
        UsageError: a file that cannot be read, or is none.
    """
    _known.update(pair.partition(":")[::2] for pair in os.environ.get(KNOWN, "").split())
    names = json.dumps([list(classes), {part: len(labels) for part, (_, labels) in parts.items()}]).encode()
    for stored, labels in parts.values():
        pairs = zip(labels.tolist(), stored.name.tolist(), strict=True)
        names += b"".join(b"%d %s\0" % pair for pair in pairs)
    unchanged = _sha256(names, *(_times(stored) for stored, _ in parts.values()))
    if unchanged not in _known:
        number = sum(len(labels) for _, labels in parts.values())
        if number >= MANY and os.environ.get("RANK", "0") == "0":
            said = f"softmoe: reading {number:,} images once, as what they hold is part of what a run is"
            print(said, file=sys.stderr)
        _known[unchanged] = _sha256(names, *(_pictures(stored) for stored, _ in parts.values()))
    return _known[unchanged]


def known() -> str:
    """All digests that this process knows, for the environment of other processes."""
    return " ".join(map(":".join, _known.items()))


def _sha256(*several: bytes) -> str:
    found = hashlib.sha256()
    for each in several:
        found.update(each)
    return found.hexdigest()


def _paths(stored: Stored) -> list[bytes]:
    """The file that each image lies in; without Path, which takes longer than to read a small file."""
    holders = [os.fsencode(holder) for holder in stored.holders]
    inside = (stored.offset >= 0).tolist()
    three = zip(stored.holder.tolist(), stored.name.tolist(), inside, strict=True)
    return [holders[holder] if packed else holders[holder] + b"/" + name for holder, name, packed in three]


def _times(stored: Stored) -> bytes:
    """Each holder's path, and each file's size, inode and times: the time of writing, which programs set as they like,
    and the time of any change, which the system sets. The device is left out: its number differs between the machines
    of a cluster."""
    numbers = []
    for path in dict.fromkeys(_paths(stored)):
        try:
            found = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        four = found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        numbers.append(b"%d %d %d %d\n" % four)  # of any size: times before 1970 are below 0
    ranges = [column.tobytes() for column in (stored.holder, stored.offset, stored.size)]
    return b"".join([*(os.fsencode(holder) + b"\0" for holder in stored.holders), *numbers, *ranges])


def _pictures(stored: Stored) -> bytes:
    """32 bytes for each image."""
    images = list(zip(_paths(stored), stored.offset.tolist(), stored.size.tolist(), strict=True))
    with ThreadPoolExecutor(THREADS) as pool:
        several = (images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE))
        return b"".join(pool.map(lambda some: b"".join(_picture(*image) for image in some), several))


def _picture(path: bytes, offset: int, size: int) -> bytes:
    """The digest of an image's size and of all its bytes, or of pieces; from `offset` on, or a whole file (-1)."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait
        try:
            if offset < 0:
                found = os.fstat(file)
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(0, "it is no file")
                offset, size = 0, found.st_size
            sha = hashlib.sha256(b"%d\n" % size)
            begin = os.pread(file, size if size <= READ_WHOLE else PIECE, offset)
            if size <= READ_WHOLE:
                sha.update(begin)
            elif begin.startswith(COMPRESSED):
                for i in range(PIECES):
                    sha.update(os.pread(file, PIECE, offset + (size - PIECE) * i // (PIECES - 1)))
            else:
                for start in range(0, size, 2**20):
                    sha.update(os.pread(file, min(2**20, size - start), offset + start))
            return sha.digest()
        finally:
            os.close(file)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: bytes, error: OSError) -> UsageError:
    return UsageError(f"{os.fsdecode(path)} cannot be read: {error.strerror}")
