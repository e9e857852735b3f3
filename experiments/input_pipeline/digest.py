"""Seconds to tell which images a set holds, before and after their contents counted.

python experiments/input_pipeline/digest.py [--images 100000] [--kib 40] [--folder FOLDER]

Writes files of random bytes that begin as JPEG does, in 100 class folders, and times: the listing alone; names and
sizes, as it was before; contents, with nothing of the files in the system's memory (cold) and with all of it (warm);
and the same again in the same process, or in a job of a sweep, where only sizes and times are looked at.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from softmoe_cli.data import contents
from softmoe_cli.data.folders import Listing
from softmoe_cli.data.listing import listing
from softmoe_cli.options.compose import compose


def write_images(root: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.bytes(size + count)
    for i in range(count):
        place = root / f"class_{i % 100:02}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:07}.jpg").write_bytes(b"\xff\xd8\xff" + noise[i : i + size * 3 // 4 + i * 37 % (size // 2)])


def names_and_sizes(found: Listing) -> None:
    for stored, _ in found.parts.values():
        for name in stored.name.tolist():
            os.stat(os.path.join(os.fsencode(stored.holders[0]), name))


def forget(found: Listing) -> None:
    """Asks the system to drop what it has of the files."""
    for stored, _ in found.parts.values():
        for i in range(len(stored)):
            file = os.open(stored.place(i), os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def timed(name: str, work: Callable[[], object]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    print(f"{name:<28} {time.perf_counter() - wall:6.2f} s, {time.process_time() - cpu:6.2f} s of CPU", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--kib", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="where the files are written, and left")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = (chosen.folder or Path(folder)) / f"{chosen.images}_{chosen.kib}"
        if not root.exists():
            write_images(root, chosen.images, chosen.kib * 1024)
            os.sync()
        data = compose("data=folder", f"data.root={root}", "data.image_size=224").data
        timed("listing", lambda: listing(data))
        found = listing(data)
        timed("names and sizes", lambda: names_and_sizes(found))
        forget(found)
        for state, last in (("cold", "cold"), ("warm", "warm"), ("known", "warm")):
            classes = [*found.classes, last]  # with another class it is another set, of which nothing is known yet
            timed(f"contents, {state}", partial(contents.digest, found.parts, classes))


if __name__ == "__main__":
    main()
