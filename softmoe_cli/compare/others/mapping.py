"""What another program's names mean in our words: `--map KEY=NAME`, and what the end of a path says: `--path`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli.compare.others.told import Cells, Told, typed_value
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import COSTS, QUALITIES, number
from softmoe_cli.text import printable

OWN_WORDS = {
    "seed": "seed",
    "cut": "data.split_seed",
    "data": "data",
    "test_images": "test_images",
    "classes": "classes",
}
"""Beside qualities and costs: word of --map -> key of a result."""
READING = ("run", "step")
"""Words of --map that say how a history is read."""


EVAL = {"top1_pct": "eval_top1", "top5_pct": "eval_top5"}
"""What timm's train.py calls them, in its own files and on W&B."""


@dataclass(frozen=True)
class Named:
    """A column, by what its numbers are multiplied with; None where that was not said."""

    column: str
    factor: float | None = None


def mapping(typed: Iterable[str], quality: str, cost: str) -> dict[str, Named]:
    """`--map` as key of a result -> column. `quality` and `cost` stand for what the table is of.

    Raises:
        UsageError: no such key, no column, or a key twice.
    """
    found: dict[str, Named] = {}
    keys = {**dict.fromkeys([*QUALITIES, *COSTS]), **dict.fromkeys(OWN_WORDS), **dict.fromkeys(READING)}
    for part in (each for text in typed for each in text.split(",")):
        key, equals, column = part.partition("=")
        if not equals or not column:
            raise UsageError(f"--map {part}: write KEY=COLUMN or KEY=COLUMN*FACTOR")
        key = {"quality": quality, "cost": cost}.get(key, key)
        if key not in keys:
            words, figures = ", ".join([*OWN_WORDS, *READING]), ", ".join([*QUALITIES, *COSTS])
            near = nearest(key, ["quality", "cost", *keys])
            raise UsageError(
                f"--map {part}: no such key.{near} Choices: quality, cost, {words}, or a figure: {figures}"
            )
        if OWN_WORDS.get(key, key) in found:
            raise UsageError(f"--map says twice what {key} is")
        name, star, factor = column.rpartition("*")
        value = typed_value(factor) if star and name else None
        if isinstance(value, int | float) and number(value) and value != 0:
            found[OWN_WORDS.get(key, key)] = Named(name, float(value))
        else:
            found[OWN_WORDS.get(key, key)] = Named(column)
    return found


def path_pattern(text: str | None) -> re.Pattern | None:
    """`{model}/seed{seed}` as an expression that the end of a path fits, ending of a file apart.

    Raises:
        UsageError: no name in braces, one twice, or two with nothing between them.
    """
    if text is None:
        return None
    pieces = re.split(r"\{(\w+)\}", text)
    names = pieces[1::2]
    if not names or len(set(names)) < len(names) or "" in pieces[2:-1:2] or re.search(r"[{}]", "".join(pieces[::2])):
        raise UsageError(f"--path {text}: write a pattern such as {{model}}/seed{{seed}}, each name once")
    parts = [f"(?P<{piece}>[^/]+?)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces)]
    return re.compile(f"(?:^|/){''.join(parts)}$")


def from_path(place: Path, pattern: re.Pattern | None) -> Cells:
    """What the end of a path says; nothing where it does not fit."""
    if pattern is None:
        return {}
    whole = str(place.absolute())
    if not place.is_dir():
        whole = whole.removesuffix(place.suffix)
    fits = pattern.search(whole)
    return {key: typed_value(value) for key, value in fits.groupdict().items()} if fits else {}


def column_of(key: str, told: Told, named: Mapping[str, Named]) -> Named | None:
    """The column that a key is in: as mapped, else as the program calls it, else one of the key's own name or of those
    which our own mirror on W&B and timm give it. A column called loss may be of any images, and stands for nothing."""
    if key in named:
        return named[key]
    if key in told.names:
        return Named(told.names[key])
    own = [f"result/{key}", *([] if key == "loss" else [key]), *([EVAL[key]] if key in EVAL else [])]
    return next((Named(name) for name in own if name in told.summary or name in told.settings), None)


def scaled_value(value: Any, column: Named) -> Any:
    return value * (column.factor or 1.0) if number(value) else value


def require_percents(key: str, parts: Mapping[tuple[str, str, str], Sequence[float]]) -> None:
    """Raises UsageError where shares stand for percents. `parts`: (program, place, column) -> its values, which are
    in one unit, whatever those of other places are in."""
    shares = {part: values for part, values in parts.items() if 0 < max(values) <= 1}
    if not shares:
        return
    (_, place, column), values = min(shares.items())
    others = [part for part in parts if max(parts[part]) > 1]
    if others:
        raise UsageError(
            f"{key} of {printable(place)}: all {len(values)} values are at most 1, as shares are, and elsewhere, as in "
            f"{printable(others[0][1])}, they are above: write both in percent, or say --map {key}={column}*1 if they "
            "are percents"
        )
    count = sum(map(len, shares.values()))
    raise UsageError(
        f"{key} of runs that this project did not make: all {count} values are at most 1, as shares are, and {key} is "
        f"in percent; say --map {key}={column}*100, or *1 if they are percents"
    )
