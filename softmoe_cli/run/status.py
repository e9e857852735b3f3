"""What runs are doing, read from their files: by `softmoe status`, and by a sweep's launcher for its own table.

A run's folder says nearly everything: result.json that it is done, .lock that a process holds it, config.yaml and the
last row how far it is. A sweep adds a folder sweep-ID beside its runs, with what no run can say of itself:

  jobs.json      the jobs: overrides and run folder
  NN.log         what job NN printed, in all its attempts
  NN.json        why job NN failed; gone when it starts again
  NN.slurm       under which number Slurm has job NN; submitit/ is submitit's own
  multirun.yaml  Hydra's record of the command
"""

import fcntl
import os
import platform
import re
import shlex
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from softmoe_cli import programs
from softmoe_cli.errors import UsageError
from softmoe_cli.run import rows
from softmoe_cli.run.budget import ConfiguredBudget, configured_budget
from softmoe_cli.text import aligned, in_words, printable

DONE = {key: rows.RESULT[key] for key in ("format", "validation_top1_pct")}
STEP = {key: rows.EVERY[key] for key in ("format", "step", "epoch", "images", "device_s")}
STEP["top1_pct"] = replace(rows.LOOK["top1_pct"], null=True, optional=True)
"""What is needed of a result, and of a row."""
TAILS_BYTES = (2**15, 2**26)
"""How much is read from the end of a file of rows: the first, and the second where that does not tell enough."""
LOCK_LETTERS = 500
STATES = (
    "running", "running or killed", "queued", "held", "failed", "stopped", "waiting", "over the limit", "damaged",
    "done", "done before",
)  # fmt: skip
COMMANDS_SHOWN = 5
"""The most commands to go on with that are shown below one table."""


@dataclass(frozen=True)
class State:
    """One run. `progress` is a share of its budget, None where that cannot be known; `top1_pct` the latest on
    validation images, `age_s` the time since it last wrote a row, `reason` why it failed or which of its files is
    damaged, `resume` the command that goes on with it."""

    run: str
    state: str
    progress: float | None
    top1_pct: float | None
    age_s: float | None
    reason: str | None
    log: str | None
    folder: str
    resume: str | None = None


def status_as_typed(arguments: Sequence[str]) -> int:
    """Prints what the runs of the folders that are typed are doing, or those below outputs."""
    unknown = [word for word in arguments if word.startswith("-")]
    folders = [Path(word) for word in arguments if not word.startswith("-")]
    if unknown:
        raise UsageError(f"softmoe status has no option {unknown[0]}; it has {programs.FLAG}")
    if not folders and not Path("outputs").is_dir():
        raise UsageError("there is no folder outputs here; softmoe status FOLDER takes a study, a sweep or a run")
    states = read_states(folders or [Path("outputs")], newest_first=not folders)
    programs.reply([asdict(state) for state in states]) if programs.listen() else print(show_states(states))
    return 0


def read_states(folders: Iterable[Path], *, newest_first: bool = False) -> list[State]:
    """Every job of the sweeps in these folders, and every other run; a study after the other, those that wrote last
    first if asked for. What is damaged costs its own line only.

    Raises:
        UsageError: a folder that is not there, or that holds neither.
    """
    states: dict[str, State] = {}
    for folder in folders:
        if not os.path.isdir(folder):  # which is also false for a name that is too long
            raise UsageError(f"{folder} is no folder")
        holds_runs = False
        for pattern in ("jobs.json", "sweep-*/jobs.json", "*/sweep-*/jobs.json"):
            for file in sorted(folder.glob(pattern)):
                holds_runs = True
                states |= {each.folder: each for each in sweep(file.parent)}
        for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
            runs = [file.parent for file in sorted(folder.glob(pattern))]
            holds_runs = holds_runs or bool(runs)
            states |= {str(run): state(run, run.name, None) for run in runs if str(run) not in states}
        if not holds_runs:
            raise UsageError(f"{folder} holds neither a run nor a sweep; softmoe train makes them in outputs/STUDY")
    studies: dict[str, list[State]] = {}
    for each in states.values():
        studies.setdefault(os.path.dirname(each.folder), []).append(each)
    ages = {
        name: min((s.age_s for s in own if s.age_s is not None), default=float("inf")) for name, own in studies.items()
    }
    order = sorted(studies, key=lambda name: ages[name]) if newest_first else list(studies)
    return [each for name in order for each in studies[name]]


def sweep(folder: Path) -> Iterator[State]:
    """The jobs of a sweep-ID folder; one line that says so where its jobs.json is damaged."""
    try:
        typed, jobs = rows.jobs(folder / "jobs.json")
    except (FileNotFoundError, rows.Unreadable) as error:
        reason = f"jobs.json {error}; type the sweep's command again"
        yield State(folder.name, "damaged", None, None, None, reason, None, str(folder))
        return
    again = None if held(folder) else shlex.join(typed)
    for number, job in enumerate(jobs):
        run = Path(os.path.normpath(folder / job["folder"]))
        job_state = state(run, job["run"], folder / f"{number:02}.log")
        goes_on = again if job_state.state in ("stopped", "waiting", "failed") else None
        yield replace(job_state, resume=goes_on)


def state(folder: Path, name: str, log: Path | None) -> State:
    """The state of one run or, if its `log` is given, of the job of a sweep that it is."""
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    shown = str(log) if log is not None and os.path.exists(log) else None
    run_state = State(name, "waiting", 0.0, None, _age(metrics), None, shown, str(folder))
    try:
        done = rows.row(folder / "result.json", DONE)
        top1_pct, age_s = done["validation_top1_pct"], _age(folder / "result.json")
        return replace(run_state, state="done", progress=1.0, top1_pct=top1_pct, age_s=age_s)
    except FileNotFoundError:
        pass
    except rows.Unreadable as error:
        return replace(run_state, state="damaged", progress=None, reason=f"result.json {error}")
    try:
        last, top1_pct = _last_rows(metrics)
        run_state = replace(run_state, top1_pct=top1_pct)
    except rows.Unreadable as error:
        last, run_state = None, replace(run_state, state="damaged", progress=None, reason=f"metrics.jsonl {error}")
    try:
        budget = configured_budget(config)
        if run_state.state != "damaged":
            typed = ["softmoe", budget.command, "-cp", os.path.abspath(folder), "-cn", "config"]
            again = shlex.join([*typed, *_where(folder, budget)])
            progress = _progress(budget, last) if last else 0.0
            run_state = replace(run_state, state="stopped", progress=progress, resume=again)
    except FileNotFoundError:
        if last:
            run_state = replace(run_state, state="damaged", progress=None, reason="config.yaml is missing")
    except rows.Unreadable as error:
        run_state = replace(run_state, state="damaged", progress=None, reason=f"config.yaml {error}")
    try:
        holder = _holder(folder / ".lock")
    except rows.Unreadable as error:
        return replace(run_state, state="damaged", reason=f".lock {error}", resume=None)
    if holder == platform.node():
        return replace(run_state, state="running", resume=None)
    if log is not None and os.path.exists(log.with_suffix(".json")):
        return replace(run_state, state="failed", reason=_failure(log.with_suffix(".json")))
    if holder is not None:
        return replace(run_state, state="running or killed", resume=None)
    if run_state.state == "stopped" and os.path.exists(folder / rows.FAILED_FILE):
        return replace(run_state, state="failed", reason=_failure(folder / rows.FAILED_FILE))
    return run_state


def _where(folder: Path, budget: ConfiguredBudget) -> list[str]:
    """Words with which a run goes on where it lies, if its configuration leads elsewhere from here: it was moved, or
    this is another working folder."""
    if budget.output_root is None or budget.study is None:
        return []
    place, study = os.path.abspath(folder.parent), budget.study
    if place == os.path.abspath(os.path.join(budget.output_root, study)):
        return []
    if place.endswith(f"/{study}"):
        return [f"output_root={quoted(place.removesuffix(f'/{study}') or '/')}"]
    root, study = os.path.split(place)
    return [f"output_root={quoted(root)}", f"study={quoted(study)}"]


def quoted(text: str) -> str:
    """Text as Hydra reads it, whatever it looks like."""
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + (found[2] and '\\"'), text) + '"'


def _age(file: Path) -> float | None:
    """Seconds since a file was written."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None


def _failure(note: Path) -> str:
    try:
        return str(rows.row(note, rows.FAILURE)["reason"])
    except (FileNotFoundError, rows.Unreadable) as error:
        return f"why cannot be told: {note.name} {error}"


def _holder(lock: Path) -> str | None:
    """The machine whose process holds a run's folder, as far as can be known. A lock is visible on its own machine
    only; for other machines the text in the lock file counts, which a killed process cannot remove.

    Raises:
        rows.Unreadable: what lies there is no lock.
    """
    try:
        if not stat.S_ISREG(lock.stat().st_mode):
            raise rows.Unreadable("is no file")
        with lock.open(errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return platform.node()
            name = file.read(LOCK_LETTERS).partition(" ")[0]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise rows.Unreadable(f"cannot be read ({error.strerror})") from error
    return name if name and name != platform.node() else None


def held(folder: Path) -> bool:
    """Whether a process of this machine holds a run's folder."""
    try:
        return _holder(folder / ".lock") == platform.node()
    except rows.Unreadable:
        return False  # whoever takes the folder will say what is wrong with it


def _last_rows(metrics: Path) -> tuple[rows.Row | None, float | None]:
    """The last whole row, and the latest validation top-1; rows that tell no progress are passed over: `softmoe
    compare` names them.

    Raises:
        rows.Unreadable: no file, or none with such a row.
    """
    try:
        size = metrics.stat().st_size
        if not metrics.is_file():
            raise rows.Unreadable("is no file")
        last, lines = None, [b""]
        for start in dict.fromkeys(max(0, size - tail) for tail in TAILS_BYTES):
            with metrics.open("rb") as file:
                file.seek(start)
                lines = file.read(size - start).split(b"\n")[
                    1 if start else 0 : -1
                ]  # whole lines: the rest is being written
            for line in reversed(lines):
                row = _step(line)
                last = last or row
                if row and row.get("split") == "validation" and row.get("top1_pct") is not None:
                    return last, row["top1_pct"]
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise rows.Unreadable(f"cannot be read ({error.strerror})") from error
    if last is None and lines:
        raise rows.Unreadable("has no row that tells how far the run is")
    return last, None


def _step(line: bytes) -> rows.Row | None:
    """A row that tells how far a run is."""
    try:
        row = rows.parsed(line)
    except rows.Unreadable:
        return None
    return row if isinstance(row, dict) and not rows.fault(row, STEP) else None


def _progress(budget: ConfiguredBudget, row: rows.Row) -> float:
    """The share of a run's budget that its last row has used."""
    minutes = row["device_s"] / budget.devices / 60  # device_s adds devices up
    used = {"steps": row["step"], "epochs": row["epoch"], "images": row["images"], "minutes": minutes}
    return min(1.0, max(0.0, float(used[budget.key] / budget.amount)))


def show_states(states: list[State]) -> str:
    """The table of `softmoe status`: a part for each study, with how many of its runs are in which state, why some
    failed, and what to type to go on."""
    studies: dict[str, list[State]] = {}
    for each in states:
        studies.setdefault(os.path.dirname(each.folder), []).append(each)
    return "\n\n".join(_study(name, own) for name, own in studies.items())


def _study(name: str, states: list[State]) -> str:
    table = [["run", "state", "progress", "val top-1", "last row", "log"]]
    for s in states:
        log = os.path.relpath(s.log, name or ".") if s.log else "-"
        table.append([printable(s.run), s.state, *progress_cells(s), ago(s.age_s), printable(log)])
    told = [f"{s.state}: {printable(s.run)}: {printable(s.reason)}" for s in states if s.reason]
    again = list(dict.fromkeys(s.resume for s in states if s.resume))
    told += [f"to go on: {printable(command)}" for command in again[:COMMANDS_SHOWN]]
    if len(again) > COMMANDS_SHOWN:
        told.append(f"and {len(again) - COMMANDS_SHOWN} more, each with its own folder")
    return "\n".join([printable(name) or ".", aligned(table, markdown=False), "", tally(states), *told])


def progress_cells(s: State) -> list[str]:
    progress = "-" if s.progress is None else f"{100 * s.progress:.0f}%"
    return [progress, "-" if s.top1_pct is None else f"{s.top1_pct:.2f}%"]


def tally(states: Iterable[State]) -> str:
    kinds = [s.state for s in states]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in STATES if kind in kinds)


def ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{in_words(seconds)} ago"
