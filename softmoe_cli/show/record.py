"""What a run's files say of it, finished or not; without torch and without its checkpoints."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.compose import compose
from softmoe_cli.run import rows
from softmoe_cli.run.rows import AXES, EVERY, LOOK, RESULT, ROUTING, TRAIN, Row
from softmoe_cli.run.status import State, state

MOST_POINTS = 400
"""Points of a curve that are drawn: a screen has no more columns to tell them apart."""


@dataclass(frozen=True)
class Record:
    """A run as its files tell it.

    Attributes:
        result: its row; None of a run that has not ended.
        rows: of metrics.jsonl, in their order.
        routing: of routing.jsonl.
        config: config.yaml; empty where that cannot be read.
        notes: what could not be read, a sentence each.
        receipt: of a folder that was made from a checkpoint; None of a run.
    """

    folder: Path
    state: State
    result: Row | None
    rows: list[Row]
    routing: list[Row]
    config: dict[str, Any]
    notes: list[str]
    receipt: Row | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Every value of config.yaml by its whole key."""
        return flattened(self.config)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def of(self, split: str) -> list[Row]:
        return [row for row in self.rows if row["split"] == split]


def read_record(folder: Path) -> Record:
    """Reads a run's folder.

    Raises:
        UsageError: it is none.
    """
    _require_run(folder)
    notes: list[str] = []
    result: Row | None = None
    try:
        result = rows.printed(rows.row(folder / "result.json", RESULT))
    except FileNotFoundError:
        pass
    except rows.Unreadable as error:
        notes.append(f"result.json {error}.")
    metrics = _lines(folder / "metrics.jsonl", _metric_fault, notes)
    routing = _lines(folder / "routing.jsonl", lambda row: rows.fault(row, ROUTING), notes)
    config: dict[str, Any] = {}
    try:
        said = yaml.safe_load(rows.contents(folder / "config.yaml"))
        config = said if isinstance(said, dict) else {}
    except (FileNotFoundError, rows.Unreadable, yaml.YAMLError, RecursionError):
        notes.append("config.yaml cannot be read, so that settings are not shown.")
    found = state(folder, folder.resolve().name, None)
    return Record(folder, found, result, metrics, routing, config, notes)


def _require_run(folder: Path) -> None:
    if not os.path.isdir(folder):  # which is also false for a name that is too long
        parent = folder.parent
        siblings = [each.name for each in parent.iterdir() if each.is_dir()] if os.path.isdir(parent) else []
        raise UsageError(f"run={folder} is no folder.{nearest(folder.name, siblings)}")
    if not any((folder / file).exists() for file in ("config.yaml", "metrics.jsonl", "result.json")):
        runs = sorted(file.parent for file in folder.glob("*/config.yaml"))
        if runs:
            more = f" (of {len(runs)})" if len(runs) > 1 else ""
            raise UsageError(f"run={folder} holds runs and is none; name one of them, such as {runs[0]}{more}")
        raise UsageError(f"run={folder} is no run: it has neither config.yaml nor metrics.jsonl")


def _metric_fault(row: Row) -> str:
    """What is wrong with a row of metrics.jsonl; empty where nothing is."""
    return rows.fault(row, EVERY) or rows.fault(row, TRAIN if row["split"] == "train" else LOOK)


def _lines(path: Path, fault: Callable[[Row], str], notes: list[str]) -> list[Row]:
    """The rows that can be read and have no `fault`. The last line of a run that goes on, or was killed, may be cut
    short."""
    try:
        text = rows.contents(path, rows.MOST_LINES_BYTES)
    except FileNotFoundError:
        return []
    except rows.Unreadable as error:
        notes.append(f"{path.name} {error}.")
        return []
    found, bad = [], 0
    for line in text[: text.rfind(b"\n") + 1].splitlines():
        try:
            row = rows.parsed(line)
        except rows.Unreadable:
            row = None
        if isinstance(row, dict) and not fault(row):
            found.append(rows.printed(row))
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad:,} {'line is' if bad == 1 else 'lines are'} damaged and left out.")
    return found


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value by its whole key, such as `train.steps`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def changed_settings(record: Record) -> list[tuple[str, Any, Any]]:
    """Key, value and default of each setting that is not what `softmoe train` does where nothing is typed. Values that
    only follow others, such as a model's name, stand there too."""
    usual = flattened(dataclasses.asdict(compose()))
    return [
        (key, value, usual.get(key, "not there"))
        for key, value in record.settings.items()
        if (key not in usual or usual[key] != value) and key not in ("output_root",)
    ]


def thinned_rows(found: list[Row]) -> list[Row]:
    """At most MOST_POINTS rows, spread evenly; the last is among them."""
    if len(found) <= MOST_POINTS:
        return found
    return [found[round(i * (len(found) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]


def curve(found: list[Row]) -> dict[str, list[float | None]]:
    """What a chart draws of rows: each number that some row has, and what it cost until then."""
    kept = thinned_rows(found)
    keys = dict.fromkeys(key for row in kept for key, value in row.items() if rows.number(value))
    return {key: [_short(row.get(key)) for row in kept] for key in keys if key not in ("format", "block")}


def _short(value: Any) -> float | None:
    return float(f"{value:.6g}") if rows.number(value) else None


def routing_curves(record: Record) -> dict[str, dict[str, list[float | None]]]:
    """The statistics of each layer over training, with what had been spent at each look."""
    spent = {row["step"]: {axis: row[axis] for axis in AXES} for row in record.of("validation")}
    layers: dict[str, list[Row]] = {}
    for row in record.routing:
        if row.get("step") in spent and "window" not in row:
            name = f"block {row.get('block')}" + (f", {row['beside']}" if "beside" in row else "")
            layers.setdefault(name, []).append(row | spent[row["step"]])
    return {name: curve(found) for name, found in layers.items()}


def statistics_of(curves: Mapping[str, Mapping[str, list[float | None]]]) -> list[str]:
    """The keys of these curves that say something of themselves; those that never change come last."""
    keys = dict.fromkeys(key for each in curves.values() for key in each if key not in ("step", "epoch", *AXES))
    return sorted(keys, key=lambda key: unchanged(curves, key))


def unchanged(curves: Mapping[str, Mapping[str, list[float | None]]], key: str) -> bool:
    """Whether the key has one value in each of the curves."""
    return all(len(set(each.get(key, []))) < 2 for each in curves.values())
