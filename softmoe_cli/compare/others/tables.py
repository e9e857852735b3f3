"""Tables that others wrote: CSV, JSON and JSON lines with a row for each run, or with the history of runs.

A table with the steps of a run (W&B's history exports call them `_step`) is a history; any other has a row for each
run. Objects with `config`, `summary` and `history` are runs as W&B's public API hands them out.
"""

import csv
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.others.told import (
    Cells,
    Damaged,
    Told,
    flat,
    last_values,
    others_bytes,
    parsed_json,
    typed_value,
)

TABLE_ENDINGS = (".csv", ".json", ".jsonl", ".ndjson")
A_TABLE = "a table"
"""The program of runs that are a row each."""
STEP_COLUMN = "_step"
"""What W&B's exports call the step of a row."""

MOST_ROWS = 200_000
"""The most rows of a table that are read."""


def read_table(path: Path, step: str, run: str | None) -> tuple[list[Told], list[tuple[str, str]]]:
    """The runs of a table, and (place, reason) for each row that cannot be one. `step` is the column that makes it a
    history, `run` the column that tells runs apart in it.

    Raises:
        Damaged: the whole file cannot be read.
    """
    text = _text(path)
    finished = path.stat().st_mtime
    lines, wrong = _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(path, text)
    if len(lines) > MOST_ROWS:
        raise Damaged(f"has {len(lines):,} rows, and no more than {MOST_ROWS:,} are read")
    whole = [(place, row) for place, row in lines if _sections(row)]
    if whole:
        wrong += [(f"{path}, {place}", NO_RUN) for place, row in lines if not _sections(row)]
        return [_api_run(path, place, row, finished) for place, row in whole], wrong
    flat_lines = [(place, flat(row)) for place, row in lines]
    if any(step in row for _, row in flat_lines):
        if wrong:
            raise Damaged(f"is no whole history: {wrong[0][1]}")
        return _histories(path, [row for _, row in flat_lines], step, run, finished), []
    several = len(flat_lines) > 1
    return [
        Told(path, A_TABLE, row, row, finished=finished, part=place if several else "") for place, row in flat_lines
    ], wrong


def _text(path: Path) -> str:
    try:
        return others_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Damaged(f"is no text in UTF-8 (byte {error.start})") from error


def csv_lines(text: str, what: str = "") -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The head of a CSV file, and (number, cells) of its lines.

    Raises:
        Damaged: no head, a column without or with another's name, or nothing that CSV allows.
    """
    if "\0" in text:
        raise Damaged(f"{what}is no text: it holds zero bytes")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        found = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise Damaged(f"{what}is truncated or damaged in line {reader.line_num} ({error})") from error
    if not found:
        raise Damaged(f"{what}is empty")
    (_, head), *lines = found
    head = [name.strip() for name in head]
    times = Counter(head)
    twice = next((name for name in head if times[name] > 1 or not name), None)
    if twice is not None:
        raise Damaged(f"{what}has {f'two columns {twice}' if twice else 'a column without a name'}")
    return head, lines


def _csv_rows(path: Path, text: str) -> tuple[list[tuple[str, Cells]], list[tuple[str, str]]]:
    head, lines = csv_lines(text)
    if not lines:
        raise Damaged("has no row under its head")
    found: list[tuple[str, Cells]] = []
    wrong: list[tuple[str, str]] = []
    for number, cells in lines:
        if len(cells) != len(head):
            wrong.append((f"{path}, line {number}", f"has {len(cells)} values under {len(head)} names"))
        else:
            found.append((f"line {number}", dict(zip(head, map(typed_value, cells), strict=True))))
    return found, wrong


def _json_rows(path: Path, text: str) -> tuple[list[tuple[str, Cells]], list[tuple[str, str]]]:
    placed: list[tuple[str, Any]] = []
    wrong: list[tuple[str, str]] = []
    if path.suffix == ".json":
        tree = parsed_json(text, "it")
        tree = [tree] if isinstance(tree, dict) else tree
        if not isinstance(tree, list):
            raise Damaged("is no list of rows")
        placed = [(f"row {i}", each) for i, each in enumerate(tree, 1)]
    else:
        for i, line in enumerate(text.splitlines(), 1):
            try:
                placed.append((f"line {i}", parsed_json(line, "the line")))
            except Damaged as error:
                wrong.append((f"{path}, line {i}", str(error)))
    wrong += [(f"{path}, {place}", "is no object with names and values") for place, each in placed if not _named(each)]
    found = [(place, each) for place, each in placed if _named(each)]
    if not found and not wrong:
        raise Damaged("holds no row")
    return found, wrong


def _named(value: Any) -> bool:
    return isinstance(value, dict)


SECTIONS = {"config": dict, "summary": dict, "history": list}
"""What a run of W&B's public API holds; each may be missing or null."""
NO_RUN = f"is no run as the others beside it: none of {', '.join(SECTIONS)}, or one of another form"


def _sections(row: Mapping[str, Any]) -> bool:
    """Whether a row is a run of W&B's public API."""
    there = {key: value for key in SECTIONS if (value := row.get(key)) is not None}
    return bool(there) and all(isinstance(value, SECTIONS[key]) for key, value in there.items())


def _api_run(path: Path, place: str, row: Cells, finished: float) -> Told:
    history = [flat(each) for each in row.get("history") or [] if isinstance(each, dict)]
    summary = last_values(history) | flat(row.get("summary") or {})
    settings = {key: value for key, value in flat(row.get("config") or {}).items() if not key.startswith("_")}
    for key in ("name", "id", "group"):
        if isinstance(row.get(key), str):
            summary.setdefault(key, row[key])
    return Told(path, "W&B", settings, summary, history, finished, place)


def _histories(path: Path, lines: Sequence[Cells], step: str, run: str | None, finished: float) -> list[Told]:
    """A run for each value of the column `run`; settings are the columns that stay the same in all its rows, words or
    numbers, W&B's own apart."""
    apart: dict[Any, list[Cells]] = {}
    for line in lines:
        name = line.get(run) if run else None
        if isinstance(name, list):
            raise Damaged(f"has a row whose {run} is a list, which names no run")
        apart.setdefault(name, []).append(line)
    found = []
    for name, history in apart.items():
        steps = [each for row in history if isinstance(each := row.get(step), int | float)]
        if len(steps) < len(history):
            raise Damaged(f"has a row whose {step} is no number")
        if any(b <= a for a, b in itertools.pairwise(steps)):
            raise Damaged(f"goes back in {step}; --map run=COLUMN tells runs apart")
        keys = [key for key in last_values(history) if not key.startswith("_") and key != step]
        constant = {
            key: history[0][key]
            for key in keys
            if len(history) > 1 and all(row.get(key) == history[0].get(key) for row in history)
        }
        found.append(Told(path, "W&B", constant, last_values(history), list(history), finished, str(name or "")))
    return found
