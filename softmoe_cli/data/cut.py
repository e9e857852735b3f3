"""Which images of a set are held out, from their labels alone: torch is not needed to know it."""

from collections.abc import Mapping, Sequence

import numpy as np

from softmoe_cli.config.data import Data
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """For each class that has images, ascending, their numbers, ascending: in one pass, however many classes."""
    order = labels.argsort(kind="stable")
    counts = np.bincount(labels)
    return np.split(order, counts[counts > 0].cumsum()[:-1])


def hold_out(
    labels: np.ndarray, fraction: float, seed: int, key: str, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (kept, held out), both ascending: of every class the share `fraction`, rounded, at least one image.

    Raises:
        UsageError: a class with no image left for training.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    emptied = []
    for index in by_class(labels):
        count = max(1, round(len(index) * fraction))
        if count >= len(index):
            emptied.append((classes[int(labels[index[0]])], len(index)))
        held[rng.permutation(index)[:count]] = True
    if emptied:
        name, images = emptied[0]
        others = f" ({len(emptied) - 1} more classes have too few: {_some(emptied[1:])})" if emptied[1:] else ""
        rest = "" if key == "test_fraction" else " that are not for testing"
        raise UsageError(
            f"data.{key}={fraction:g} leaves no image of class {printable(name)} for training: it has {images} "
            f"in all{rest}{others}; add images (a class needs 3, or 2 beside test images of your own), take the class "
            "away, or bring train, val and test of your own, which nothing is taken from"
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _some(emptied: list[tuple[str, int]]) -> str:
    return ", ".join(printable(name) for name, _ in emptied[:5]) + (", …" if len(emptied) > 5 else "")


def cut(
    labels: Mapping[str, np.ndarray], classes: Sequence[str], data: Data
) -> dict[str, tuple[str, np.ndarray | None]]:
    """For train, validation and test the part on disk that it comes from, and the numbers of its images there; None:
    all of them. `labels` has the parts on disk: train, val and test, or train and val, or one of any name.

    Raises:
        UsageError: a class with no image left for training.
    """
    parts, share = list(labels), data.validation_fraction
    if parts == ["train", "val", "test"]:
        return {"train": ("train", None), "validation": ("val", None), "test": ("test", None)}
    if parts == ["train", "val"]:
        kept, held = hold_out(labels["train"], share, data.split_seed, "validation_fraction", classes)
        return {"train": ("train", kept), "validation": ("train", held), "test": ("val", None)}
    part = parts[0]
    if data.test_fraction == 1:
        nothing = np.arange(0)
        return {"train": (part, nothing), "validation": (part, nothing), "test": (part, None)}
    left, test = hold_out(labels[part], data.test_fraction, data.split_seed, "test_fraction", classes)
    kept, held = hold_out(labels[part][left], share, data.split_seed, "validation_fraction", classes)
    return {"train": (part, left[kept]), "validation": (part, left[held]), "test": (part, test)}
