"""Several sets as one: every image knows which set it is of, which is its task. The task is never taken from a label:
a set is known before anything is said about an image."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from softmoe_cli.config.data import Data
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.errors import UsageError


def _nothing() -> Int64[Tensor, " n"]:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class MixedSet(ImageSet):
    """Images of several sets, all of them decoded. Labels count through the classes of all sets; `side` and `channels`
    are the largest.

    Attributes:
        parts: the sets, in the order of their tasks.
        tasks: which of them each image is of.
        places: its number there.
    """

    parts: tuple[ImageSet, ...] = ()
    tasks: Int64[Tensor, " n"] = field(default_factory=_nothing)
    places: Int64[Tensor, " n"] = field(default_factory=_nothing)

    def subset(self, index: np.ndarray) -> "MixedSet":
        chosen = torch.as_tensor(index)
        return replace(
            self, labels=self.labels[chosen], tasks=self.tasks[chosen], places=self.places[chosen]
        )  # fmt: skip

    def of_task(self, task: int) -> "MixedSet":
        """Its images of one task, in their order."""
        return self.subset(torch.nonzero(self.tasks == task)[:, 0].numpy())


def class_of_task(task: str, name: str) -> str:
    """What a class of a task is called among the classes of all tasks."""
    return f"{task}/{name}"


def classes_of_task(task: str, classes: Sequence[str]) -> list[str]:
    """The classes of a task by their own names, of all classes."""
    return [name.removeprefix(f"{task}/") for name in classes if name.startswith(f"{task}/")]


def mixed(data: Data, each: Sequence[Splits]) -> Splits:
    """The sets of a mix, read and cut one by one, as one. Validation and test images come in an order drawn once for
    all runs, so that the first batch has images of all tasks.

    Raises:
        UsageError: one of them lacks a part, is not in memory, or has other classes than it says.
    """
    names = list(data.sets)
    for own, splits in zip(data.of_sets(), each, strict=True):
        for part in ("train", "validation", "test"):
            images: ImageSet = getattr(splits, part)
            if not len(images):
                raise UsageError(f"data.sets, {own.name}: there are no {part} images, which each task needs")
            if images.images is None:
                raise UsageError(
                    f"data.sets, {own.name}: its images do not fit into data.memory_gib={data.memory_gib:g}, and a mix "
                    "is trained from memory; raise that, or lower the set's image_size"
                )
        if len(splits.classes) != own.num_classes:
            raise UsageError(
                f"data.sets, {own.name}: num_classes={own.num_classes}, and its files have {len(splits.classes)}"
            )
    counts = [len(splits.classes) for splits in each]
    parts = {key: _joined([getattr(s, key) for s in each], counts) for key in ("train", "validation", "test")}
    for key in ("validation", "test"):
        parts[key] = parts[key].subset(np.random.default_rng(0).permutation(len(parts[key])))
    classes = [
        class_of_task(task, name) for task, splits in zip(names, each, strict=True) for name in splits.classes
    ]  # fmt: skip
    sizes = ", ".join(
        f"{task} {len(s.train):,} / {len(s.validation):,} / {len(s.test):,}"
        for task, s in zip(names, each, strict=True)
    )
    notes = {"tasks": sizes} | {key: text for splits in each for key, text in splits.notes.items()}
    return Splits(**parts, classes=classes, notes=notes, test_is_cut=any(splits.test_is_cut for splits in each))


def _joined(parts: Sequence[ImageSet], classes: Sequence[int]) -> MixedSet:
    """One part of all sets: set after set, `classes` being the number of each one's."""
    first = np.cumsum([0, *classes[:-1]]).tolist()
    return MixedSet(
        labels=torch.cat([part.labels + start for part, start in zip(parts, first, strict=True)]),
        images=None,
        side=max(part.side for part in parts),
        channels=max(part.channels for part in parts),
        parts=tuple(parts),
        tasks=torch.cat([torch.full_like(part.labels, task) for task, part in enumerate(parts)]),
        places=torch.cat([torch.arange(len(part)) for part in parts]),
    )


def task_shares(sizes: Sequence[int], temperature: float | str) -> Float64[Tensor, " t"]:
    """How large a share of all draws each set of so many images gets: in proportion to size^(1/temperature); `inf`: all
    the same (Kudugunta et al., 2021, https://arxiv.org/abs/2110.03742, Section 4.1)."""
    power = 0.0 if temperature == "inf" else min(1 / float(temperature), 1e300)  # near 0: the largest alone
    logits = power * torch.tensor(sizes, dtype=torch.float64).log()  # a power of a large number might be infinite
    return logits.softmax(dim=0)
