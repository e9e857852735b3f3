"""Finds and reads the runs of other programs, and makes them what `softmoe compare` compares."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from softmoe_cli.compare.others.mapping import (
    OWN_WORDS,
    Named,
    column_of,
    from_path,
    mapping,
    path_pattern,
    require_percents,
    scaled_value,
)
from softmoe_cli.compare.others.tables import A_TABLE, STEP_COLUMN, TABLE_ENDINGS, read_table
from softmoe_cli.compare.others.tensorboard import read_events, with_hparams
from softmoe_cli.compare.others.timm import ARGS, read_timm
from softmoe_cli.compare.others.told import EVENTS, SUMMARY, WANDB_FILE, Cells, Damaged, Told
from softmoe_cli.compare.others.wandb import read_wandb
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.runs import FinishedRun, is_run
from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import AXES, COSTS, QUALITIES, Row, number
from softmoe_cli.text import printable, several

LeftOut = list[tuple[str, str]]


def read_others(paths: Sequence[Path], question: Question) -> tuple[list[FinishedRun], LeftOut, list[str]]:
    """Every run of another program in the files and below the folders, sorted by place; (place, reason) for each that
    cannot be compared; and notes on what was taken for what.

    Raises:
        UsageError: a file of no known kind, a mapping that cannot work, or shares that stand for percents.
    """
    for path in filter(is_others, paths):
        if not os.path.isfile(path):
            raise UsageError(f"{path}: no such file")
    named = mapping(question.map, question.quality, question.cost)
    pattern = path_pattern(question.path)
    told, left_out = _found(paths, named)
    runs: list[FinishedRun] = []
    read: list[Told] = []
    notes: dict[str, int] = defaultdict(int)
    for each in sorted(told, key=lambda run: (str(run.place), run.part)):
        try:
            run = finished_run(each, named, from_path(each.place, pattern), question)
        except Damaged as error:
            left_out.append((each.where, str(error)))
            continue
        runs.append(run)
        read.append(each)
        for note in _remarks(each, run, named, question):
            notes[note] += 1
    alike = 0 if question.by else _alike(runs)
    if alike:
        notes[ALIKE] = alike
    for option, given in (("map", question.map), ("path", question.path)):
        if given and not runs and not left_out:
            raise UsageError(f"--{option} has no effect: there is no run of another program in what was named")
    _check_percents(list(zip(read, runs, strict=True)), named)
    return runs, left_out, [f"{several(count, 'run')}: {note}" for note, count in notes.items()]


def _found(paths: Sequence[Path], named: Mapping[str, Named]) -> tuple[list[Told], LeftOut]:
    told: list[Told] = []
    events: list[Told] = []
    left_out: LeftOut = []
    seen: set[str] = set()

    def read(place: Path, reader: Callable[[], list[Told]], into: list[Told]) -> None:
        try:
            whole = os.path.realpath(place)  # Path.resolve fails where links lead to each other
            if whole not in seen:
                seen.add(whole)
                into += reader()
        except Damaged as error:
            left_out.append((printable(str(place)), str(error)))
        except OSError as error:
            left_out.append((printable(str(place)), f"cannot be read ({error.strerror})"))

    step, run = (named[key].column if key in named else None for key in ("step", "run"))
    for path in paths:
        for place, kind, files in _places(path):
            if kind == "timm":
                read(place, partial(_alone, read_timm, place), told)
            elif kind == "wandb":
                read(place, partial(_alone, read_wandb, place), told)
            elif kind == "events":
                read(place, partial(_alone, read_events, place, files), events)
            else:

                def table(place: Path = place) -> list[Told]:
                    runs, wrong = read_table(place, step or STEP_COLUMN, run)
                    left_out.extend((printable(where), reason) for where, reason in wrong)
                    return runs

                read(place, table, told)
    return told + with_hparams(events), left_out


def _alone(reader: Callable[..., Told], *of: Any) -> list[Told]:
    return [reader(*of)]


def _places(path: Path) -> Iterator[tuple[Path, str, list[Path]]]:
    """(place, kind, files) of everything that another program may have written. Tables are read where they are named;
    so are folders called wandb, which lie beside the runs that they mirror."""
    if not os.path.isdir(path):  # which is also false for a name that is too long
        kind = _kind(path)
        if kind is not None:
            yield path, kind, [path]
        return
    for where, folders, files in os.walk(path):
        here = Path(where)
        if is_run(files) and here.name != "files":
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "wandb")
        events = sorted(here / name for name in files if EVENTS in name)
        runs = sorted(here / name for name in files if name.endswith(WANDB_FILE))
        if SUMMARY in files or (ARGS in files and not events and not runs):
            yield here, "timm", []
        elif runs:
            folders.clear()
            for each in runs:
                yield each, "wandb", [each]
        elif events:
            yield here, "events", events


def _kind(path: Path) -> str | None:
    if path.suffix == WANDB_FILE:
        return "wandb"
    if EVENTS in path.name:
        return "events"
    return "table" if path.suffix in TABLE_ENDINGS else None


def is_others(path: Path) -> bool:
    """Whether a file's name is one that another program's runs have."""
    return not os.path.isdir(path) and _kind(path) is not None


def finished_run(told: Told, named: Mapping[str, Named], path: Cells, question: Question) -> FinishedRun:
    """The run as compare knows runs. What is mapped, and what the program's own names say, becomes a figure; the rest
    of what was chosen stays a setting, as `config.NAME`.

    Raises:
        Damaged: no quality, or a seed or cut that is no whole number.
    """
    told.settings = told.settings | path
    row: Row = {"data.split_seed": None, "seed": None, "data": None}
    used = set()
    for key in (*QUALITIES, *COSTS, *OWN_WORDS.values()):
        column = column_of(key, told, named)
        if column is None:
            continue
        if not _stays(key, told, named):
            used.add(column.column)
        value = told.summary.get(column.column, told.settings.get(column.column))
        if key in QUALITIES or key in COSTS:
            value = scaled_value(value, column)
            row[key] = value if number(value) else None
        else:
            row[key] = value
        if value is None and key in named:
            raise Damaged(f"has no {column.column}, which --map says {key} is; it has {_names(told)}")
    _whole(row)
    if row.get(question.quality) is None:
        column = column_of(question.quality, told, named)
        if column is None:
            raise Damaged(
                f"nothing says which of its figures is {question.quality}: --map quality=NAME, of {_names(told)}"
            )
        raise Damaged(f"says {column.column} is {told.summary.get(column.column)!r}, which is not a number")
    chosen = {f"config.{key}": value for key, value in told.settings.items() if key not in used}
    row |= {
        "name": told.part or told.place.name, "study": told.place.parent.name, "command": told.program,
        "checkpoint": None, "router": None, "backbone": _model(told), "data": str(row["data"] or NO_DATA), **chosen,
    }  # fmt: skip
    which = [told.part] if row["seed"] is None else []  # equal rows without a seed are runs of their own
    text = json.dumps([told.program, told.settings, told.summary, *which], sort_keys=True, default=str)
    row["signature"] = hashlib.sha256(text.encode()).hexdigest()[:10]
    return FinishedRun(told.place, row, told.finished, _curve(told, named, row), "", chosen=chosen)


def _stays(key: str, told: Told, named: Mapping[str, Named]) -> bool:
    """Whether a column stays a setting though a key of a result is in it. Runs that were given other epochs or classes
    are no repetitions of each other, whatever else these tell; what a clock says is no choice."""
    if key == "classes" or (told.program == A_TABLE and key in ALLOTTED):
        return True
    return key in COSTS and key not in named and not COSTS[key].clocked


ALLOTTED = ("images", "epochs", "steps")
"""In a table with a row for each run these are what the run was given, also where `--map` makes them a cost."""
NO_DATA = "data not named"


def _names(told: Told) -> str:
    names = [*told.summary, *(key for key in told.settings if key not in told.summary)]
    return ", ".join(names[:MOST_NAMES]) + (", …" if len(names) > MOST_NAMES else "")


MOST_NAMES = 30


def _model(told: Told) -> str | None:
    name = told.settings.get("model")
    return name if isinstance(name, str) else None


def _whole(row: Row) -> None:
    """Makes seed, cut and counts whole numbers.

    Raises:
        Damaged: one of them is none.
    """
    for key in ("seed", "data.split_seed", "test_images", "classes"):
        value = row.get(key)
        if isinstance(value, float) and value.is_integer():
            value = row[key] = int(value)
        if value is not None and (type(value) is not int or abs(value) >= 2**63):
            raise Damaged(f"says {key} is {printable(repr(value))[:60]}, which is not a whole number")


def _curve(told: Told, named: Mapping[str, Named], row: Row) -> list[Row]:
    """The history of what has a curve against what grows with training, as far as both are there and grow."""
    looks: list[Row] = []
    qualities = {
        QUALITIES[key].curve: column
        for key in QUALITIES
        if not key.startswith("best") and row.get(key) is not None and (column := column_of(key, told, named))
    }
    axes = {axis: column for axis in AXES if row.get(axis) is not None and (column := column_of(axis, told, named))}
    for line in told.history:
        look = {key: scaled_value(line.get(column.column), column) for key, column in (axes | qualities).items()}
        look = {key: value for key, value in look.items() if number(value)}
        if not qualities.keys() & look.keys() or not axes.keys() <= look.keys():
            continue
        if looks and any(look[axis] <= looks[-1][axis] for axis in axes):
            continue
        looks.append(look)
    return looks if axes else []


def _remarks(told: Told, run: FinishedRun, named: Mapping[str, Named], question: Question) -> Iterator[str]:
    """What a reader must know of a run, in words that are the same for many."""
    column = column_of(question.quality, told, named)
    if column is not None and column.column.startswith("eval_") and "validation" not in question.quality:
        yield (
            f"{column.column}, after the last epoch, stands for the test images; it is of the images that timm looked "
            "at after every epoch, and may have chosen by"
        )
    if run.row["seed"] is None:
        yield "no seed is stated, so that they are paired with none; --map seed=NAME or --path PATTERN says it"
    if run.row["data"] == NO_DATA:
        yield "nothing says which images they saw, and they stand together as if these were the same"
    if run.row.get("device_s") is not None and told.names.get("device_s"):
        yield (
            f"their {COSTS['device_s'].amount} is {told.program}'s clock, from their first row to their last, pauses "
            "and evaluation included"
        )


def _alike(runs: Sequence[FinishedRun]) -> int:
    """How many runs share seed, cut and settings with a run of other results: a column that --map made a cost may be
    what they differ in."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        if run.row["seed"] is not None:
            key = json.dumps([run.row["command"], run.draw, run.row["data"], run.chosen], sort_keys=True, default=str)
            found[key].add(run.row["signature"])
    return sum(len(each) for each in found.values() if len(each) > 1)


ALIKE = (
    "they agree with another run in seed and settings, and stand in one group unless --by or --path keeps them apart"
)


def _check_percents(runs: Sequence[tuple[Told, FinishedRun]], named: Mapping[str, Named]) -> None:
    """Of what a program itself calls by a name of its own, the unit is known."""
    for key in QUALITIES:
        if QUALITIES[key].better != "higher" or (key in named and named[key].factor is not None):
            continue
        parts: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for told, run in runs:
            column = column_of(key, told, named)
            if run.row.get(key) is not None and column is not None and (key in named or key not in told.names):
                parts[(told.program, str(told.place), column.column)].append(run.row[key])
        require_percents(key, parts)
