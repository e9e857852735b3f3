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
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softmoe_cli.config import BUDGETS, UsageError
from softmoe_cli.text import aligned

TAIL_BYTES = 32768
STATES = (
    "running", "running or killed", "queued", "held", "failed", "stopped", "waiting", "over the limit", "done",
    "done before",
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """One run. `progress` is a share of its budget, `top1_pct` the latest on validation images, `age_s` the time since
    it last wrote a row, `reason` why it failed."""

    run: str
    state: str
    progress: float
    top1_pct: float | None
    age_s: float | None
    reason: str | None
    log: str | None
    folder: str


def read(folders: Iterable[Path]) -> list[State]:
    """Every job of the sweeps in these folders, and every other run.

    Raises:
        UsageError: a folder that is not there, or that holds neither.
    """
    states: dict[str, State] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
        found = False
        for pattern in ("jobs.json", "sweep-*/jobs.json", "*/sweep-*/jobs.json"):
            for file in sorted(folder.glob(pattern)):
                found = True
                states |= {each.folder: each for each in sweep(file.parent)}
        for pattern in ("config.yaml", "*/config.yaml", "*/*/config.yaml"):
            runs = [file.parent for file in sorted(folder.glob(pattern))]
            found = found or bool(runs)
            states |= {str(run): state(run, run.name, None) for run in runs if str(run) not in states}
        if not found:
            raise UsageError(f"{folder} holds neither a run nor a sweep; softmoe train makes them in outputs/STUDY")
    return list(states.values())


def sweep(folder: Path) -> Iterator[State]:
    """The jobs of a sweep-ID folder.

    Raises:
        UsageError: its jobs.json is damaged.
    """
    try:
        jobs = json.loads((folder / "jobs.json").read_text())["jobs"]
        for number, job in enumerate(jobs):
            run = Path(os.path.normpath(folder / job["folder"]))
            yield state(run, job["run"], folder / f"{number:02}.log")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}/jobs.json is damaged ({error!r}); type the sweep's command again") from error


def state(folder: Path, name: str, log: Path | None) -> State:
    """One run, and the job of a sweep that it is, if its log is given."""

    def told(
        kind: str, progress: float, top1_pct: float | None, wrote: Path | None, reason: str | None = None
    ) -> State:
        age = max(0.0, time.time() - wrote.stat().st_mtime) if wrote and wrote.exists() else None
        shown = str(log) if log is not None and log.exists() else None
        return State(name, kind, progress, top1_pct, age, reason, shown, str(folder))

    result, metrics = folder / "result.json", folder / "metrics.jsonl"
    if result.exists():
        return told("done", 1.0, _fields(result.read_bytes()).get("validation_top1_pct"), result)
    last, top1_pct = _last_rows(metrics)
    progress = _progress(folder / "config.yaml", last) if last else 0.0
    holder = _holder(folder / ".lock")
    if holder == platform.node():
        return told("running", progress, top1_pct, metrics)
    failure = log.with_suffix(".json") if log is not None else None
    if failure is not None and failure.exists():
        return told("failed", progress, top1_pct, metrics, str(_fields(failure.read_bytes()).get("reason")))
    if holder is not None:
        return told("running or killed", progress, top1_pct, metrics)
    return told("stopped" if (folder / "config.yaml").exists() else "waiting", progress, top1_pct, metrics)


def _holder(lock: Path) -> str | None:
    """The machine whose process holds a run's folder, as far as can be known: a lock is seen on its own machine only,
    so of another one counts what the lock file says, which a killed process cannot take back."""
    try:
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return platform.node()
            name = file.read().partition(" ")[0]
    except FileNotFoundError:
        return None
    return name if name and name != platform.node() else None


def held(folder: Path) -> bool:
    """Whether a process of this machine holds a run's folder."""
    return _holder(folder / ".lock") == platform.node()


def _fields(text: str | bytes) -> dict[str, Any]:
    """A JSON object; empty when it is damaged, which the run itself will complain of."""
    try:
        row = json.loads(text)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _last_rows(metrics: Path) -> tuple[dict[str, Any] | None, float | None]:
    """The last whole row, and the latest validation top-1."""
    if not metrics.exists():
        return None, None
    size = metrics.stat().st_size
    last: dict[str, Any] | None = None
    for start in dict.fromkeys((max(0, size - TAIL_BYTES), 0)):
        with metrics.open("rb") as file:
            file.seek(start)
            lines = file.read().split(b"\n")[1 if start else 0 : -1]  # whole lines only: the rest is being written
        for line in reversed(lines):
            row = _fields(line)
            last = last or row or None
            if row.get("split") == "validation":
                return last, row["top1_pct"]
    return last, None


def _progress(config: Path, row: dict[str, Any]) -> float:
    """The share of a run's budget that its last row has used."""
    said = yaml.load(config.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    train, minutes = said["train"], row["device_s"] / said.get("devices", 1) / 60  # device_s adds devices up
    used = {"steps": row["step"], "epochs": row["epoch"], "images": row["images"], "minutes": minutes}
    return min(1.0, next(used[key] / train[key] for key in BUDGETS if train[key] is not None))


def show(states: list[State]) -> str:
    """The table of `softmoe status`, how many are in which state, and why some failed."""
    rows = [["run", "state", "progress", "val top-1", "last row", "log"]]
    rows += [[s.run, s.state, *figures(s), ago(s.age_s), s.log or "-"] for s in states]
    failed = [f"failed: {s.run}: {s.reason}" for s in states if s.state == "failed"]
    return "\n".join([aligned(rows, markdown=False), "", count(states), *failed])


def figures(s: State) -> list[str]:
    return [f"{100 * s.progress:.0f}%", "-" if s.top1_pct is None else f"{s.top1_pct:.2f}%"]


def count(states: Iterable[State]) -> str:
    kinds = [s.state for s in states]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in STATES if kind in kinds)


def ago(seconds: float | None) -> str:
    return "-" if seconds is None else f"{duration(seconds)} ago"


def duration(seconds: float) -> str:
    """75 -> 1m15s"""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
