"""A mix of two sets that is small enough for tests: the digits, and clothes that are random pixels."""

from pathlib import Path

import numpy as np

from tests.conftest import TINY

NUMBERS = {"train": 120, "t10k": 40}


def write_clothes(folder: Path, seed: int = 0) -> Path:
    """The four files of Fashion-MNIST with few images, ten classes in turn, each with a mean brightness of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for part, n in NUMBERS.items():
        labels = (np.arange(n) % 10).astype(np.uint8)
        images = (rng.integers(0, 30, (n, 28, 28)) + 20 * labels[:, None, None]).astype(np.uint8)
        for kind, array, code in (("images-idx3", images, 3), ("labels-idx1", labels, 1)):
            head = bytes([0, 0, 8, code]) + np.array(array.shape, dtype=">u4").tobytes()
            (folder / f"{part}-{kind}-ubyte").write_bytes(head + array.tobytes())
    return folder


def mix(root: Path, *overrides: str) -> list[str]:
    """Overrides of a tiny run on both sets."""
    return [
        *TINY, "data=mix", "data.sets=[digits,fashion_mnist]", f"data.root={root}", "data.image_size=8",
        "model/router=task_choice", *overrides,
    ]  # fmt: skip
