"""The jobs of `softmoe train -m`: each a process of its own, checked before the first starts, one lost at a time.

The launcher itself imports no model code. Jobs fork from a server that has imported torch and timm, so that they start
at once; whatever needs a model beforehand (signatures, costs) is worked out in such a process too.
"""

import argparse
import atexit
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console
from rich.live import Live
from rich.text import Text

from softmoe_cli.config import Config, Launcher, RayLauncher, SlurmLauncher
from softmoe_cli.contents import KNOWN
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import not_following, write_atomically
from softmoe_cli.rows import RESULT
from softmoe_cli.signals import ASKING, CURSOR, Asked, heard, leave_soon
from softmoe_cli.status import State, count, duration, figures, held, state
from softmoe_cli.text import aligned, flop, printable_lines

PERIOD_S = 0.25
MANY = 10_000
"""Jobs at a time where a cluster does the queueing."""
LEFT_SCREEN = b"\x1b[?1049l" + CURSOR
"""Goes back from the screen that a terminal's table has for itself."""
GONE_S = 300
"""How long a job that is queued again waits to be ended."""
SERVER = multiprocessing.get_context("forkserver")
NOT_FOR_SERVER = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

failures: list[str] = []
"""A sentence for each job of this process's sweep that failed; `report` turns them into the exit status."""


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


@dataclass(frozen=True)
class Job:
    """One job, checked. `overrides` include what the launcher settled; `cost` is empty unless somebody asked."""

    run: str
    overrides: list[str]
    folder: Path
    threads: int | None
    cost: dict[str, float] = field(default_factory=dict)
    images: str = ""
    """What is known of images by now, so that not every job reads them for it."""


class Attempt(Protocol):
    """A job that was started somewhere."""

    def ended(self) -> int | None:
        """Its exit status, less than zero for a signal's number; None while it goes on."""

    def stop(self, *, now: bool) -> None:
        """Asks it to save and leave, or ends it now."""


# --- in a job's process -----------------------------------------------------------------------------------------------


def perform(order: Order) -> int:
    """Does what typing the command would do, with the output in the job's log; leaves a note of why it failed."""
    try:
        os.chdir(order.directory)
        os.environ.update(order.environment)
        order.failure.unlink(missing_ok=True)
        with open(order.log, "a", opener=not_following) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    except OSError as error:  # said where the launcher speaks
        print(f"softmoe: cannot write {order.log}: {error.strerror}", file=sys.stderr)
        return os.EX_CANTCREAT
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["softmoe", *order.arguments]
    from softmoe_cli import cli

    code, reason = cli.run(order.arguments)
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
    """Starts what processes are forked from. A signal to the whole process group is not for it: without it nobody
    would know how they end."""
    SERVER.set_forkserver_preload(modules)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in NOT_FOR_SERVER}
    multiprocessing.forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)


def follow_launcher(leave: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
    """Puts a process that a launcher started into a process group of its own, so that a Ctrl-C reaches the launcher
    alone, and has it save and `leave` when the launcher is gone, so that nothing goes on unseen."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGUSR1):  # SIGUSR2 is for who passes it on as SIGTERM
        signal.signal(number, signal.SIG_DFL)
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch() -> None:
        launcher.join()
        leave()

    threading.Thread(target=watch, daemon=True).start()


def _in_process(order: Order) -> None:
    """A forked job."""
    follow_launcher()
    from softmoe_cli.cli import leave

    leave(perform(order))


def _in_worker(order: Order) -> int:
    """A job in a worker of submitit or Ray, whose own handlers make way: SIGUSR2 is submitit's word for a time limit
    or a preemption that is near. The job then saves, leaves and is queued again."""
    told: list[int] = []

    def save(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR2, save)
    code = perform(order)
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


# --- before the first job ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What the launcher wants to know of its jobs before it starts any."""

    command: str
    jobs: list[tuple[str, list[str], dict[str, Any]]]  # name, overrides, composed configuration
    options: Launcher


def _answer(question: Question, sender: Connection) -> None:
    """Checks every job as its own process would, all in one process; sends a job or the reason against it for each,
    and a word for each job that may run at a time: its GPU, or nothing."""
    follow_launcher(lambda: os._exit(130))
    from softmoe_cli import cli
    from softmoe_cli.contents import known
    from softmoe_cli.data import identity
    from softmoe_cli.failures import defect, ours
    from softmoe_cli.train import run_folder, with_largest_batch

    identities: dict[str, str | None] = {}
    options = question.options
    slots, threads = _share(options, {tree["device"] for _, _, tree in question.jobs})
    sharers = max(Counter(slots[: len(question.jobs)]).values(), default=1)  # jobs on one device at a time
    answers: list[Job | UsageError | RunError] = []
    for name, overrides, tree in question.jobs:
        try:
            config, source = cli.settle(question.command, tree, overrides)
            settled = []
            if config.train.batch_size == "auto":
                if options.where != "local":
                    raise UsageError(
                        f"train.batch_size=auto depends on the device, which hydra/launcher={options.where} does not "
                        "know yet; give a number"
                    )
                config = with_largest_batch(config, lambda _: None, sharers)
                settled.append(f"train.batch_size={config.train.batch_size}")
            if config.devices > 1 and options.where != "slurm":
                raise UsageError(
                    f"devices={config.devices}: the jobs of a sweep have one device each; give them more with "
                    f"hydra/launcher=slurm hydra.launcher.gpus={config.devices}, or leave out -m"
                )
            if config.threads is None:
                own = max(1, threads // config.devices)
                config = replace(config, threads=own)
                settled.append(f"threads={own}")
            place = repr(config.data)
            if place not in identities:
                identities[place] = identity(config.data)
            folder = run_folder(config, question.command, source, identities[place])
            cost = _costs(config, times=options.plan) if options.plan or options.limit.given else {}
            unknown = [key for key in options.limit.given if math.isnan(cost[key])]
            if unknown:
                raise UsageError(f"hydra.launcher.limit: train.minutes leaves {unknown[0]} open; give train.steps")
            answers.append(Job(name, [*overrides, *settled], folder, config.threads, cost, known()))
        except Exception as error:
            answers.append(ours(error) or RunError(defect(error)))
    sender.send((answers, slots))


def _share(options: Launcher, devices: set[str]) -> tuple[list[str], int]:
    """A word for each job that may run at a time (its GPU, or nothing), and every job's threads."""
    import torch

    from softmoe_cli.device import cores

    if isinstance(options, SlurmLauncher | RayLauncher):
        here = isinstance(options, SlurmLauncher) and options.cluster == "local"
        return [""] * (options.jobs or (max(1, cores() // options.cpus) if here else MANY)), options.cpus
    slots = [""] * (options.jobs or cores())
    if devices & {"auto", "cuda"} and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        slots = [gpus[i % len(gpus)] for i in range(options.jobs or len(gpus))]
    elif devices & {"auto", "mps"} and torch.backends.mps.is_available():
        slots = [""] * (options.jobs or 1)
    return slots, max(1, cores() // len(slots))


_loaded: dict[str, Any] = {}
_timed: dict[str, tuple[float, float]] = {}


def _costs(config: Config, *, times: bool) -> dict[str, float]:
    """What a job will cost, by formula; and how long, by a few steps of it on this machine. nan: cannot be known."""
    from softmoe_cli import data
    from softmoe_cli.clock import measure
    from softmoe_cli.config import CostConfig
    from softmoe_cli.cost import account
    from softmoe_cli.device import arithmetic, free_memory
    from softmoe_cli.memory import predict_for, require_place
    from softmoe_cli.pace import images_of_a_look, looks
    from softmoe_cli.train import Budget

    t = config.train
    key = repr(config.data)
    if key not in _loaded:
        splits = data.load(config.data)
        sizes = [len(images) for images in (splits.train, splits.validation, splits.test)]
        _loaded[key] = config.data.num_classes or len(splits.classes), *sizes
    classes, images, validation, test = _loaded[key]
    device, _ = arithmetic(config.device, t.precision, config.threads)
    require_place(config.optim, device, config.devices)
    cost = account(
        config.model, classes, batch=t.batch_size // t.accumulate, recompute=t.recompute, frozen=config.optim.freeze
    )
    way = "ddp" if config.parallel == "auto" else config.parallel
    peak = predict_for(config, classes, device, config.devices, way).peak_bytes
    budget = Budget.of(config, images)
    step_s = image_s = math.nan
    # What the clock knows: one device, all weights trained, AdamW's moments in float32.
    known = config.devices == 1 and not config.optim.freeze and config.optim.moments == "fp32"
    if times and known and peak <= free_memory(device):
        load = CostConfig(
            model=config.model, data=config.data, batch_size=t.batch_size, accumulate=t.accumulate,
            recompute=t.recompute, precision=t.precision, devices=1, parallel="ddp", compile=t.compile, clock=True,
            repeats=3, format="table", device=config.device, threads=config.threads,
        )  # fmt: skip
        key = repr((load, classes))
        if key not in _timed:
            try:
                timing = measure([load], classes)[0]
                _timed[key] = timing.train_step_ms / 1000, timing.latency_ms / 1000 / t.batch_size
            except UsageError:  # what fits with SGD need not with AdamW
                _timed[key] = math.nan, math.nan
        step_s, image_s = _timed[key]
    steps = budget.steps if budget.steps is not None else (budget.seconds or 0.0) / step_s
    look = images_of_a_look(t, validation, classes, routed=config.model.router_name != "dense")
    evaluated = looks(budget.total, t.eval_every, budget.steps) * look + test
    return {
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "train_pflop": steps * t.batch_size * cost.train_flop / 1e15,
        "peak_mib": peak / 2**20,
        "free_mib": free_memory(device) / 2**20,
        "seconds": (budget.seconds or steps * step_s) + evaluated * image_s,
    }


# --- places -----------------------------------------------------------------------------------------------------------


class Place(Protocol):
    """Where jobs are started."""

    def start(self, order: Order) -> Attempt: ...


class Processes:
    """This machine."""

    def start(self, order: Order) -> Attempt:
        return Forked(order)


class Forked:
    def __init__(self, order: Order) -> None:
        self._process = SERVER.Process(target=_in_process, args=(order,))
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

    def __init__(self, options: SlurmLauncher, folder: Path) -> None:
        import submitit

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

    def start(self, order: Order) -> Attempt:
        import submitit

        ticket = order.log.with_suffix(".slurm")
        if ticket.exists() and not self._local:
            return Submitted(submitit.SlurmJob(self._folder, ticket.read_text()), ticket)
        job = self._executor.submit(_in_worker, order)
        ticket.write_text(job.job_id)
        return Submitted(job, ticket)


class Submitted:
    def __init__(self, job: Any, ticket: Path) -> None:
        self._job, self._ticket = job, ticket

    def ended(self) -> int | None:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        if not self._job.done():
            return None
        self._ticket.unlink(missing_ok=True)
        try:
            return int(self._job.result())
        except (FailedJobError, UncompletedJobError):
            return 1

    def stop(self, *, now: bool) -> None:
        self._job.cancel(check=False)


class Ray:
    """A Ray, here or running on several machines that share a file system."""

    def __init__(self, options: RayLauncher, folder: Path) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # gpus=0 hides none: device= decides
        own: dict[str, Any] = {}
        self._files: tempfile.TemporaryDirectory[str] | None = None
        if options.address is None:
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # kept in no file
            self._files = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # its sockets' names may not be long
            own = {"include_dashboard": False, "_temp_dir": self._files.name}
        import ray

        ray.init(address=options.address, log_to_driver=False, configure_logging=False, **own)
        atexit.register(self._close)
        self._task = ray.remote(max_calls=1, max_retries=0, num_cpus=options.cpus, num_gpus=options.gpus)(_in_worker)

    def start(self, order: Order) -> Attempt:
        return Task(self._task.remote(order))

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


PLACES: dict[str, Callable[[Any, Path], Place]] = {
    "local": lambda _options, _folder: Processes(),
    "slurm": Slurm,
    "ray": Ray,
}


# --- the launcher -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Entry:
    """A job as the launcher follows it. `word` is what no file says: done before, held, over the limit, stopped."""

    job: Job
    log: Path
    word: str = ""
    attempt: Attempt | None = None
    slot: str = ""
    started: float | None = None
    first_progress: float = 0.0

    @property
    def finished(self) -> bool:
        return (self.job.folder / "result.json").exists()

    def state(self, local: bool) -> State:
        """From its files, and from what the launcher knows better."""
        found = state(self.job.folder, self.job.run, self.log)
        if self.attempt is not None:
            seen = local or found.state in ("running", "running or killed")
            found = replace(found, state="running" if seen else "queued")
            if seen and self.started is None:
                self.started, self.first_progress = time.monotonic(), found.progress or 0.0
        return replace(found, state=self.word) if self.word else found

    def eta(self, progress: float | None) -> str:
        if self.attempt is None or self.started is None or progress is None or progress <= self.first_progress:
            return "-"
        pace = (time.monotonic() - self.started) / (progress - self.first_progress)
        return duration(pace * (1 - progress))


class Signals(Asked):
    """SIGINT, SIGTERM and SIGUSR1 ask the jobs to save and leave and the launcher to wait; a second SIGINT or SIGTERM
    ends them, and the launcher, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.told = False

    def hear(self, number: int) -> None:
        if self.again(number) and not self.now:
            self.now = True
            leave_soon(lambda: "\nleft at once; the same command goes on from the last checkpoints\n", LEFT_SCREEN)


class Sweep:
    """What hydra.launcher is while one command runs: Hydra, or a searching sweeper, hands it jobs."""

    def __init__(self, config_loader: ConfigLoader, config: DictConfig) -> None:
        from softmoe_cli.cli import LAUNCHERS

        launcher = LAUNCHERS[config.hydra.launcher.where]
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(launcher), config.hydra.launcher))
        assert isinstance(options, Launcher)
        self._options = options
        self._options.check()
        self._local = self._options.where == "local"
        needs = {"slurm": "submitit", "ray": "ray"}.get(self._options.where)
        if needs is not None and importlib.util.find_spec(needs) is None:
            raise UsageError(
                f"hydra/launcher={self._options.where} needs {needs}: pip install 'softmoe-cli[{self._options.where}]'"
            )
        self._loader, self._config = config_loader, config
        self._check_objective()
        self._command = str(config.hydra.job.name)
        self._typed = list(config.hydra.overrides.task)
        # What else decides which jobs there are.
        searched = ("hydra.launcher.limit", "hydra.launcher.objective", "hydra.sweeper.", "hydra/sweeper")
        others = [word for word in config.hydra.overrides.hydra if word.lstrip("+").startswith(searched)]
        words = json.dumps([self._command, *self._typed, *others])
        study = Path(config.output_root) / config.study
        self._folder = study / f"sweep-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        self._entries: list[Entry] = []
        self._place: Place | None = None
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        failures.clear()
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # several jobs share the cores: nobody spins
        start_server(["softmoe_cli.train", "softmoe_cli.cli", "softmoe_cli.sweep"])

    def _check_objective(self) -> None:
        sweeper = self._config.hydra.sweeper
        wanted = ["maximize" if RESULT[key].better == "higher" else "minimize" for key in self._options.objective]
        if "direction" not in sweeper:
            if wanted or self._options.limit.given:
                raise UsageError(
                    f"hydra.launcher.objective={self._options.objective} has no effect without a sweeper that "
                    "searches; add +search=quality or +search=pareto"
                )
            return
        if self._options.plan:
            raise UsageError("--plan cannot know the jobs of a search; leave out +search= or hydra/sweeper=")
        told = sweeper.direction if OmegaConf.is_list(sweeper.direction) else [sweeper.direction]
        given = [getattr(each, "name", each) for each in told]
        if given != wanted:
            raise UsageError(
                f"hydra.sweeper.direction={given} does not go with hydra.launcher.objective={self._options.objective}, "
                f"which needs {wanted}; add +search=quality or +search=pareto"
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Runs jobs to their ends, and returns what the sweeper wants to know of each.

        Raises:
            UsageError: some job cannot work; none was started.
            KeyboardInterrupt: a signal asked to stop; every job has saved and left.
        """
        jobs, slots = self._ask(job_overrides)
        entries = self._number(jobs, first)
        if self._options.plan:
            print(_plan(list(dict.fromkeys(entries)), len(slots)))
            return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]
        with self._held():
            self._write_down()
            for entry in entries:
                if entry.word:
                    continue
                if self._excess(entry.job) > 1:  # finished or not: an earlier search may have had another limit
                    entry.word = "over the limit"
                elif entry.finished:
                    entry.word = "done before"
            self._work_off([entry for entry in dict.fromkeys(entries) if not entry.word], slots)
        return [self._return(overrides, entry) for overrides, entry in zip(job_overrides, entries, strict=True)]

    def _ask(self, job_overrides: Sequence[Sequence[str]]) -> tuple[list[Job], list[str]]:
        """Composes every job, has it checked, and finds the room for them."""
        from softmoe_cli import cli

        jobs: list[tuple[str, list[str], dict[str, Any]]] = []
        errors: list[tuple[str, UsageError | RunError]] = []
        typed = {word.partition("=")[0]: word for word in self._typed}
        for overrides in job_overrides:
            config = self._loader.load_sweep_config(self._config, list(overrides))
            with read_write(config), open_dict(config):
                del config["hydra"]
            varied = [each for each in overrides if typed.get(each.partition("=")[0]) != each]
            name = " ".join(varied or overrides)
            try:
                jobs.append((name, list(overrides), cli.plain(config, Config)))
            except UsageError as error:
                errors.append((name, error))
        receiver, sender = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_answer, args=(Question(self._command, jobs, self._options), sender))
        process.start()
        sender.close()
        try:
            answers, slots = receiver.recv()
        except EOFError as error:
            process.join()
            raise RunError(f"the process that checks the jobs has ended: {_cause(process.exitcode or 0)}") from error
        finally:
            process.kill()
        errors += [(job[0], each) for job, each in zip(jobs, answers, strict=True) if not isinstance(each, Job)]
        if errors:
            kind = RunError if any(isinstance(error, RunError) for _, error in errors) else UsageError
            lines = [f"{name}: {error}" for name, error in errors]
            several = f"{len(lines)} of {len(job_overrides)} jobs cannot work, so none was started:"
            raise kind("\n  ".join([several, *lines]))
        return answers, slots

    def _number(self, jobs: list[Job], first: int) -> list[Entry]:
        """An entry for each job; the same one for the same run."""
        if first == 0:
            self._entries = []
        known = {entry.job.folder: entry for entry in self._entries}
        entries = []
        for job in jobs:
            entry = known.get(job.folder)
            if entry is None:
                entry = known[job.folder] = Entry(job, self._folder / f"{len(self._entries):02}.log")
                self._entries.append(entry)
            elif entry in entries:
                self._say(f"{job.run} is the same run as {entry.job.run}")
            entries.append(entry)
        return entries

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The sweep's folder, made where there is none, and held against a second launcher."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.fdopen(not_following(str(self._folder / ".lock"), os.O_WRONLY | os.O_CREAT), "w")
        except OSError as error:
            raise UsageError(
                f"cannot write to output_root={self._config.output_root}: {error.strerror}: {error.filename}; "
                "choose another output_root"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"the same sweep is running already: softmoe status {self._folder}") from error
            yield

    def _write_down(self) -> None:
        """Says in the sweep's folder what its jobs are."""
        rows = [
            {"run": e.job.run, "overrides": e.job.overrides, "folder": os.path.relpath(e.job.folder, self._folder)}
            for e in self._entries
        ]
        text = json.dumps({"command": self._command, "typed": self._typed, "jobs": rows}, indent=1)
        write_atomically(self._folder / "jobs.json", text + "\n")
        multirun = Path(self._config.hydra.sweep.dir) / "multirun.yaml"
        if multirun.exists():
            multirun.replace(self._folder / "multirun.yaml")  # beside its sweep: a study has many

    def _work_off(self, waiting: list[Entry], slots: list[str]) -> None:
        """Starts the next job when one ends, until all have."""
        running: list[Entry] = []
        self._say(f"{count(self._states())}; logs and state in {self._folder}")
        signals = Signals()
        with heard(ASKING, signals.hear), self._screen(signals) as refresh:
            while waiting or running:
                for entry in list(running):
                    assert entry.attempt is not None
                    code = entry.attempt.ended()
                    if code is not None:
                        running.remove(entry)
                        slots.append(entry.slot)
                        self._end(entry, code, signals.name is not None)
                now = signals.now
                if signals.name is not None and (now or not signals.told):
                    if not signals.told:
                        self._say(f"{signals.name}: {len(running)} jobs save and leave; Ctrl-C again ends them at once")
                    signals.told, waiting = True, []
                    for entry in running:
                        assert entry.attempt is not None
                        entry.attempt.stop(now=now)
                    if now and not self._local:
                        break  # whether a cluster has heard is not waited for
                for entry in list(waiting):
                    entry.word = "held" if self._local and held(entry.job.folder) else ""
                    if not entry.word and slots:
                        waiting.remove(entry)
                        if entry.finished:  # by the process that held it
                            entry.word = "done before"
                            continue
                        running.append(entry)
                        self._start(entry, slots.pop(0))
                refresh()
                if running or waiting:
                    time.sleep(PERIOD_S)
        self._console.print(count(self._states()))
        if signals.name is not None:
            raise KeyboardInterrupt(signals.name)

    def _start(self, entry: Entry, slot: str) -> None:
        if self._place is None:
            self._place = PLACES[self._options.where](self._options, self._folder)
        entry.slot, entry.started = slot, None
        entry.attempt = self._place.start(self._order(entry))
        self._line("started", entry, "")

    def _order(self, entry: Entry) -> Order:
        environment = dict(os.environ) if self._local else {"OMP_WAIT_POLICY": "passive"}
        environment |= {"OMP_NUM_THREADS": str(entry.job.threads), KNOWN: entry.job.images}
        if entry.slot:
            environment["CUDA_VISIBLE_DEVICES"] = entry.slot
        arguments = [self._command, *_flags(self._config), *entry.job.overrides]
        return Order(arguments, os.getcwd(), environment, entry.log.absolute())

    def _end(self, entry: Entry, code: int, stopping: bool) -> None:
        """Books how a job ended."""
        entry.attempt = None
        if code == 0:
            self._line("done", entry, f"  {figures(entry.state(self._local))[1]}")
        elif stopping:
            entry.word = "stopped"
            self._line("stopped", entry, "")
        else:
            order, reason = self._order(entry), _cause(code)
            if order.failure.exists():
                reason = str(json.loads(order.failure.read_text())["reason"])
            else:
                with contextlib.suppress(RunError):  # no room: said here, and by the other jobs
                    note(order, reason)
            failures.append(f"{entry.job.run}: {reason} ({entry.log})")
            self._line("failed", entry, f": {reason}")

    def _line(self, word: str, entry: Entry, text: str) -> None:
        place = self._entries.index(entry) + 1
        self._say(f"[{place}/{len(self._entries)}] {word:<8} {entry.job.run}{text}  {entry.log}")

    def _say(self, text: str) -> None:
        """A line, where no table says it."""
        if not self._console.is_terminal:
            self._console.print(printable_lines(text), markup=False)

    def _states(self) -> list[State]:
        return [entry.state(self._local) for entry in self._entries]

    @contextmanager
    def _screen(self, signals: Signals) -> Iterator[Callable[[], None]]:
        """On a terminal a table that `refresh` brings up to date, on a screen of its own: what a terminal does to long
        lines when its size changes leaves nothing behind."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        begun, start = time.monotonic(), [state.progress or 0.0 for state in self._states()]

        def refresh() -> None:
            states = self._states()
            passed, now = time.monotonic() - begun, [state.progress or 0.0 for state in states]
            rest, done = len(now) - sum(now), sum(now) - sum(start)
            left = f", about {duration(passed * rest / done)} left" if done > len(now) / 100 and rest > 0 else ""
            foot = f"{count(states)}; {duration(passed)} so far{left}\nlogs and state in {self._folder}"
            if signals.name is not None:
                foot = f"{signals.name}: jobs save and leave; Ctrl-C again ends them at once\n{foot}"
            room = self._console.height - foot.count("\n") - 2
            text = printable_lines(f"{self._table(room, states)}\n{foot}")
            live.update(Text(text, overflow="fold"), refresh=True)

        with Live(console=self._console, auto_refresh=False, screen=True) as live:
            yield refresh
        last = f"{self._table(len(self._entries) + 1, self._states())}\nlogs and state in {self._folder}"
        self._console.print(printable_lines(last), markup=False)

    def _table(self, height: int, states: list[State]) -> str:
        """As many jobs as there is room for, the running ones first of all."""
        order = sorted(range(len(states)), key=lambda i: states[i].state not in ("running", "queued", "failed"))
        rows = [["run", "state", "progress", "eta", "val top-1", "log"]]
        for i in sorted(order[: max(1, height - 1)]):
            s = states[i]
            progress, top1 = figures(s)
            eta = self._entries[i].eta(s.progress or 0.0)
            rows.append([s.run, s.state, progress, eta, top1, Path(s.log or "-").name])
        return fitted(rows, self._console.width)

    def _excess(self, job: Job) -> float:
        return max((job.cost[key] / most for key, most in self._options.limit.given.items()), default=0.0)

    def _return(self, overrides: Sequence[str], entry: Entry) -> JobReturn:
        """What a searching sweeper is told: the objective, or how far over the limit, below any quality there is."""
        told = JobReturn(overrides=list(overrides), working_dir=str(entry.job.folder), status=JobStatus.COMPLETED)
        if not self._options.objective:
            return told
        if entry.word == "over the limit":
            told.return_value = -self._excess(entry.job)
        elif entry.finished:
            result = json.loads((entry.job.folder / "result.json").read_text())
            values = [result[key] for key in self._options.objective]
            told.return_value = values if len(values) > 1 else values[0]
        else:
            told.status, told.return_value = JobStatus.FAILED, RunError(f"{entry.job.run} failed; see {entry.log}")
        return told


def fitted(rows: list[list[str]], width: int) -> str:
    """A table with lines of at most `width` letters. What is too long is taken from the first column, a job's name: the
    sections of its keys, then its beginning."""
    room = width - sum(2 + max(map(len, column)) for column in [*zip(*rows, strict=True)][1:])
    if max(len(name) for name, *_ in rows) > room:
        short = [re.sub(r"\S*\.(?=[^\s=.]+=)", "", name) for name, *_ in rows]  # num_experts=8, without model.router.
        cut = [name if len(name) <= room else f"…{name[len(name) - max(0, room - 1) :]}" for name in short]
        rows = [[name, *others] for name, (_, *others) in zip(cut, rows, strict=True)]
    return aligned(rows, markdown=False)


def report() -> None:
    """Ends a sweep.

    Raises:
        RunError: some jobs failed; the message lists them.
    """
    if failures:
        jobs = f"{len(failures)} {'job' if len(failures) == 1 else 'jobs'} failed; type the same command to try again"
        raise RunError("\n  ".join([jobs, *failures]))


def _cause(code: int) -> str:
    """Why a process ended that left no note."""
    if code == 130:
        return "stopped by a signal of somebody else's; its state is saved"
    if code == -signal.SIGKILL:
        return "killed by SIGKILL, which is also what the system does when memory runs out"
    if code == os.EX_CANTCREAT:
        return "it cannot write its log, for want of room or rights"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"


def _flags(config: DictConfig) -> list[str]:
    """What was typed for Hydra itself and matters to each job: where its configuration comes from, but not where a
    sweep's jobs run or what they are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short, long in (("-cd", "--config-dir"), ("-cp", "--config-path"), ("-cn", "--config-name")):
        parser.add_argument(short, long)
    typed = vars(parser.parse_known_args(sys.argv[1:])[0])
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in typed.items() if value is not None]
    elsewhere = ("hydra/launcher=", "hydra/sweeper", "hydra.launcher", "hydra.sweep", "hydra.mode")
    return flags + [word for word in config.hydra.overrides.hydra if not word.lstrip("+~").startswith(elsewhere)]


def _plan(entries: list[Entry], at_a_time: int) -> str:
    """The jobs with what they will cost, and the sum of those that are to be done."""
    rows = [["run", "state", "training", "peak MiB", "time", "folder"]]
    todo = [entry for entry in entries if not entry.finished]
    for entry in entries:
        cost, seen = entry.job.cost, entry.state(True)
        fits = "" if cost["peak_mib"] <= cost["free_mib"] else " (does not fit)"
        peak = f"{cost['peak_mib']:,.1f}{fits}"
        rows.append([seen.run, seen.state, _flop(cost["train_pflop"]), peak, _time(cost["seconds"]), seen.folder])
    pflop = sum(entry.job.cost["train_pflop"] for entry in todo)
    times = [entry.job.cost["seconds"] for entry in todo]
    known = [seconds for seconds in times if not math.isnan(seconds)]
    together = f", about {_time(sum(known) / min(at_a_time, len(known)))} with {at_a_time} at a time" if known else ""
    unknown = len(times) - len(known)
    beside = (
        f"; not in it: {unknown}, as jobs are not timed that do not fit, or have several devices, frozen weights or "
        "moments in other than fp32" if unknown else ""
    )  # fmt: skip
    return (
        f"{aligned(rows, markdown=False)}\n\n{len(entries)} jobs, {len(todo)} to do: {_flop(pflop)}, "
        f"{_time(sum(known)) if known or not todo else 'unknown'} of training and evaluation{together}; from a few "
        f"steps timed here, saving not counted{beside}"
    )


def _flop(pflop: float) -> str:
    return "unknown" if math.isnan(pflop) else flop(1e15 * pflop)


def _time(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else duration(seconds)
