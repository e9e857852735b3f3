"""The jobs of `softmoe train -m`: each is a process of its own, and all are checked before the first one starts.

The launcher itself imports no model code. Jobs fork from a server that has imported torch and timm, so that they start
at once; whatever needs a model beforehand (signatures, costs) is worked out in such a process too.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher as HydraLauncher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from rich.console import Console
from rich.live import Live
from rich.text import Text

from softmoe_cli.config.launch import LAUNCHERS, Launcher
from softmoe_cli.config.run import Config
from softmoe_cli.config.settle import FAIR_KEYS
from softmoe_cli.data.contents import KNOWN
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import not_following, write_atomically
from softmoe_cli.launch.job import Order, RunCommand, answered, ending, note, start_server
from softmoe_cli.launch.places import PLACES, Place
from softmoe_cli.launch.plan import Inquiry, Job, answer
from softmoe_cli.launch.tables import Entry, fitted, show_plan, stacks
from softmoe_cli.launch.typed import files_typed, flags_of
from softmoe_cli.options.compose import plain, said_of_data
from softmoe_cli.options.explain import explain
from softmoe_cli.run.rows import RESULT, Unreadable
from softmoe_cli.run.rows import jobs as jobs_told
from softmoe_cli.run.status import State, held, progress_cells, tally
from softmoe_cli.signals import ASKING, CURSOR, Asked, heard, leave_soon
from softmoe_cli.text import in_words, printable_lines, several

PERIOD_S = 0.25
LEFT_SCREEN = b"\x1b[?1049l" + CURSOR
"""Leaves the second screen of a terminal, on which the table is drawn."""


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


class Sweep(HydraLauncher):
    """The launcher that Hydra uses while one command runs: Hydra, or a searching sweeper, gives it jobs."""

    run: ClassVar[RunCommand]
    """Runs a job's command line; cli.py sets this before it calls Hydra."""
    line: ClassVar[tuple[str, list[str]]]
    """The command and its words as they were typed, which softmoe status repeats; set beside `run`."""
    last: ClassVar["Sweep | None"] = None
    """This process's sweep: Hydra makes it and does not return it."""

    def __init__(self, **_options: Any) -> None:
        """Hydra hands the options over here and, with their types, in `setup`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        Sweep.last = self
        self.failures: dict[Path, str] = {}
        """Why jobs of this command failed, by run folder."""
        launcher = LAUNCHERS[config.hydra.launcher.where]
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(launcher), config.hydra.launcher))
        assert isinstance(options, Launcher)
        self._options = options.settled()
        self._local = self._options.where == "local"
        needs = {"slurm": "submitit", "ray": "ray"}.get(self._options.where)
        if needs is not None and importlib.util.find_spec(needs) is None:
            raise UsageError(
                f"hydra/launcher={self._options.where} needs {needs}: pip install 'softmoe-cli[{self._options.where}]'"
            )
        self._config = config
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._share_composed(hydra_context.config_loader)
        self._check_objective()
        self.command = str(config.hydra.job.name)
        self._typed = list(config.hydra.overrides.task)
        self.said = tuple(said_of_data(config.hydra))
        # What else decides which jobs there are.
        searched = ("hydra.launcher.limit", "hydra.launcher.objective", "hydra.sweeper.", "hydra/sweeper")
        others = [word for word in config.hydra.overrides.hydra if word.lstrip("+").startswith(searched)]
        fair = [word for word in Sweep.line[1] if word.partition("=")[0] in FAIR_KEYS]
        words = json.dumps([self.command, *self._typed, *others, *files_typed(), *fair])
        study = Path(config.output_root) / config.study
        self._folder = study / f"sweep-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        self._entries: list[Entry] = []
        self._place: Place | None = None
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        start_server(["softmoe_cli.launch.preloaded", "softmoe_cli.cli", "softmoe_cli.launch.sweep"])

    def _share_composed(self, loader: ConfigLoader) -> None:
        """Has every job composed once, which takes a quarter of a second: the sweeper does it to see whether it can."""
        compose = self._compose = loader.load_sweep_config

        def once(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            key = tuple(sweep_overrides)
            if key not in self._composed:
                self._composed[key] = compose(master_config, sweep_overrides)
            return self._composed[key]

        loader.load_sweep_config = once  # type: ignore[method-assign]

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

    @property
    def plans(self) -> bool:
        """Whether nothing is to be started."""
        return self._options.plan

    @property
    def seeds_at_once(self) -> int:
        return self._options.seeds_at_once

    def lie_in(self, study: Path, name: str | None = None) -> None:
        """The sweep's folder lies beside its runs, also where an experiment among its jobs names the study. `name`:
        what it is called where that does not depend on the words that were typed."""
        self._folder = study / (name or self._folder.name)

    @property
    def jobs_so_far(self) -> int:
        return len(self._entries)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Runs jobs to their ends, and returns what the sweeper wants to know of each.

        Raises:
            UsageError: some job cannot work; none was started.
            KeyboardInterrupt: a signal asked to stop; every job has saved and left.
        """
        if not initial_job_idx and not self._options.plan:  # now, as torch has to be imported to check them
            self.tell(f"{several(len(job_overrides), 'job')}; all are checked before the first one starts")
        jobs, slots = self.ask(job_overrides)
        self._check_seeds(jobs)
        if initial_job_idx == 0:
            self._entries = []
        if self._options.plan:
            show_plan(list(dict.fromkeys(self._number(jobs))), len(slots))
            return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]
        with self.held():
            entries = self.carry_out(jobs, slots)
        return [self._return(overrides, entry) for overrides, entry in zip(job_overrides, entries, strict=True)]

    def _check_seeds(self, jobs: Sequence[Job]) -> None:
        n = self.seeds_at_once
        if n > 1 and len(stacks([Entry(job, self._folder) for job in jobs], n)) == len(jobs):
            raise UsageError(
                f"hydra.launcher.seeds_at_once={n} has no effect: no two jobs differ in nothing but the seed; add "
                f"seeds, as seed={','.join(map(str, range(n)))}, or leave it out"
            )

    def carry_out(self, jobs: Sequence[Job], slots: Sequence[str]) -> list[Entry]:
        """Runs jobs, as `ask` has answered them, to their ends; whoever calls holds the sweep's folder.

        Raises:
            KeyboardInterrupt: a signal asked to stop; every job has saved and left.
        """
        entries = self._number(jobs)
        self._write_down()
        for entry in entries:
            if entry.word:
                continue
            if self._excess(entry.job) > 1:  # finished or not: an earlier search may have had another limit
                entry.word = "over the limit"
            elif entry.finished:
                entry.word = "done before"
        if lacking := [entry.job.lacking for entry in entries if entry.word == "done before" and entry.job.lacking]:
            more = f"; the same holds for {several(len(lacking) - 1, 'more run')}" if lacking[1:] else ""
            self.tell(f"{lacking[0]}{more}")
        self._work_off([entry for entry in dict.fromkeys(entries) if not entry.word], list(slots))
        return entries

    def recall(self) -> None:
        """Takes up the jobs of the same command when it was typed before, so that each keeps its number and its
        log."""
        with contextlib.suppress(FileNotFoundError, Unreadable):
            _, told = jobs_told(self._folder / "jobs.json")
            for job in told:
                folder = Path(os.path.normpath(self._folder / job["folder"]))
                self._add(Job(job["run"], list(job.get("overrides", [])), folder, None))

    def noted(self) -> dict[Path, str]:
        """Why jobs without a result failed when they were last tried, by run folder as an absolute path; by this
        command or one before it."""
        found = {}
        for entry in self._entries:
            failure = self._order(entry).failure
            if not entry.finished and failure.exists():
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged note is none
                    reason = str(json.loads(failure.read_text())["reason"])
                    found[Path(os.path.abspath(entry.job.folder))] = f"{entry.job.run}: {reason} ({entry.log})"
        return found

    def ask(self, job_overrides: Sequence[Sequence[str]], seeds: Sequence[int] = ()) -> tuple[list[Job], list[str]]:
        """Composes every job, has it checked, and finds the room for them. With `seeds`, each job tells the folders
        of its runs with all of them, and what one costs.

        Raises:
            UsageError, RunError: some job cannot work; the message lists them.
        """
        jobs = self.composed(job_overrides)
        answers, slots = answered(answer, Inquiry(self.command, jobs, self._options, tuple(seeds), self.said))
        errors = [(job[0], each) for job, each in zip(jobs, answers, strict=True) if not isinstance(each, Job)]
        self._refuse(errors, len(jobs))
        return answers, slots

    def composed(self, job_overrides: Sequence[Sequence[str]]) -> list[tuple[str, list[str], dict[str, Any]]]:
        """Name, overrides and composed configuration of every job.

        Raises:
            UsageError: some job has a key that does not exist; the message lists them.
        """
        jobs: list[tuple[str, list[str], dict[str, Any]]] = []
        errors: list[tuple[str, UsageError | RunError]] = []
        typed = {word.partition("=")[0]: word for word in self._typed}
        for overrides in job_overrides:
            varied = [each for each in overrides if typed.get(each.partition("=")[0]) != each]
            name = " ".join(varied or overrides)
            try:
                config = self._composed.pop(tuple(overrides), None) or self._compose(self._config, list(overrides))
                with read_write(config), open_dict(config):
                    del config["hydra"]
                jobs.append((name, list(overrides), plain(config, Config)))
            except (HydraException, UsageError) as error:
                known = error if isinstance(error, UsageError) else UsageError(explain(error, self.command, overrides))
                errors.append((name, known))
        self._refuse(errors, len(job_overrides))
        return jobs

    def _refuse(self, errors: Sequence[tuple[str, UsageError | RunError]], jobs: int) -> None:
        if errors:
            kind = RunError if any(isinstance(error, RunError) for _, error in errors) else UsageError
            head = f"{len(errors)} of {jobs} jobs cannot work, so none was started:"
            raise kind("\n  ".join([head, *(f"{name}: {error}" for name, error in errors)]))

    def _number(self, jobs: Sequence[Job]) -> list[Entry]:
        """Makes an entry for each job; two jobs that are the same run share one."""
        known = {os.path.normpath(entry.job.folder): entry for entry in self._entries}
        entries: list[Entry] = []
        for job in jobs:
            place = os.path.normpath(job.folder)
            entry = known.get(place)
            if entry is None:
                entry = known[place] = self._add(job)
            elif entry in entries:
                self.say(f"{job.run} is the same run as {entry.job.run}")
            else:
                entry.job = job
            entries.append(entry)
        return entries

    def _add(self, job: Job) -> Entry:
        self._entries.append(Entry(job, self._folder / f"{len(self._entries):02}.log"))
        return self._entries[-1]

    @contextmanager
    def held(self, *, in_turn: bool = False) -> Iterator[None]:
        """The sweep's folder, made where there is none, and held against a second launcher, which is refused, or `in
        turn` waits until the first one has ended or is gone."""
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
                if not in_turn:
                    raise UsageError(f"the same sweep is running already: softmoe status {self._folder}") from error
                self.tell(
                    f"another command works on {self._folder.parent}; this one goes on when that has ended: softmoe "
                    f"status {self._folder}"
                )
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write_down(self) -> None:
        """Says in the sweep's folder what its jobs are."""
        rows = [
            {"run": e.job.run, "overrides": e.job.overrides, "folder": os.path.relpath(e.job.folder, self._folder)}
            for e in self._entries
        ]
        command, words = Sweep.line
        typed = [word for word in words if word not in ("-m", "--multirun")]
        text = json.dumps({"command": command, "typed": typed, "jobs": rows}, indent=1)
        write_atomically(self._folder / "jobs.json", text + "\n")
        multirun = Path(self._config.hydra.sweep.dir) / "multirun.yaml"
        if multirun.exists():
            multirun.replace(self._folder / "multirun.yaml")  # beside its sweep: a study has many

    def _work_off(self, waiting: list[Entry], slots: list[str]) -> None:
        """Starts the next job when one ends, until all have."""
        running: list[list[Entry]] = []
        self.say(f"{tally(self._states())}; logs and state in {self._folder}")
        signals = Signals()
        with heard(ASKING, signals.hear), self._screen(signals) as refresh:
            while waiting or running:
                for stack in list(running):
                    assert stack[0].attempt is not None
                    code = stack[0].attempt.ended()
                    if code is not None:
                        running.remove(stack)
                        slots.append(stack[0].slot)
                        for entry in stack:
                            self._end(entry, 0 if entry.finished else code, signals.name is not None)
                now = signals.now
                if signals.name is not None and (now or not signals.told):
                    if not signals.told:
                        jobs = f"{sum(map(len, running))} jobs save and leave"
                        self.say(f"{signals.name}: {jobs}; Ctrl-C again ends them at once")
                    signals.told, waiting = True, []
                    for stack in running:
                        assert stack[0].attempt is not None
                        stack[0].attempt.stop(now=now)
                    if now and not self._local:
                        break  # do not wait until the cluster has answered
                for entry in list(waiting):
                    entry.word = "held" if self._local and held(entry.job.folder) else ""
                    if not entry.word and entry.finished:  # the process that held the run has finished it
                        entry.word = "done before"
                        waiting.remove(entry)
                free = [entry for entry in waiting if not entry.word]
                for stack in stacks(free, self._options.seeds_at_once)[: len(slots)]:
                    waiting = [entry for entry in waiting if entry not in stack]
                    running.append(stack)
                    self._start(stack, slots.pop(0))
                refresh()
                if running or waiting:
                    time.sleep(PERIOD_S)
        self._console.print(tally(self._states()))
        if signals.name is not None:
            raise KeyboardInterrupt(signals.name)

    def _start(self, stack: list[Entry], slot: str) -> None:
        """Starts jobs in one process."""
        if self._place is None:
            self._place = PLACES[self._options.where](self._options, self._folder, Sweep.run)
        for entry in stack:
            entry.slot, entry.started = slot, None
        orders = [self._order(entry) for entry in stack]
        for order in orders:
            if not order.ticket.exists():  # what Slurm has already is followed, and its note is of this attempt
                order.failure.unlink(missing_ok=True)
        attempt = self._place.start(orders)
        for entry in stack:
            entry.attempt = attempt
            self._line("started", entry, "")

    def _order(self, entry: Entry) -> Order:
        environment = dict(os.environ) if self._local else {}
        environment |= {"OMP_NUM_THREADS": str(entry.job.threads), KNOWN: entry.job.images}
        if entry.slot:
            environment["CUDA_VISIBLE_DEVICES"] = entry.slot
        arguments = [self.command, *flags_of(self._config), *entry.job.overrides]
        return Order(arguments, os.getcwd(), environment, entry.log.absolute())

    def _end(self, entry: Entry, code: int, stopping: bool) -> None:
        """Writes down how a job ended."""
        entry.attempt = None
        if code == 0:
            self._line("done", entry, f"  {progress_cells(entry.state(self._local))[1]}")
        elif stopping:
            entry.word = "stopped"
            self._line("stopped", entry, "")
        else:
            order, reason = self._order(entry), ending(code)
            if order.failure.exists():
                reason = str(json.loads(order.failure.read_text())["reason"])
            else:
                with contextlib.suppress(RunError):  # the disk is full: the line below says why
                    note(order, reason)
            self.failures[entry.job.folder] = f"{entry.job.run}: {reason} ({entry.log})"
            self._line("failed", entry, f": {reason}")

    def _line(self, word: str, entry: Entry, end: str) -> None:
        self.say(f"[{self._entries.index(entry) + 1}/{len(self._entries)}] {word:<8} {entry.job.run}{end}  {entry.log}")

    def say(self, text: str) -> None:
        """Prints a line, unless a table on the terminal shows it."""
        if not self._console.is_terminal:
            self._console.print(printable_lines(text), markup=False)

    def tell(self, text: str) -> None:
        """Prints what no table on the terminal shows."""
        self._console.print(printable_lines(text), markup=False)

    def told(self) -> list[dict[str, Any]]:  # as softmoe status tells them
        return [asdict(state) for state in self._states()]

    def _states(self) -> list[State]:
        return [entry.state(self._local) for entry in self._entries]

    @contextmanager
    def _screen(self, signals: Signals) -> Iterator[Callable[[], None]]:
        """On a terminal, shows a table that `refresh` updates, on a second screen: when the terminal changes its size
        and breaks long lines, nothing of them stays behind."""
        if not self._console.is_terminal:
            yield lambda: None
            return
        begun, start = time.monotonic(), [each.progress or 0.0 for each in self._states()]

        def refresh() -> None:
            states = self._states()
            passed, now = time.monotonic() - begun, [each.progress or 0.0 for each in states]
            rest, done = len(now) - sum(now), sum(now) - sum(start)
            left = f", about {in_words(passed * rest / done)} left" if done > len(now) / 100 and rest > 0 else ""
            foot = f"{tally(states)}; {in_words(passed)} so far{left}\nlogs and state in {self._folder}"
            if signals.name is not None:
                foot = f"{signals.name}: jobs save and leave; Ctrl-C again ends them at once\n{foot}"
            room = self._console.height - foot.count("\n") - 2
            text = printable_lines(f"{self._table(room, states)}\n{foot}")
            live.update(Text(text, overflow="fold"), refresh=True)

        with Live(console=self._console, auto_refresh=False, screen=True) as live:
            yield refresh
        self.tell(f"{self._table(len(self._entries) + 1, self._states())}\nlogs and state in {self._folder}")

    def _table(self, height: int, states: list[State]) -> str:
        """The table of as many jobs as fit into `height` lines; running, queued and failed ones are kept first."""
        order = sorted(range(len(states)), key=lambda i: states[i].state not in ("running", "queued", "failed"))
        rows = [["run", "state", "progress", "eta", "val top-1", "log"]]
        for i in sorted(order[: max(1, height - 1)]):
            s = states[i]
            progress, top1 = progress_cells(s)
            eta = self._entries[i].eta(s.progress or 0.0)
            rows.append([s.run, s.state, progress, eta, top1, Path(s.log or "-").name])
        return fitted(rows, self._console.width)

    def report(self) -> None:
        """Ends a sweep.

        Raises:
            RunError: some jobs failed; the message lists them.
        """
        if self.failures:
            jobs = f"{several(len(self.failures), 'job')} failed; type the same command to try again"
            raise RunError("\n  ".join([jobs, *self.failures.values()]))

    def _excess(self, job: Job) -> float:
        return max((job.cost[key] / most for key, most in self._options.limit.given.items()), default=0.0)

    def _return(self, overrides: Sequence[str], entry: Entry) -> JobReturn:
        """What a searching sweeper is told: the objective, or how far over the limit, below any quality there is."""
        job_return = JobReturn(overrides=list(overrides), working_dir=str(entry.job.folder), status=JobStatus.COMPLETED)
        if not self._options.objective:
            return job_return
        if entry.word == "over the limit":
            job_return.return_value = -self._excess(entry.job)
        elif entry.finished:
            result = json.loads((entry.job.folder / "result.json").read_text())
            values = [result[key] for key in self._options.objective]
            job_return.return_value = values if len(values) > 1 else values[0]
        else:
            job_return.status = JobStatus.FAILED
            job_return.return_value = RunError(f"{entry.job.run} failed; see {entry.log}")
        return job_return
