"""A run of another program as its files tell it, before anything in it is taken for a quality, a cost or a seed."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softmoe_cli.run import rows
from softmoe_cli.text import printable, shortened

Cells = dict[str, Any]
EVENTS, WANDB_FILE, SUMMARY = ".tfevents.", ".wandb", "summary.csv"
"""What TensorBoard's files have in their names, W&B's at their ends, and what timm's is called."""
MOST_OTHERS_BYTES = 2**28
"""The largest file of another program that is read."""
MOST_VALUES = 50_000
"""The most values of one row or configuration."""
LONGEST_WORD = 200
"""The most characters that a setting keeps."""


class Damaged(ValueError):
    """A file that does not hold a whole run; the message goes on from the file's name."""


@dataclass
class Told:
    """One run, by the names that its program uses.

    Attributes:
        place: its folder or file.
        program: which program wrote it.
        settings: what was chosen.
        summary: what came out in the end.
        history: what came out on the way, in order.
        finished: when its files were written, in seconds since 1970.
        part: which run of a file that holds several; empty where it holds one.
        names: what this program calls our keys, where they are not mapped otherwise.
    """

    place: Path
    program: str
    settings: Cells = field(default_factory=dict)
    summary: Cells = field(default_factory=dict)
    history: list[Cells] = field(default_factory=list)
    finished: float = 0.0
    part: str = ""
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return printable(f"{self.place}{f', {self.part}' if self.part else ''}")


def others_bytes(path: Path, what: str = "") -> bytes:
    """The bytes of a file; `what` stands in messages before them.

    Raises:
        Damaged: there is none, as where a link leads nowhere, or it cannot be read.
    """
    try:
        return rows.contents(path, MOST_OTHERS_BYTES)
    except FileNotFoundError as error:
        raise Damaged(f"{what}is a link that leads nowhere" if path.is_symlink() else f"{what}is gone") from error
    except rows.Unreadable as error:
        raise Damaged(f"{what}{error}") from error


WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
ANY_NUMBER = re.compile(r"[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE)
"""Python itself takes more for a number, such as 1_2, which is a name."""


def by_others(names: Iterable[str]) -> bool:
    """Whether a folder with files of these names holds what another program wrote of a run."""
    return any(EVENTS in name or name.endswith(WANDB_FILE) or name == SUMMARY for name in names)


def typed_value(text: str | None) -> Any:
    """A cell of a table as what it says: a number, true or false, nothing, or words."""
    if text is None or not (text := text.strip()):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if WHOLE_NUMBER.fullmatch(text) and len(text) < 1000:  # Python refuses to read longer ones
        return int(text)
    if ANY_NUMBER.fullmatch(text):
        return float(text)
    return shortened(printable(text), LONGEST_WORD)


def flat(tree: Any, prefix: str = "") -> Cells:
    """Nested mappings as `a.b`; of what they hold numbers, words and short lists of these stay.

    Raises:
        Damaged: more values than anybody types, as YAML's references can make them.
    """
    found: Cells = {}
    todo: list[tuple[str, Any]] = [(prefix, tree)]
    while todo:
        if len(found) + len(todo) > MOST_VALUES:
            raise Damaged(f"holds more than {MOST_VALUES:,} values")
        name, value = todo.pop()
        if isinstance(value, Mapping):
            todo += [(f"{name}.{key}" if name else str(key), each) for key, each in value.items()]
        elif name and (said := _plain(value)) is not None:
            found[printable(name)] = said
    return dict(sorted(found.items()))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return shortened(printable(value), LONGEST_WORD)
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list) and len(value) <= 20 and all(isinstance(each, str | int | float) for each in value):
        return [_plain(each) for each in value]
    return None


def last_values(lines: Iterable[Cells]) -> Cells:
    """The last number of each column."""
    return {key: value for line in lines for key, value in line.items() if value is not None}


def parsed_json(text: str | bytes, what: str) -> Any:
    """JSON; NaN and infinity, which Python and W&B write, are read and later taken for no number.

    Raises:
        Damaged: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{what} is truncated or damaged ({error})" if text else f"{what} is empty") from error
