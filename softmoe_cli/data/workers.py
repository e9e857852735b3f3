"""Processes that decode images: starts them, says why one of them ended, and ends them all with the run."""

import atexit
import errno
import functools
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from softmoe_cli.config.data import Data
from softmoe_cli.device import cores
from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.signals import leave_now


class WorkersError(RunError):
    """The processes that decode images cannot go on, for a reason that is not in the images. The model is unchanged."""


class _Answers(Dataset):
    """The items of another data set, each as (item, None), or as (None, error)."""

    def __init__(self, items: Dataset) -> None:
        self._items = items

    def __getitem__(self, asked: Any) -> tuple[Any, UsageError | RunError | None]:
        try:
            item = self._items[asked]
            if isinstance(item, Tensor) and get_worker_info() is not None:
                item.share_memory_()  # here, where a failure can still be reported: a queue would lose the item
            return item, None
        except UsageError as error:
            return None, error
        except MemoryError:
            return None, WorkersError(f"memory ran out where images are decoded; {FEWER}")
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return None, WorkersError(_no_shared_memory(first_line(error)))


FEWER = "lower data.workers, data.prefetch or the batch size, and type the same command to go on"


def _no_shared_memory(why: str) -> str:
    return f"there is no shared memory (/dev/shm) left for decoded images ({why}); make it larger, {FEWER}"


def by_workers(
    items: Dataset, order: Iterable[Any], data: Data, *, prefetch: int, pinned: bool = False
) -> Iterator[Any]:
    """`items[asked]` for each of `order`, computed in data.workers processes ahead of time, or here where that is 0.

    However this iterator ends, its processes end with it, or with `end_workers`.

    Raises:
        UsageError, RunError: as an item's own computation raised it.
        WorkersError: a process was killed, or cannot be started or talked to.
    """
    count = cores() if data.workers is None else data.workers
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more than cores: as data.workers says
    loader = DataLoader(
        _Answers(items),
        sampler=order,
        batch_size=None,
        num_workers=count,
        prefetch_factor=prefetch if count else None,
        pin_memory=pinned,
        generator=torch.Generator(),  # or the loader would draw a seed from the model's random state
        worker_init_fn=_prepare_worker,
    )
    others = set(multiprocessing.active_children())
    own: list[Any] = []
    answers: Iterator[Any] | None = None
    try:
        try:
            answers = _started(loader)
        finally:  # also the workers that started before one could not start
            own = [process for process in multiprocessing.active_children() if process not in others]
            _working.update(own)
            _end_with(os.getpid())
        for item, fault in answers:
            if fault is not None:
                raise fault
            yield item
    except (OSError, EOFError, RuntimeError) as error:
        if isinstance(error, RunError):
            raise
        why = _why(error, own, count)
        if why is None:
            raise
        raise WorkersError(why) from error
    finally:
        answers = None  # torch then asks the workers to end, unless an exception still holds the iterator
        _end(own)


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's iterator. torch raises the error about an ended worker at any point of the main process, even in the
    middle of an update; here it is raised where the next item is asked for."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _why(error: Exception, workers: list[Any], count: int) -> str | None:
    """What happened to the processes that decode; None: nothing, the error has another cause."""
    if not isinstance(error, RuntimeError):  # the worker at the other end may just be ending
        for worker in workers:
            worker.join(0.2)
    killed = [-worker.exitcode for worker in workers if worker.exitcode is not None and worker.exitcode < 0]
    if signal.SIGBUS in killed:
        return _no_shared_memory("a process that decodes them met its end there")
    if killed:
        if killed[0] != signal.SIGKILL:
            name = signal.Signals(killed[0]).name
            return f"a process that decodes images was ended by {name}: a fault of a library, or somebody sent it"
        return f"a process that decodes images was killed, which is what the system does when memory runs out; {FEWER}"
    if any(worker.exitcode for worker in workers):
        return f"a process that decodes images has ended: what it says stands above; {FEWER}"
    if "Too many open files" in str(error) or getattr(error, "errno", None) == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"more than {limit} files are open; raise the limit (ulimit -n), or {FEWER}"
    if isinstance(error, OSError) and len(workers) < count:
        return f"data.workers={count}: only {len(workers)} processes could be started ({error.strerror}); {FEWER}"
    return None


def _prepare_worker(_number: int) -> None:
    """Prepares a worker: it has one thread, ignores signals to the process group, and ends with the main process. An
    item that cannot be handed over ends the worker; the main process would wait for the item for ever."""
    torch.set_num_threads(1)
    threading.Thread(target=_follow, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch's handler prints what the main process says in better words
    Queue._on_queue_feeder_error = staticmethod(_hand_nothing_over)  # type: ignore[attr-defined]


def _follow() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    main.join()
    leave_now(0)


def _hand_nothing_over(error: Exception, _item: Any) -> None:
    leave_now(1, f"softmoe: a decoded image cannot be handed over: {first_line(error)}\n")


_working: set[Any] = set()
"""The processes that decode now."""


def end_workers() -> None:
    """Ends all processes that decode, even if something still holds their iterators, such as an error's traceback."""
    _end(list(_working))


def _end(workers: list[Any]) -> None:
    for worker in workers:
        worker.kill()  # they ignore SIGTERM, and have nothing to lose
    for worker in workers:
        worker.join()
        _working.discard(worker)


@functools.cache
def _end_with(_process: int) -> None:
    """Ends the workers of this process before Python, or multiprocessing in a forked process, would wait for them."""
    atexit.register(end_workers)
    Finalize(None, end_workers, exitpriority=0)
