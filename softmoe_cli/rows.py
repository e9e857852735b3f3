"""What lies in a run's folder, as everything reads it: a file may be cut, edited by hand, or be another program's.

Each table below says of each key that is counted on what it may hold. What holds something else is named, with the
reason, and costs its own run only.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softmoe_cli.config import BUDGETS
from softmoe_cli.errors import first_line
from softmoe_cli.text import printable, shortened

Row = dict[str, Any]
MOST_BYTES = 2**24
"""Of a file that holds one row: more is none of ours, and would take the memory."""
MOST_LINES_BYTES = 2**31
"""Of a file that holds a row a line."""


class Unreadable(ValueError):
    """A file that is there and does not hold what it should; the message goes on from the file's name."""


@dataclass(frozen=True)
class Kind:
    """What a key holds, in words, and how that is told; `needed` keys are there and not null."""

    said: str
    holds: Callable[[Any], bool]
    needed: bool = False


def number(value: Any) -> bool:
    """Whether it is a number that can be squared and divided by: far from where floats end, four times over."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == 0 or 1e-50 <= abs(value) <= 1e50


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _count(value: Any) -> bool:
    return _whole(value) and value > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _path(value: Any) -> bool:
    try:
        return isinstance(value, str) and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


TEXT, WHOLE, NUMBER = Kind("text", _text), Kind("a whole number", _whole), Kind("a number", number)
NEEDED_TEXT, NEEDED_WHOLE = Kind("text", _text, needed=True), Kind("a whole number", _whole, needed=True)
NEEDED_NUMBER = Kind("a number", number, needed=True)

RESULT: dict[str, Kind] = {
    **dict.fromkeys(("signature", "name", "data"), NEEDED_TEXT),
    "seed": NEEDED_WHOLE,
    **dict.fromkeys(
        ("study", "command", "checkpoint", "backbone", "router", "moe_blocks", "precision", "hardware", "torch",
         "softmoe", "commit", "python", "checkpoint.digest", "checkpoint.origin", "data.identity", "train.loss",
         "model.router._target_"), TEXT
    ),
    **dict.fromkeys(("test_images", "classes", "data.num_classes"), WHOLE),
    **dict.fromkeys(
        ("top1_pct", "top5_pct", "loss", "nll", "ece_pct", "validation_top1_pct", "validation_loss",
         "best_validation_top1_pct", "chance_pct", "train_pflop", "device_s", "forward_gflop", "train_gflop",
         "params_m", "active_params_m", "peak_mib", "images", "epochs", "steps", "batch_size", "eval_s", "save_s",
         "compile_s", "energy_kj", "checkpoint.train_pflop"), NUMBER
    ),
}  # fmt: skip
"""result.json, for tables."""
DONE = {"validation_top1_pct": NUMBER}
"""result.json, for what a sweep is doing."""
CLOSING: dict[str, Kind] = {
    "signature": NEEDED_TEXT,
    **dict.fromkeys(("test_images", "classes", "tokens"), Kind("a whole number above 0", _count, needed=True)),
    **dict.fromkeys(("steps", "best_step", "images"), NEEDED_WHOLE),
    **dict.fromkeys(
        ("top1_pct", "top5_pct", "loss", "validation_top1_pct", "best_validation_top1_pct", "chance_pct", "epochs",
         "train_pflop", "device_s", "eval_s", "save_s", "compile_s"), NEEDED_NUMBER
    ),
    "energy_kj": NUMBER,
}  # fmt: skip
"""result.json, for the table at a run's end."""
ROUTING = {"step": NEEDED_NUMBER, "scale": NUMBER, "dispatch_max": NUMBER, "dispatch_min": NUMBER}
"""A row of routing.jsonl, for the same table."""
LOOK = dict.fromkeys(("step", "train_pflop", "device_s", "images"), NEEDED_NUMBER) | dict.fromkeys(
    ("epoch", "top1_pct", "top5_pct", "loss", "nll", "ece_pct"), NUMBER
)
"""A validation row of metrics.jsonl, for curves."""
STEP = dict.fromkeys(("step", "epoch", "images", "device_s"), NEEDED_NUMBER) | {"top1_pct": NUMBER}
"""Any row of metrics.jsonl, for how far a run is."""
JOB = {"run": NEEDED_TEXT, "folder": Kind("a path", _path, needed=True)}
"""A job in jobs.json."""
FAILURE = {"reason": NEEDED_TEXT}
"""NN.json beside a sweep's log."""


def fault(row: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str:
    """What the first key that does not keep to `kinds` holds instead; empty where all do."""
    for key, kind in kinds.items():
        value = row.get(key)
        if value is None:
            if kind.needed:
                return f"has no {key}"
        elif not kind.holds(value):
            return f"says {key} is {shortened(printable(repr(value)), 40)}, which is not {kind.said}"
    return ""


def contents(path: Path, most: int = MOST_BYTES) -> bytes:
    """Of a file.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: a folder, a pipe (which would be waited for), a file without permission or beyond `most` bytes.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise Unreadable("is no file")
        if found.st_size > most:
            raise Unreadable(f"is larger than {most / 2**20:g} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error


def parsed(text: bytes, *, finite: bool = False) -> Any:
    """JSON; with `finite` no number in it may be beyond what floats hold, which takes longer to see.

    Raises:
        Unreadable: anything else, NaN and infinity by name included.
    """
    try:
        return json.loads(text, parse_float=_finite if finite else None, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"is truncated or damaged ({error})" if text else "is empty") from error


def _finite(text: str) -> float:
    """What softmoe writes is finite: anything else is damage."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def printed(value: Any) -> Any:
    """The same with every word made printable, names of keys too."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [printed(each) for each in value]
    if isinstance(value, dict):
        return {printable(key): printed(each) for key, each in value.items()}
    return value


def row(path: Path, kinds: Mapping[str, Kind]) -> Row:
    """A file that is one JSON object with what `kinds` tells.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: it is none.
    """
    found = parsed(contents(path), finite=True)
    if not isinstance(found, dict):
        raise Unreadable("is no row of softmoe")
    wrong = fault(found, kinds)
    if wrong:
        raise Unreadable(wrong)
    return found


def lines(path: Path, kinds: Mapping[str, Kind]) -> list[Row]:
    """A file of JSON objects, one a line, each with what `kinds` tells.

    Raises:
        FileNotFoundError: there is none.
        Unreadable: one of them is none.
    """
    found = []
    for place, line in enumerate(contents(path, MOST_LINES_BYTES).splitlines(), 1):
        try:
            row = parsed(line)
        except Unreadable as error:
            raise Unreadable(f"is damaged in line {place}: it {error}") from error
        wrong = fault(row, kinds) if isinstance(row, dict) else "is no row of softmoe"
        if wrong:
            raise Unreadable(f"is damaged in line {place}: it {wrong}")
        found.append(row)
    return found


def jobs(path: Path) -> tuple[str, list[str], list[Row]]:
    """Of a sweep's jobs.json: command, words that were typed, and the jobs.

    Raises:
        FileNotFoundError, Unreadable: there is none, or it is damaged; the message says which job.
    """
    said = row(path, {"command": TEXT})
    found, typed = said.get("jobs"), said.get("typed") or []
    if not isinstance(found, list):
        raise Unreadable("has no list of jobs")
    if not isinstance(typed, list) or not all(isinstance(word, str) for word in typed):
        raise Unreadable("says typed is no list of words")
    for place, job in enumerate(found):
        wrong = fault(job, JOB) if isinstance(job, dict) else "is no row"
        if wrong:
            raise Unreadable(f"is damaged: job {place} {wrong}")
    return said.get("command") or "train", typed, found


@dataclass(frozen=True)
class Budget:
    """What a run may use: `amount` of the budget `key` (train.KEY); and the command that it belongs to."""

    key: str
    amount: float
    devices: float
    command: str


def budget(path: Path) -> Budget:
    """Of a run's config.yaml.

    Raises:
        FileNotFoundError, Unreadable: there is none, or it tells no budget.
    """
    text, loader = contents(path), getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:  # every scalar as it is written: nothing is needed of all that YAML can make of one
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # libyaml's composer ends the process at great depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise Unreadable("is no YAML (nested too deeply)")
        said = yaml.load(text, Loader=loader)
    except Unreadable:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unreadable(f"is no YAML ({first_line(error)})") from error
    train = said.get("train") if isinstance(said, dict) else None
    if not isinstance(train, dict):
        raise Unreadable("does not say what train is" if text.strip() else "is empty")
    given = [key for key in BUDGETS if train.get(key) not in NOTHING]
    if not given:
        raise Unreadable(f"has none of {', '.join(f'train.{key}' for key in BUDGETS)}")
    amount = _amount(f"train.{given[0]}", train[given[0]])
    devices = _amount("devices", said.get("devices", "1"))
    return Budget(given[0], amount, devices, "train" if said.get("checkpoint") in NOTHING else "finetune")


DEEPEST = 50
NOTHING = (None, "null", "~", "")


def _amount(key: str, value: Any) -> float:
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = 0.0
    if not number(amount) or amount <= 0:
        raise Unreadable(f"says {key} is {shortened(str(value), 40)}, which is no amount")
    return amount
