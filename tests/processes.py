"""`softmoe` in real processes that start at once: forked from one that has imported torch and timm already."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from softmoe_cli.launch import job, places
from softmoe_cli.run import mirror

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.warm"])


def share_server(replace: Callable[[object, str, object], object]) -> None:
    """Lets sweeps of this process fork their jobs from the server of all tests: one of their own would import
    everything again."""
    for module in (job, places):
        replace(module, "SERVER", _Same())


class Started:
    """A running command: a process of its own, with its own signals, group, folder and output. Tensors without a given
    type are of `dtype`; `first` is called before anything else. With `own_server` the command forks its processes from
    a server of its own, with its own output."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        environment: dict[str, str],
        out: str = "stdout.txt",
        dtype: str = "",
        own_server: bool = False,
        first: Callable[[], object] = int,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out = folder / out
        self._out.write_text("")
        multiprocessing.forkserver.ensure_running()
        address = None if own_server else vars(_forkserver())["_forkserver_address"]
        order = (folder, arguments, os.environ | environment, self._out, dtype, address, first)
        self._process = _SERVER.Process(target=_main, args=order)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        started.append(self)

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 900) -> tuple[int | None, str]:
        """Exit status (minus the signal's number where one ended it) and output."""
        self._process.join(timeout)
        return self._process.exitcode, self._out.read_text()


started: list[Started] = []


def until(happens: Callable[[], Any], *processes: Started, seconds: float = 600) -> Any:
    """Waits for what the processes do, and returns what `happens` found. Fails at once, with what a process said, where
    one has ended without it."""
    end = time.monotonic() + seconds
    while True:
        ended = [process for process in processes if process.ended]  # asked first: what it did last counts
        if found := happens():
            return found
        assert not ended, [process.wait() for process in ended]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def end_all() -> None:
    """Ends processes that a failed test has left running: they would take the cores from all other tests."""
    while started:
        process = started.pop()
        if not process.ended:
            for kill in (os.kill, os.killpg):  # it may have no group yet
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)


def forked(out: Path, work: Callable[..., None], *arguments: Any, timeout: float = 600) -> int | None:
    """Calls `work` in a process of its own, which writes to `out`; returns its exit status."""
    process = _SERVER.Process(target=_told, args=(out, work, arguments))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


def with_little_disk(folder: Path, arguments: list[str]) -> None:
    """`softmoe` in a folder, where no file may be larger than 60,000 bytes: for `forked`."""
    sys.dont_write_bytecode = True  # Python would leave the beginning of a large file, and read it from then on
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
    sys.argv = ["softmoe", *arguments]
    from softmoe_cli.cli import main

    main()


class Attempt(NamedTuple):
    code: int | None
    """None: it did not end in time."""
    out: str
    err: str


def attempt(folder: Path, arguments: list[str], said: Path, timeout: float) -> Attempt:
    """Runs `softmoe` in a folder, in a process of its own and with its two outputs kept apart beside `said`."""
    out, err = said.with_suffix(".out"), said.with_suffix(".err")
    process = _SERVER.Process(target=_attempt, args=(folder, arguments, out, err))
    process.start()
    assert process.pid is not None
    process.join(timeout)
    ended = not process.is_alive()
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    return Attempt(process.exitcode if ended else None, *(file.read_text(errors="replace") for file in (out, err)))


def _attempt(folder: Path, arguments: list[str], out: Path, err: Path) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", COLUMNS="100")
    torch.set_num_threads(1)
    for descriptor, path in ((1, out), (2, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = ["softmoe", *arguments]
    from softmoe_cli.cli import main

    main()


def torchrun(size: int) -> list[dict[str, str]]:
    """The environment that torchrun would give to each of so many processes."""
    # The system picks ports for others from above this range, so that nobody takes the port before it is used.
    port = 10_000 + 7 * os.getpid() % 20_000
    while True:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("localhost", port))
            break
        port += 1
    told = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    told["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # no message about names that do not resolve
    ranks = [told | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
    return [{key: str(value) for key, value in each.items()} for each in ranks]


def together(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work` in so many processes at once, each with the environment that torchrun would give it."""
    multiprocessing.forkserver.ensure_running()
    processes = []
    for environment in torchrun(size):
        processes.append(_SERVER.Process(target=_job, args=(os.getcwd(), environment, work, arguments)))
        processes[-1].start()
    while any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()])
        if any(process.exitcode for process in processes):  # the others would wait for the one that failed
            for process in processes:
                process.kill()
    assert not any(process.exitcode for process in processes)


def _forkserver() -> Any:
    return multiprocessing.forkserver._forkserver


def _main(
    folder: Path,
    arguments: list[str],
    environment: dict[str, str],
    out: Path,
    dtype: str,
    address: str | None,
    first: Callable[[], object],
) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    os.setsid()
    _own_threads()
    _write_to(out)
    mirror.LAST_WAIT_S = 300  # the machine may be slow, and the test reads the file
    sys.argv = ["softmoe", *arguments]
    if dtype:
        torch.set_default_dtype(getattr(torch, dtype))
    if address is not None:
        # Jobs fork from the server that forked this process.
        vars(_forkserver()).update(_forkserver_address=address, ensure_running=lambda: None)
        multiprocessing.forkserver.ensure_running = lambda: None
        share_server(setattr)
    first()
    from softmoe_cli.cli import main

    main()


def _own_threads() -> None:
    """Makes the threads of a fork anew, here and now: when autograd's threads do it first, they do it at once, and the
    process can end ("Invalid thread pool")."""
    torch.set_num_threads(torch.get_num_threads())


def _write_to(out: Path) -> None:
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _told(out: Path, work: Callable[..., None], arguments: Sequence[Any]) -> None:
    _own_threads()
    _write_to(out)
    work(*arguments)


class _Same:
    """The server of all tests, used as a sweep's own server: jobs get the sweep's folder and environment."""

    def set_forkserver_preload(self, _modules: list[str]) -> None:
        """Does nothing: the modules are loaded already."""

    def Pipe(self, duplex: bool) -> tuple[Connection, Connection]:
        return _SERVER.Pipe(duplex)

    def Process(self, target: Callable[..., None], args: Sequence[Any]) -> ForkServerProcess:
        return _SERVER.Process(target=_job, args=(os.getcwd(), dict(os.environ), target, args))


def _job(folder: str, environment: dict[str, str], target: Callable[..., None], args: Sequence[Any]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    _own_threads()
    target(*args)
