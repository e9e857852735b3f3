"""One job in a process of its own."""

import json
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from softmoe_cli.errors import RunError
from softmoe_cli.failures import defect, ours
from softmoe_cli.files import not_following, write_atomically
from softmoe_cli.signals import leave, leave_now
from softmoe_cli.text import printable_lines

RunCommand = Callable[[Sequence[str]], tuple[int, str]]
"""The function that runs a command line and returns exit status and reason: cli.run, which is passed down to here."""

GONE_S = 300
"""How long a job that asked to be queued again waits for Slurm to end it."""

SERVER = multiprocessing.get_context("forkserver")
LONGEST = 103 - len("/pymp-12345678/listener-12345678")
"""Bytes of a folder's path in which a socket can be made: macOS takes 103, Linux 107."""

NOT_FOR_SERVER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Order:
    """One job as a process gets it: what `softmoe` is to run, where, and where its output goes."""

    arguments: list[str]
    directory: str
    environment: dict[str, str]
    log: Path

    @property
    def failure(self) -> Path:
        return self.log.with_suffix(".json")

    @property
    def ticket(self) -> Path:
        return self.log.with_suffix(".slurm")


def perform(orders: Sequence[Order], run: RunCommand) -> int:
    """Runs a job's command line, with its output in a log; writes down why it failed. Several jobs run in turns, as one
    stack. Returns the exit status, of several the largest."""
    order, logs = orders[0], list[TextIO]()
    with ExitStack() as files:
        try:
            os.chdir(order.directory)
            os.environ.update(order.environment)
            for order in orders:
                order.failure.unlink(missing_ok=True)
                logs.append(files.enter_context(open(order.log, "a", buffering=1, opener=not_following)))
            for number in (1, 2):
                os.dup2(logs[0].fileno(), number)
        except OSError as error:  # said on the launcher's own output
            print(f"softmoe: cannot write {order.log}: {error.strerror}", file=sys.stderr)
            return os.EX_CANTCREAT
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        codes = dict.fromkeys(range(len(orders)), 1)
        works = [lambda i=i, order=order: codes.update({i: _carry_out(order, run)}) for i, order in enumerate(orders)]
        if len(works) == 1:
            works[0]()
        else:
            from softmoe_cli.stack.turns import in_turns

            in_turns(works, logs)
        return max(codes.values())


def _carry_out(order: Order, run: RunCommand) -> int:
    sys.argv = ["softmoe", *order.arguments]
    code, reason = run(order.arguments)
    if reason:
        try:
            print(f"softmoe: {printable_lines(reason)}", file=sys.stderr)
            if code != 130:
                note(order, reason)
        except (OSError, RunError):
            return os.EX_CANTCREAT
    return code


def note(order: Order, reason: str) -> None:
    """Writes why a job failed."""
    write_atomically(order.failure, json.dumps({"reason": reason}) + "\n")


def start_server(modules: list[str]) -> None:
    """Starts the server that processes are forked from. The server ignores signals to the process group: without it
    nobody would learn how the processes end."""
    SERVER.set_forkserver_preload(modules)
    _keep_sockets_short()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in NOT_FOR_SERVER}
    multiprocessing.forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


def _keep_sockets_short() -> None:
    """The server's sockets lie in the folder for temporary files, whose path may be too long for that: then in /tmp, as
    from Python 3.14 on. (The folder in it is made now and removed when this process ends.)"""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > LONGEST:
        tempfile.tempdir = "/tmp"
        try:
            multiprocessing.util.get_temp_dir()
        finally:
            tempfile.tempdir = usual


def follow_launcher(stop: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
    """Puts a process that a launcher started into a process group of its own, so that a Ctrl-C reaches only the
    launcher. When the launcher is gone, the process saves and calls `stop`, so that nothing goes on unseen."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SIGUSR2 stays ignored: one process passes it on as SIGTERM
        signal.signal(number, signal.SIG_DFL)
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        launcher.join()
        stop()

    threading.Thread(target=watch, daemon=True).start()


def answered(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns in a process that is forked for it: it may import what the launcher itself does not.

    Raises:
        UsageError, RunError: as `work` did; or that its process has ended without an answer.
    """
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_answer, args=(sender, work, arguments))
    process.start()
    sender.close()
    try:
        found, error = receiver.recv()
    except EOFError as gone:
        process.join()
        raise RunError(f"the process that checks the jobs has ended: {ending(process.exitcode or 0)}") from gone
    finally:
        process.kill()
    if error is not None:
        raise error
    return found


def _answer(sender: Connection, work: Callable[..., Any], arguments: Sequence[Any]) -> None:
    follow_launcher(lambda: leave_now(130))
    try:
        sender.send((work(*arguments), None))
    except Exception as error:
        sender.send((None, ours(error) or RunError(defect(error))))


def ending(code: int) -> str:
    """Why a process ended that left no note."""
    if code == 130:
        return "stopped by a signal of somebody else's; its state is saved"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, which is also what the system does when memory runs out"
    if code == os.EX_CANTCREAT:
        return "it cannot write its log, for want of room or rights"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"


def in_process(orders: Sequence[Order], run: RunCommand) -> None:
    """Runs a job, or several as one stack, in a process that was forked for it."""
    follow_launcher()
    leave(perform(orders, run))


def in_worker(orders: Sequence[Order], run: RunCommand) -> int:
    """Runs a job, or several as one stack, in a worker of submitit or Ray, in place of their signal
    handlers. With SIGUSR2 submitit warns of a time limit or a preemption: the job then saves, leaves and is queued
    again."""
    told: list[int] = []

    def save(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, save)
    code = perform(orders, run)
    if code == 130 and told:
        _queue_again()
    return code


def _queue_again() -> None:
    """Asks submitit for another run of this job; comes back only if there will be none."""
    import submitit

    print("the job is queued again")
    try:
        submitit.JobEnvironment()._requeue(0)  # what submitit does after a checkpoint of its own kind
    except (OSError, subprocess.SubprocessError) as error:
        print(f"it is not: {error}")
    else:
        time.sleep(GONE_S)
