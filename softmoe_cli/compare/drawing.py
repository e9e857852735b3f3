"""The figures, drawn beside the rest: half of what a comparison takes is matplotlib.

A process of its own imports it while this one reads runs and judges groups; then that process and one more draw a
figure each, while this one writes tables. They are forks of this process, made before it has imported what keeps
threads (numpy), and draw what it would draw, byte for byte.
"""

import gc
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from softmoe_cli.errors import RunError
from softmoe_cli.signals import ASKING

if TYPE_CHECKING:
    from softmoe_cli.compare.groups import Comparison

FIGURES = ("curves", "pareto")
Files = dict[str, bytes]


def figures(comparison: "Comparison") -> Files:
    """Every figure in every form: file name to content."""
    return _figures(comparison, FIGURES)


def _figures(comparison: "Comparison", names: tuple[str, ...]) -> Files:
    from softmoe_cli.compare.figures import figure_files

    return {file: content for name in names for file, content in figure_files(comparison, name).items()}


class Drawing:
    """A process that draws. It waits for a comparison first; `files` waits for what it has drawn."""

    def __init__(self, to: Connection) -> None:
        self._to = to

    def begin(self, comparison: "Comparison") -> None:
        with suppress(ConnectionError):  # it has ended; `files` says why
            self._to.send(comparison)

    def files(self) -> Files:
        """Raises: what drawing raised, or RunError: the process was killed."""
        try:
            files, error = self._to.recv()
        except (EOFError, ConnectionError) as gone:
            raise RunError(
                "a process that draws figures was killed, which is what the system does when memory runs out; "
                "type the same command again"
            ) from gone
        if error is not None:
            raise error
        answer: Files = files
        return answer


@contextmanager
def drawing() -> Iterator[Drawing]:
    """Starts the process, which is ended where it still draws when this ends. The one that it has started itself then
    ends when its figure is drawn."""
    with _beside(_draw) as to:
        yield Drawing(to)


@contextmanager
def _beside(work: Callable[[Connection], Files]) -> Iterator[Connection]:
    """A fork that does `work` with its end of a pipe, and then sends (files, None), or (None, the error)."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=_told, args=(work, mine, its))
    process.start()
    its.close()
    try:
        yield mine
    finally:
        mine.close()
        process.kill()  # it has ended already, or nobody wants its files
        process.join()


def _told(work: Callable[[Connection], Files], others: Connection, its: Connection) -> None:
    others.close()  # so that a process that waits sees when the other one has gone
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)  # the first process hears them, and ends this one
    gc.disable()  # it ends before it has made garbage that counts
    with suppress(EOFError, ConnectionError):  # nobody waits any more
        try:
            its.send((work(its), None))
        except Exception as error:  # `files` raises it, where it has its place
            error.add_note(traceback.format_exc())
            its.send((None, error))


def _draw(its: Connection) -> Files:
    from softmoe_cli.compare.figures import rehearse

    rehearse()
    comparison = its.recv()
    first, *others = FIGURES
    with _beside(lambda _: _figures(comparison, tuple(others))) as second:
        return _figures(comparison, (first,)) | Drawing(second).files()
