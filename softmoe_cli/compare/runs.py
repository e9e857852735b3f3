"""Finished runs as `softmoe compare` reads them: from result.json and metrics.jsonl and nothing else, offline."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from softmoe_cli.compare.others.told import WANDB_FILE, by_others
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run import rows
from softmoe_cli.run.rows import AXES, EVERY, LOOK, QUALITIES, RESULT, Row, number
from softmoe_cli.text import printable

FINGERPRINT = ("hardware", "torch")
"""Seconds and joules are compared only between runs that are equal in these."""
NO_CHOICE = ("data.identity", "data.split_seed", "checkpoint.train_pflop", "checkpoint.digest")
"""Keys with a dot that are no settings. A cut of the data is left to chance, like a seed.
A checkpoint's origin is a setting: checkpoints of one origin differ by chance only."""
DENSE_LACKS = ("model.moe_blocks", "model.expert_init")
RUN_FILES = {"result.json", "metrics.jsonl", "config.yaml"}
"""Files of a run's folder. Other programs have a config.yaml too."""
VERSION = ("commit", "softmoe", "torch")


@dataclass
class FinishedRun:
    """A finished run: its result row, when that was written (seconds since 1970), its validation rows, and in `damage`
    why there are none. `source_counted`: its training FLOPs hold those of the checkpoint that it began with.
    `chosen`: the settings of a run of another program."""

    folder: Path
    row: Row
    finished: float
    looks: list[Row]
    damage: str
    source_counted: bool = False
    chosen: Row | None = None

    @property
    def place(self) -> str:
        """The folder's path with unprintable characters escaped."""
        return printable(str(self.folder))

    @property
    def draw(self) -> tuple[int, int]:
        """The cut of the data and the seed: all that chance decides. A run that states no seed has one of its own."""
        seed = self.row["seed"]
        return self.row["data.split_seed"] or 0, -1 - int(self.row["signature"], 16) if seed is None else seed

    def settings(self) -> Row:
        """What was chosen: everything but seeds and cuts. Choices that a dense model does not have are left out."""
        if self.chosen is not None:
            return dict(self.chosen)
        chosen = {key: value for key, value in self.row.items() if "." in key and key not in NO_CHOICE}
        chosen["command"] = self.row["command"]
        if chosen["model.router._target_"] is None:
            chosen["model.router._target_"] = "dense"
            for key in DENSE_LACKS:
                chosen.pop(key, None)
        if "adapter" in self.row and self.row["adapter"] is None and self.row["command"] == "finetune":
            chosen["model.adapter.name"] = "no adapter"
        return chosen

    def curve(self, axis: str, key: str) -> list[tuple[float, float]]:
        return [(look[axis], look[key]) for look in self.looks if axis in look and key in look]


def said_seed(run: FinishedRun) -> str:
    """The seed as tables say it; a run of another program may state none."""
    return "?" if run.row["seed"] is None else str(run.row["seed"])


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[tuple[str, str]]]:
    """Every run below the folders, sorted by path, and (folder, reason) for each folder that holds no finished run.

    Raises:
        UsageError: a folder that does not exist.
    """
    run_folders: dict[Path, Path] = {}
    for folder in folders:
        if not os.path.isdir(folder):  # which is also false for a name that is too long
            parent = folder.parent
            siblings = [path.name for path in parent.iterdir() if path.is_dir()] if os.path.isdir(parent) else []
            raise UsageError(
                f"{folder} is no folder{' or file that runs are read from' if os.path.isfile(folder) else ''}."
                f"{nearest(folder.name, siblings)}"
            )
        for path in _run_folders(folder):
            run_folders.setdefault(path.resolve(), path)
    runs, left_out = [], []
    for path in sorted(run_folders.values()):
        row, reason = _result(path)
        if row is None:
            left_out.append((printable(str(path)), reason))
        else:
            finished = (path / "result.json").stat().st_mtime
            runs.append(FinishedRun(path, row, finished, *_looks(path / "metrics.jsonl", row)))
    return runs, left_out


def unfinished(folders: Sequence[Path]) -> list[Row]:
    """The last row that can be read of each run below the folders that has no result; empty where there is none."""
    found = []
    for path in sorted({path.resolve() for folder in folders for path in _run_folders(folder)}):
        if (path / "result.json").exists() or not (path / "config.yaml").exists():
            continue
        try:
            written = rows.contents(path / "metrics.jsonl", rows.MOST_LINES_BYTES).splitlines()
        except (FileNotFoundError, rows.Unreadable):
            written = []
        found.append(next((row for line in reversed(written) if (row := _readable(line))), {}))
    return found


def _readable(line: bytes) -> Row:
    try:
        row = rows.parsed(line)
    except rows.Unreadable:
        return {}
    return row if isinstance(row, dict) and not rows.fault(row, EVERY) else {}


def is_run(files: Sequence[str]) -> bool:
    """Whether a folder with these files is of a run of this project. Without a result, it is of the other program that
    wrote one of them."""
    return "result.json" in files or (bool(RUN_FILES & set(files)) and not by_others(files))


def _run_folders(top: Path) -> Iterator[Path]:
    """Folders that hold a run or the beginning of one, and empty ones."""
    for where, folders, files in os.walk(top):
        if is_run(files) or not (folders or files):
            folders.clear()
            yield Path(where)
        elif any(name.endswith(WANDB_FILE) for name in files):  # below it W&B has a config.yaml of its own
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".") and name != "wandb"]


def _result(folder: Path) -> tuple[Row | None, str]:
    """The result row, or why there is none."""
    try:
        result = rows.row(folder / "result.json", RESULT)
    except FileNotFoundError:
        if not any(folder.iterdir()):
            return None, "empty"
        looks, _ = _looks(folder / "metrics.jsonl")
        return None, "unfinished: no result.json" + (f", last look at step {looks[-1]['step']:,}" if looks else "")
    except rows.Unreadable as error:
        return None, f"result.json {error}"
    return cast(Row, rows.printed(result)), ""


def _looks(path: Path, result: Row | None = None) -> tuple[list[Row], str]:
    """The validation rows, and what is wrong with their file. A damaged file gives no rows, and neither does a file
    that has changed since the run wrote its `result`."""
    try:
        text = rows.contents(path, rows.MOST_LINES_BYTES)
    except FileNotFoundError:
        return [], "metrics.jsonl is missing"
    except rows.Unreadable as error:
        return [], f"metrics.jsonl {error}"
    looks: list[Row] = []
    lines = text.splitlines()
    for place, line in enumerate(lines, 1):
        try:
            row = rows.parsed(line)
        except rows.Unreadable:
            row = None
        if not isinstance(row, dict):
            return [], f"metrics.jsonl is damaged in line {place}"
        if row.get("split") != "validation":
            continue
        wrong = rows.fault(row, EVERY | LOOK)
        if wrong:
            return [], f"metrics.jsonl {wrong}, in line {place}"
        # Steps grow from look to look; a cost may stand still: an update that compiles takes no seconds of training.
        if looks and (row["step"] <= looks[-1]["step"] or any(row[axis] < looks[-1][axis] for axis in AXES)):
            return [], f"metrics.jsonl goes back in line {place}"
        looks.append({rows.printed(key): value for key, value in row.items() if number(value)})
    if result is not None and rows.metrics_digest(text) != {key: result[key] for key in rows.metrics_digest(b"")}:
        return [], (
            f"metrics.jsonl was changed after the run: it had {result['metrics_rows']:,} rows then and has "
            f"{len(lines):,} now, or other ones"
        )
    return looks, ("" if looks else "metrics.jsonl has no validation row")


def with_sources(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[tuple[str, str]]]:
    """The runs, with what their checkpoints had cost in the training FLOPs of their results and curves; (folder,
    reason) for each whose checkpoint does not say it.

    Raises:
        UsageError: no run began with a checkpoint.
    """
    if not any(run.row.get("checkpoint") is not None for run in runs):
        raise UsageError("--with-source has no effect: none of the runs began with a checkpoint")
    counted, left_out = [], []
    for run in runs:
        before = run.row.get("checkpoint.train_pflop")
        if run.row.get("checkpoint") is None:
            counted.append(run)
        elif before is None:
            left_out.append((run.place, "what its checkpoint had cost is not known, and --with-source counts it"))
        else:
            row, *looks = [each | {"train_pflop": before + each["train_pflop"]} for each in (run.row, *run.looks)]
            counted.append(replace(run, row=row, looks=looks, source_counted=True))
    return counted, left_out


def sweep_commands(runs: list[FinishedRun]) -> list[str]:
    """The commands of the sweeps that the runs belong to, and the number of runs that belong to no sweep."""
    others = sorted({run.row["command"] for run in runs if run.chosen is not None})
    runs = [run for run in runs if run.chosen is None]
    wanted, commands = {os.path.normpath(run.folder): run for run in runs}, []
    for study in sorted({run.folder.parent for run in runs}):
        for file in sorted(study.glob("sweep-*/jobs.json")):
            try:
                words, jobs = rows.jobs(file)
            except (FileNotFoundError, rows.Unreadable):
                continue  # softmoe status names it
            mine = [wanted.pop(os.path.normpath(file.parent / job["folder"]), None) for job in jobs]
            if any(mine):
                commands.append(printable(shlex.join(words)))
    if wanted:
        kinds = sorted({str(run.row.get("command")) for run in wanted.values()})
        commands.append(
            f"softmoe {' or '.join(kinds)}, typed once for each of {len(wanted)} runs: see their config.yaml"
        )
    return [*commands, *(f"runs read from what {program} wrote" for program in others)]


def single(runs: list[FinishedRun], strict: bool) -> tuple[list[FinishedRun], list[tuple[str, str]]]:
    """One run per signature (and code version, if those are kept apart): the first by path."""
    first: dict[Any, FinishedRun] = {}
    doubles = []
    for run in runs:
        first_run = first.setdefault((run.row["signature"], *(str(run.row.get(key)) for key in VERSION if strict)), run)
        if first_run is not run:
            same = all(first_run.row.get(key) == run.row.get(key) for key in QUALITIES)
            reason = f"the same run as {first_run.place}, " + ("equal in quality" if same else "with OTHER quality")
            doubles.append((run.place, reason))
    return list(first.values()), doubles
