"""Which images a training batch has: a function of (seed, step), so that a resumed run sees the same ones."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from softmoe_cli.data.mix import MixedSet, task_shares

CHAPTER = 256
"""Steps whose tasks are drawn at once. How often each task was drawn before a step is then soon added up."""


def purpose_seed(seed: int, *purpose: int) -> int:
    """A seed of its own for each purpose of a run's seed."""
    return int(np.random.SeedSequence((seed, *purpose)).generate_state(1, np.uint64)[0]) >> 1


ORDER, CHANGE, MIX, ERASE, CUT, TASK, VIEW = range(7)
"""What chance is drawn for."""


class Epochs:
    """The numbers of `length` images, shuffled epochs laid end to end, each a function of (seed, epoch) and, in a mix,
    of the `task`."""

    def __init__(self, length: int, seed: int, *task: int) -> None:
        self.length, self._seed, self._task = length, seed, task
        self._epoch, self._order = -1, torch.empty(0)

    def between(self, start: int, stop: int) -> Int64[Tensor, " b"]:
        """Those at the places from `start` up to, not including, `stop`."""
        pieces = [torch.empty(0, dtype=torch.int64)] if start == stop else []
        while start < stop:
            epoch = start // self.length
            if epoch != self._epoch:
                chance = torch.Generator().manual_seed(purpose_seed(self._seed, ORDER, epoch, *self._task))
                self._epoch, self._order = epoch, torch.randperm(self.length, generator=chance)
            end = min(stop, (epoch + 1) * self.length)
            pieces.append(self._order[start - epoch * self.length : end - epoch * self.length])
            start = end
        return torch.cat(pieces)


def stream(length: int, batch_size: int, seed: int, first_step: int) -> Iterator[Int64[Tensor, " b"]]:
    """Indices of batch after batch."""
    epochs = Epochs(length, seed)
    for step in range(first_step, 2**62):
        yield epochs.between(step * batch_size, (step + 1) * batch_size)


class TaskDraws:
    """The task of every image that training sees: drawn independently, by `mix.task_shares`."""

    def __init__(self, images: MixedSet, temperature: float | str, batch_size: int, seed: int) -> None:
        self.of_task = [torch.nonzero(images.tasks == task)[:, 0] for task in range(len(images.parts))]
        self._p = task_shares([len(own) for own in self.of_task], temperature).numpy()
        self._batch, self._seed = batch_size, seed

    def _chapter(self, chapter: int) -> tuple[np.ndarray, np.random.Generator]:
        """How often each task comes in a chapter; the generator then draws in which order, which together is the same
        as one after the other."""
        rng = np.random.default_rng((self._seed, TASK, chapter))
        return rng.multinomial(CHAPTER * self._batch, self._p), rng

    def _ordered(self, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(np.repeat(np.arange(len(counts)), counts))

    def before(self, step: int) -> Int64[Tensor, " t"]:
        """How many images of each task the batches before a step have."""
        chapters, rest = divmod(step, CHAPTER)
        drawn = np.zeros(len(self._p), dtype=np.int64)
        for chapter in range(chapters):
            drawn += self._chapter(chapter)[0]
        begun = self._ordered(*self._chapter(chapters))[: rest * self._batch]
        return torch.from_numpy(drawn + np.bincount(begun, minlength=len(drawn)))

    def batches(self, first_step: int) -> Iterator[Int64[Tensor, " b"]]:
        """The tasks of batch after batch, from this step on."""
        chapters, rest = divmod(first_step, CHAPTER)
        for chapter in range(chapters, 2**62):
            tasks = torch.from_numpy(self._ordered(*self._chapter(chapter)))
            yield from tasks.split(self._batch)[rest if chapter == chapters else 0 :]


def mixed_stream(draws: TaskDraws, seed: int, first_step: int) -> Iterator[Int64[Tensor, " b"]]:
    """Indices of batch after batch of a mix: the images of each task come in shuffled epochs of its own."""
    epochs = [Epochs(len(own), seed, task) for task, own in enumerate(draws.of_task)]
    drawn: list[int] = draws.before(first_step).tolist()
    for tasks in draws.batches(first_step):
        index = torch.empty_like(tasks)
        for task, own in enumerate(draws.of_task):
            here = tasks == task
            start, drawn[task] = drawn[task], drawn[task] + int(here.sum())
            index[here] = own[epochs[task].between(start, drawn[task])]
        yield index
