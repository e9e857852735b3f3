"""How a run is asked to stop."""

import signal
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from softmoe_cli.parallel import ALONE, Crew
from softmoe_cli.signals import ASKING, CURSOR, Asked, heard, leave_now, tell

T = TypeVar("T")


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and the rest of a sweep with it."""


class Stop(Asked):
    """SIGTERM, SIGINT and SIGUSR1 ask the run to save and leave, whichever process they reach; a second SIGINT or
    SIGTERM leaves at once, whatever torch is doing."""

    def __init__(self, crew: Crew = ALONE) -> None:
        super().__init__()
        self._crew = crew
        self._checked, self._step_s = time.monotonic(), 0.0

    def __enter__(self) -> "Stop":
        self._heard = heard(ASKING, self.hear)
        self._heard.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heard.__exit__(*error)

    def hear(self, number: int) -> None:
        first = self.name is None
        if self.again(number):
            leave_now(130, "\nleft at once; the same command goes on from the last checkpoint\n", CURSOR)
        if first and self._crew.first:
            so_far = time.monotonic() - self._checked
            words = ""
            if max(so_far, self._step_s) >= 1:
                last = f", the one before {self._step_s:.0f} s" if self._step_s >= 1 else ""
                words = f" after this step, which has taken {so_far:.0f} s so far{last}"
            tell(
                f"\n{self.name}: saving and leaving{words}; press Ctrl-C again to leave at once, from the last "
                "checkpoint\n"
            )

    def check(self) -> None:
        """Called between two steps, or two batches of an evaluation.

        Raises:
            Interrupted: some process of the run was asked to stop.
        """
        now = time.monotonic()
        self._checked, self._step_s = now, now - self._checked
        number = self._crew.largest_of_all(signal.Signals[self.name] if self.name is not None else 0)
        if number:
            raise Interrupted(signal.Signals(int(number)).name)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, with a check before each."""
        for item in items:
            self.check()
            yield item
