"""A sweep's jobs as tables and sentences: what they will cost, what they are doing, why they ended."""

import math
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from softmoe_cli import programs
from softmoe_cli.launch.places import Attempt
from softmoe_cli.launch.plan import Job
from softmoe_cli.run.status import State, state
from softmoe_cli.text import aligned, flop, in_words, width_of


@dataclass(eq=False)
class Entry:
    """A job as the launcher follows it. `word` is a state that its files do not show: done before, held, over the limit
    or stopped."""

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
        """The job's state: as its files say, except where the launcher knows more."""
        job_state = state(self.job.folder, self.job.run, self.log)
        if self.attempt is not None and job_state.state not in ("done", "failed"):  # others of its stack may go on
            started = local or job_state.state in ("running", "running or killed")
            job_state = replace(job_state, state="running" if started else "queued")
            if started and self.started is None:
                self.started, self.first_progress = time.monotonic(), job_state.progress or 0.0
        return replace(job_state, state=self.word) if self.word else job_state

    def eta(self, progress: float | None) -> str:
        if self.attempt is None or self.started is None or progress is None or progress <= self.first_progress:
            return "-"
        pace = (time.monotonic() - self.started) / (progress - self.first_progress)
        return in_words(pace * (1 - progress))


def stacks(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """The jobs in order, those that differ in nothing but the seed together, up to `most` of them."""
    found: dict[str, list[list[Entry]]] = {}
    made = []
    for entry in entries:
        job = entry.job
        words = [word for word in job.overrides if word.lstrip("+").partition("=")[0] != "seed"]
        alike = found.setdefault(repr((words, job.threads)), [])
        if not alike or len(alike[-1]) == most:
            alike.append([])
            made.append(alike[-1])
        alike[-1].append(entry)
    return made


def fitted(rows: list[list[str]], width: int) -> str:
    """A table with lines of at most `width` letters. What is too long is taken from the first column, a job's name: the
    sections of its keys, then its beginning."""
    room = width - sum(2 + max(map(width_of, column)) for column in [*zip(*rows, strict=True)][1:])
    if max(width_of(name) for name, *_ in rows) > room:
        short = [re.sub(r"\S*\.(?=[^\s=.]+=)", "", name) for name, *_ in rows]  # num_experts=8, without model.router.
        cut = [name if width_of(name) <= room else f"…{_end(name, room - 1)}" for name in short]
        rows = [[name, *others] for name, (_, *others) in zip(cut, rows, strict=True)]
    return aligned(rows, markdown=False)


def _end(name: str, room: int) -> str:
    """The end of a name that `room` columns hold."""
    return next(end for end in (name[i:] for i in range(len(name) + 1)) if width_of(end) <= max(0, room))


def plan_table(entries: list[Entry], at_a_time: int, width: int | None = None) -> str:
    """The jobs with what they will cost, and the sum of those that are to be done. Where that is wider than `width`
    letters, the names are shorter and the folders are left out."""
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
    table = aligned(rows, markdown=False)
    told = (
        f"{len(entries)} jobs, {len(todo)} to do: {_flop(pflop)}, "
        f"{_time(sum(known)) if known or not todo else 'unknown'} of training and evaluation{together}; from a few "
        f"steps timed here, saving not counted{beside}"
    )
    if width is not None and max(map(len, table.split("\n"))) > width:
        table = fitted([row[:-1] for row in rows], width)
        told = textwrap.fill(f"{told}; --json has the folders", width)
    return f"{table}\n\n{told}"


def show_plan(entries: list[Entry], at_a_time: int) -> None:
    """Prints the jobs with what they will cost; for a program what is not known is null."""
    if not programs.listen():
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(plan_table(entries, at_a_time, width))
        return
    told = [{"run": seen.run, "state": seen.state, "folder": seen.folder, **entry.job.cost}
            for entry in entries if (seen := entry.state(True))]  # fmt: skip
    programs.reply({"jobs": told, "at_a_time": at_a_time})


def _flop(pflop: float) -> str:
    return "unknown" if math.isnan(pflop) else flop(1e15 * pflop)


def _time(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else in_words(seconds)
