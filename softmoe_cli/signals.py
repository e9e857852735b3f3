"""Signals, heard at once.

Python runs a signal's handler between two bytecodes of the main thread, and a single product of large matrices puts
that off for minutes. The system's handler behind it writes the signal's number to a descriptor at once, whatever the
main thread is doing, and a thread reads it there.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a command to end."""
LEAVE_S = 1.5
"""How long the main thread has to leave by itself."""
TWICE_S = {signal.SIGINT: 0.1, signal.SIGTERM: 1.0}
"""How long after the first signal another one is the same request: timeout and torchrun signal their processes
twice."""
CURSOR = b"\x1b[?25h"
"""Shows a terminal's cursor, which progress bars hide."""

os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not ours


_elsewhere: dict[int, list[Callable[[int], None]]] = {}
"""Who wants to hear signals in other threads than the main one, by thread; the last one of each does."""


def pass_on(number: int) -> None:
    """Tells a signal that the main thread has heard to whoever would hear it in other threads."""
    for hears in list(_elsewhere.values()):
        for hear in hears[-1:]:
            hear(number)


@contextmanager
def heard(
    numbers: Sequence[int], hear: Callable[[int], None], act: Callable[[int], None] = lambda _number: None
) -> Iterator[None]:
    """Inside, each of these signals calls `hear` in a thread as soon as it arrives, and `act` in the main thread when
    that runs Python again. Afterwards the handlers from before are back."""
    if threading.current_thread() is not threading.main_thread():  # where Python takes no signals
        own = _elsewhere.setdefault(threading.get_ident(), [])
        own.append(hear)
        try:
            yield
        finally:
            own.remove(hear)
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (byte := os.read(reader, 1)) not in (b"\0", b""):
            if byte[0] in numbers:
                hear(byte[0])
        os.close(reader)

    threading.Thread(target=listen, daemon=True).start()
    before = {number: signal.signal(number, lambda number, _frame: act(number)) for number in numbers}
    outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(outer, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        with suppress(BlockingIOError):  # so many signals that nobody has read: the thread ends after them
            os.write(writer, b"\0")  # a process forked meanwhile may still hold the pipe's other end
        os.close(writer)


class Asked:
    """What signals have asked for so far: `name` is the first one's."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._when = 0.0

    def again(self, number: int) -> bool:
        """Takes a signal; returns whether it is a second request, which asks to leave at once."""
        if self.name is None:
            self.name, self._when = signal.Signals(number).name, time.monotonic()
            return False
        return number in TWICE_S and time.monotonic() - self._when > TWICE_S[signal.Signals(number)]


@contextmanager
def interruptible(sentence: Callable[[str], str]) -> Iterator[None]:
    """Inside, a signal raises KeyboardInterrupt with its name. Where the main thread is too busy for that, or does not
    finish tidying up, the process ends all the same after LEAVE_S, with the `sentence` for that name."""
    asked, said = Asked(), threading.Event()

    def hear(number: int) -> None:
        if not told.is_set():
            told.set()
            text = f"softmoe: {sentence(signal.Signals(number).name)}\n"
            leave_soon(lambda: "" if said.is_set() else text)

    def act(number: int) -> None:
        if asked.name is None:  # a second exception would disturb the tidying up
            asked.again(number)
            raise KeyboardInterrupt(asked.name)

    told = threading.Event()
    try:
        with heard(ASKING, hear, act):
            yield
    finally:
        said.set()


def leave_soon(text: Callable[[], str], terminal: bytes = CURSOR) -> None:
    """Ends the process in LEAVE_S, unless it ends before."""
    timer = threading.Timer(LEAVE_S, lambda: leave_now(130, text(), terminal))
    timer.daemon = True
    timer.start()


def leave_now(code: int, text: str = "", terminal: bytes = b"") -> NoReturn:
    """Ends the process and what it has started, from any thread and whatever the others are doing: Python's own end
    would wait for them, for queues that nobody reads and for servers that do not answer. Files are whole: each is
    written under another name and then renamed."""
    try:
        end_children()
        if terminal and os.isatty(1):
            os.write(1, terminal)
        tell(text)
    finally:
        os._exit(code)


def end_children() -> None:
    """Kills the processes that this one has started, and what those have started in groups of their own."""
    multiprocessing = sys.modules.get("multiprocessing")  # not imported for this alone: the Tab key is waiting
    for child in multiprocessing.active_children() if multiprocessing is not None else ():
        assert child.pid is not None
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        with suppress(ProcessLookupError, PermissionError):  # it has no group of its own
            os.killpg(child.pid, signal.SIGKILL)


def tell(text: str) -> None:
    """To standard error, and to whoever still listens: Ctrl-C ends the `tee` behind a pipe too."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


waits_for_nobody: list[str] = []
"""Who would keep the process from ending, as it waits for a server that does not answer."""


def leave(code: int) -> NoReturn:
    """Ends the process at the end of a command."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_listens()
        code = code or 1
    if waits_for_nobody:
        leave_now(code)
    sys.exit(code)


def nobody_listens() -> None:
    """The reader of our output is gone (`softmoe list | head`): sends the rest to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
