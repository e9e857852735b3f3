"""Where jobs run: processes of this machine, Slurm, Ray."""

import atexit
import contextlib
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from softmoe_cli.config.launch import RayLauncher, SlurmLauncher
from softmoe_cli.launch.job import SERVER, Order, RunCommand, in_process, in_worker


class Attempt(Protocol):
    """A job that was started somewhere."""

    def ended(self) -> int | None:
        """Its exit status, less than zero for a signal's number; None while it goes on."""

    def stop(self, *, now: bool) -> None:
        """Asks it to save and leave, or ends it now."""


class Place(Protocol):
    """Where jobs are started, one in a process or several as one stack."""

    def start(self, orders: Sequence[Order]) -> Attempt: ...


class Processes:
    """This machine."""

    def __init__(self, _options: object, _folder: Path, run: RunCommand) -> None:
        self._run = run

    def start(self, orders: Sequence[Order]) -> Attempt:
        return Forked(orders, self._run)


class Forked:
    def __init__(self, orders: Sequence[Order], run: RunCommand) -> None:
        self._process = SERVER.Process(target=in_process, args=(orders, run))
        self._process.start()

    def ended(self) -> int | None:
        return self._process.exitcode

    def stop(self, *, now: bool) -> None:
        pid = self._process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):  # it has just left by itself
            os.kill(pid, signal.SIGTERM if not now else signal.SIGKILL)
        if now:
            with contextlib.suppress(ProcessLookupError):  # it has no group yet, and so nobody in it
                os.killpg(pid, signal.SIGKILL)


class Slurm:
    """Slurm, or processes of submitit's own to try it. What is queued stays known: a launcher that was killed takes up
    its jobs again."""

    def __init__(self, options: SlurmLauncher, folder: Path, run: RunCommand) -> None:
        import submitit

        self._run = run
        self._local, self._folder = options.cluster == "local", folder / "submitit"
        self._executor = submitit.AutoExecutor(self._folder, cluster=options.cluster)
        self._executor.update_parameters(
            name="softmoe", gpus_per_node=options.gpus, cpus_per_task=options.cpus, mem_gb=options.memory_gib,
            timeout_min=options.timeout_min,
        )  # fmt: skip
        if not self._local:
            self._executor.update_parameters(
                slurm_partition=options.partition, slurm_account=options.account, slurm_signal_delay_s=120
            )

    def start(self, orders: Sequence[Order]) -> Attempt:
        """Follows what is queued or running under an earlier launcher, which may have had other stacks, and queues the
        rest as one."""
        import submitit

        tickets = {order.log: order.ticket for order in orders}
        known = {log: ticket.read_text() for log, ticket in tickets.items() if ticket.exists() and not self._local}
        jobs: list[Any] = [submitit.SlurmJob(self._folder, number) for number in dict.fromkeys(known.values())]
        if rest := [order for order in orders if order.log not in known]:
            jobs.append(self._executor.submit(in_worker, rest, self._run))
            for order in rest:
                tickets[order.log].write_text(jobs[-1].job_id)
        return Submitted(jobs, list(tickets.values()))


class Submitted:
    def __init__(self, jobs: Sequence[Any], tickets: Sequence[Path]) -> None:
        self._jobs, self._tickets = jobs, tickets

    def ended(self) -> int | None:
        if not all(job.done() for job in self._jobs):
            return None
        for ticket in self._tickets:
            ticket.unlink(missing_ok=True)
        return max(map(_status, self._jobs))

    def stop(self, *, now: bool) -> None:
        for job in self._jobs:
            job.cancel(check=False)


def _status(job: Any) -> int:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return int(job.result())
    except (FailedJobError, UncompletedJobError):
        return 1


class Ray:
    """A Ray, here or running on several machines that share a file system."""

    def __init__(self, options: RayLauncher, folder: Path, run: RunCommand) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # gpus=0 hides none: device= decides
        self._run = run
        own: dict[str, Any] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None
        if options.address is None:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # kept in no file
            self._files = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # its sockets' names may not be long
            own = {"include_dashboard": False, "_temp_dir": self._files.name}
        import ray

        ray.init(address=options.address, log_to_driver=False, configure_logging=False, **own)
        atexit.register(self._close)
        self._task = ray.remote(max_calls=1, max_retries=0, num_cpus=options.cpus, num_gpus=options.gpus)(in_worker)

    def start(self, orders: Sequence[Order]) -> Attempt:
        return Task(self._task.remote(orders, self._run))

    def _close(self) -> None:
        import ray

        ray.shutdown()
        if self._files is not None:
            self._files.cleanup()


class Task:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def ended(self) -> int | None:
        import ray

        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self._reference))
        except ray.exceptions.RayError:
            return 1

    def stop(self, *, now: bool) -> None:
        import ray

        ray.cancel(self._reference, force=now)


PLACES: dict[str, Callable[[Any, Path, RunCommand], Place]] = {"local": Processes, "slurm": Slurm, "ray": Ray}
"""A name for hydra/launcher= -> the function that makes the place from its options, the sweep's folder and a Run."""
