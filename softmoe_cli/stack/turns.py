"""Several runs in one process. Each is as alone, in a thread of its own, and has its turns: one goes on until it hands
in a batch, then the next; when all have, one pass is made for all, in the main thread.

A turn has everything that a process would have for itself: the random state, standard output and error. A signal is
heard in the main thread and passed on to every run.
"""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from softmoe_cli.run.checkpoint import random_state, set_random_state
from softmoe_cli.signals import ASKING, heard, pass_on
from softmoe_cli.stack.passing import Handed, Returned, Stack, own_draws

_own = threading.local()


class Member:
    """One of the runs."""

    def __init__(self, work: Callable[[], None], out: TextIO, back: threading.Semaphore, at_once: int) -> None:
        self.at_once = at_once
        """How many runs began together."""
        self.random = random_state()
        self.away = 0.0
        """Seconds that others had: they are not this run's."""
        self.handed: Handed | None = None
        self.answer: Returned | Exception | None = None
        self.took = 0.0
        """Seconds of the last pass that are this run's."""
        self.prepared = 0.0
        """Seconds in which passes were written down, as far as they are this run's and nobody has booked them."""
        self.threads = 1
        """With so many this run computes."""
        self.together: Sequence[Member] = ()
        """All runs of the process."""
        self.ended = False
        self._work, self._out, self._back = work, out, back
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._begin, daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        _own.member = self
        self._turn.acquire()
        try:
            self._work()
        finally:
            self.ended = True
            self._back.release()

    def passed(self, handed: Handed) -> Returned | None:
        """Hands in a batch, and waits until the pass is made. None where no other run is left, and so nothing was
        computed."""
        start = time.perf_counter()
        self.handed, self.took, self.threads = handed, 0.0, torch.get_num_threads()
        self._back.release()
        self._turn.acquire()
        self.away += time.perf_counter() - start - self.took
        answer, self.answer = self.answer, None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def go_on(self) -> None:
        """Gives the run its turn; returns when that is over."""
        self.handed = None
        set_random_state(self.random)
        sys.stdout = sys.stderr = self._out
        self._turn.release()
        self._back.acquire()
        self.random = random_state()


def member() -> Member | None:
    """The run whose thread this is; None where a process has one run."""
    return getattr(_own, "member", None)


def at_once() -> int:
    """How many runs began together in this process."""
    own = member()
    return 1 if own is None else own.at_once


def going_on() -> int:
    """How many runs of this process have not ended."""
    own = member()
    return 1 if own is None else sum(not each.ended for each in own.together)


def prepared_s() -> float:
    """Seconds since the last call in which passes were written down, as far as they are this run's. `clock` does not
    count them."""
    own = member()
    if own is None:
        return 0.0
    took, own.prepared = own.prepared, 0.0
    return took


def clock() -> float:
    """Seconds for differences: of a run that has turns, those that were its own."""
    own = member()
    return time.perf_counter() - (0.0 if own is None else own.away)


def in_turns(works: Sequence[Callable[[], None]], outs: Sequence[TextIO]) -> None:
    """Runs all of them to their ends, each with its own output."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX: threads share the main one's memory, and what is freed there is used again
    back, streams = threading.Semaphore(0), (sys.stdout, sys.stderr)
    members = [Member(work, out, back, len(works)) for work, out in zip(works, outs, strict=True)]
    for each in members:
        each.together = members
    stack: Stack | None = None
    try:
        with heard(ASKING, pass_on):
            for each in members:
                each.go_on()
            while waiting := [each for each in members if each.handed is not None]:
                if len(waiting) > 1:
                    stack = _pass(waiting, stack)
                for each in waiting:
                    each.go_on()
    finally:
        sys.stdout, sys.stderr = streams


def _pass(waiting: Sequence[Member], stack: Stack | None) -> Stack | None:
    """Makes one pass for all who wait, with the stack of the last pass where it is of the same runs."""
    handed = [each.handed for each in waiting if each.handed is not None]
    torch.set_num_threads(waiting[0].threads)  # each thread of a process has its own number, and this one computes
    begun = prepared = time.perf_counter()
    answers: Sequence[Returned | Exception]
    try:
        with own_draws([each.random for each in waiting]):
            if stack is None or not stack.holds(handed):
                stack = Stack(handed)
                prepared = _now()
            answers = stack.passed(handed)
    except Exception as error:  # each run says why it ends, in its own words
        stack, answers = None, [error] * len(waiting)
    ended = _now()
    for each, answer in zip(waiting, answers, strict=True):
        each.answer, each.took = answer, (ended - prepared) / len(waiting)
        each.prepared += (prepared - begun) / len(waiting)
    return stack


def _now() -> float:
    """Seconds for differences, when everything is computed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
