"""The images of `data.name`, divided into training, validation and test images."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from softmoe_cli.config.data import Data
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.cache import cached
from softmoe_cli.data.decode import squares
from softmoe_cli.data.exemplars import exemplars
from softmoe_cli.data.folders import told_apart
from softmoe_cli.data.found import IDX_NAMES, idx_paths
from softmoe_cli.data.known import cifar, cifar_part, digits, fashion_mnist
from softmoe_cli.data.listing import check_num_classes, usable
from softmoe_cli.data.mix import classes_of_task, mixed
from softmoe_cli.data.splits import ImageSet, Splits, split
from softmoe_cli.errors import UsageError


def num_classes(data: Data, splits: Splits) -> int:
    """The width of the head: as the configuration says, else as many as the images have."""
    return data.num_classes or len(splits.classes)


def load(data: Data) -> Splits:
    """Reads the set that `data` names and cuts it.

    Raises:
        UsageError: files that are missing, unreadable or damaged, or too few of them; the message names them.
    """
    if data.sets is not None:
        return mixed(data, [_of_a_mix(own) for own in data.of_sets()])
    splits = _read(data)
    check_num_classes(data, splits.classes)
    return splits


def _of_a_mix(own: Data) -> Splits:
    try:
        return load(own)
    except UsageError as error:
        raise UsageError(f"data.sets, {own.name}: {error}") from error


def load_of_task(own: Data, known: Sequence[str]) -> Splits:
    """Reads the set of one task of a checkpoint, which knows the classes `known` of all its tasks.

    Raises:
        UsageError: as `load`; or the set has other classes than the task, or has them in another order.
    """
    splits, classes = load(own), classes_of_task(own.name, known)
    if splits.classes != classes:
        odd = sorted(set(splits.classes) ^ set(classes))
        has = f"other classes than the checkpoint's task: {told_apart(odd)}" if odd else "the classes in another order"
        raise UsageError(
            f"data.sets, {own.name}: its files have {has}; get those that the checkpoint was trained on, or evaluate "
            f"these alone, with task={own.name}"
        )
    return splits


def _read(data: Data) -> Splits:
    if data.source is not None:
        return exemplars(load(replace(data.made_of, memory_gib=0)), data)  # the taken images alone are decoded
    readers = {"digits": digits, "fashion_mnist": fashion_mnist, "cifar10": cifar, "cifar100": cifar}
    return _stored(data) if data.format is not None else readers[data.name](data)


def is_here(data: Data) -> bool:
    """Whether a set can be read as it lies there, with nothing fetched."""
    if data.sets is not None:
        return all(map(is_here, data.of_sets()))
    data = data.made_of
    if data.format is not None or data.name == "digits":
        return True
    if data.name == "fashion_mnist":
        return len(idx_paths(data)) == len(IDX_NAMES)
    return cifar_part(data, train=False) is not None


def _stored(data: Data) -> Splits:
    """train, val and test as they are; or train and val; or one set, which is split.

    With train and val alone, val is the test set, as ImageNet's is in practice, and validation images are held out of
    train, so that nothing is chosen on what is reported. Files lie class by class; validation and test images come in
    an order drawn once for all runs, so that the first batch, and every group of images, has many classes.
    """
    listed = usable(data)
    total = sum(len(labels) for _, labels in listed.parts.values())
    in_memory = not data.from_file and total * data.channels * data.image_size**2 <= data.memory_gib * 2**30
    on_disk = {} if data.cache is None else cached(listed, data)

    def of(part: str, stored: Stored, labels: np.ndarray) -> ImageSet:
        images = on_disk[part] if on_disk else squares(stored, data) if in_memory else None
        return ImageSet(torch.from_numpy(labels), images, data.image_size, data.channels, stored)

    sets = {part: of(part, *lies) for part, lies in listed.parts.items()}
    splits = split(sets, listed.classes, data)

    def mixed(images: ImageSet) -> ImageSet:
        return images.subset(np.random.default_rng(0).permutation(len(images)))

    return replace(splits, validation=mixed(splits.validation), test=mixed(splits.test), notes=listed.notes)
