"""Where a run stands, and how long it goes on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from softmoe_cli.config.run import Config
from softmoe_cli.optim import span_length
from softmoe_cli.stack.turns import clock
from softmoe_cli.text import several

BOOKED = ("device", "eval", "save", "compile", "load")


@dataclass
class Progress:
    """Where a run stands. Every checkpoint holds all of it; beside it only tensors are needed to go on."""

    step: int = 0
    compiled_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BOOKED, 0.0))
    """By what they went into; `load`, waiting for images, is a part of `device` and `compile`."""
    device_s: float = 0.0
    """Seconds of training, summed over the devices."""
    energy_j: float | None = 0.0
    landed: int = 0
    """Rows of experts that held a token in training (`Decided.landed`); of all layers and processes."""
    window: int = 0
    """Windows of pruning that have ended."""
    phases: list[list[float]] = field(default_factory=list)
    """What an image costs from which step on, where pruning has changed it: [step, `Cost.phase`...]."""
    loss_sum: float = 0.0
    aux_sum: float = 0.0
    loss_steps: int = 0
    logged: float = 0.0
    evaluated: float = 0.0
    best_step: int = 0
    best_top1_pct: float = -1.0
    validation: dict[str, float | str | None] = field(default_factory=dict)
    """The last validation row."""

    def used(self, energy: float | None) -> None:
        """Adds joules; None, where nobody has measured them, leaves the sum unknown."""
        self.energy_j = None if energy is None or self.energy_j is None else self.energy_j + energy

    def images_per_s(self, batch: int) -> float:
        """Of the updates that were not compiling."""
        return (self.step - self.compiled_steps) * batch / max(self.seconds["device"], 1e-9)

    def over_phases(self, batch: int, at_first: float, place: int) -> float:
        """The sum over all training images of what each took: `at_first`, and in later phases the number at `place`
        of `Cost.phase`."""
        starts = [0, *(int(phase[0]) for phase in self.phases), self.step]
        each = [at_first, *(phase[1 + place] for phase in self.phases)]
        spans = [end - start for start, end in pairwise(starts)]
        return sum(span * batch * number for span, number in zip(spans, each, strict=True))

    @property
    def changed_at(self) -> int:
        """The step at which pruning changed the model last; 0 where it did not."""
        return int(self.phases[-1][0]) if self.phases else 0

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by what they went into, and energy where the device tells."""
        energy = {} if self.energy_j is None else {"energy_kj": self.energy_j / 1000}
        return {f"{name}_s": s for name, s in (self.seconds | {"device": self.device_s}).items()} | energy

    @contextmanager
    def booked(self, what: str, devices: int = 1) -> Iterator[None]:
        """Books the time spent inside under `what`, so that training time is training only."""
        start = clock()
        try:
            yield
        finally:
            took = clock() - start
            self.book(what, took)
            if what == "device":
                self.device_s += took * devices

    def book(self, what: str, took: float) -> None:
        self.seconds[what] = self.seconds.get(what, 0.0) + took  # a checkpoint may know fewer parts

    def add_loss(self, loss: float, aux_loss: float) -> None:
        """Adds the losses of one more step, for the means of the next training row."""
        self.loss_sum, self.aux_sum, self.loss_steps = (
            self.loss_sum + loss,
            self.aux_sum + aux_loss,
            self.loss_steps + 1,
        )

    def mean_losses(self) -> dict[str, float]:
        """Mean losses over the steps since the last call; the call starts new means."""
        means = {"loss": self.loss_sum / self.loss_steps, "aux_loss": self.aux_sum / self.loss_steps}
        self.loss_sum, self.aux_sum, self.loss_steps = 0.0, 0.0, 0
        return means


def multiples(position: float, interval: float) -> int:
    """How many multiples of a span lie in (0, position], though the span is a product of floats: 0.07 * 100 is above
    7."""
    return math.floor(position / interval + 1e-9)


@dataclass(frozen=True)
class Budget:
    """How long a run trains: in updates, or in seconds of training."""

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, config: Config, train_images: int) -> "Budget":
        t = config.train
        if t.minutes is not None:
            return cls(None, 60 * t.minutes)
        by_epochs = round(train_images * (t.epochs or 0), 6)  # 100 * 1.1 is above 110
        images = t.images if t.images is not None else by_epochs
        return cls(t.steps if t.steps is not None else max(1, math.ceil(images / t.batch_size)), None)

    @property
    def total(self) -> float:
        return self.steps if self.steps is not None else self.seconds or 0.0

    def position(self, progress: Progress) -> float:
        """How much of the budget is used, in the unit of `total`."""
        return progress.step if self.steps is not None else progress.seconds["device"]

    def passed(self, before: float, now: float, every: float) -> bool:
        """Whether a multiple of the span `every`, or the end, lies in (before, now]."""
        interval = span_length(every, self.total)
        return multiples(now, interval) > multiples(before, interval) or (before < self.total <= now)

    def __str__(self) -> str:
        return several(self.steps, "step") if self.steps is not None else f"{self.total / 60:g} minutes"
