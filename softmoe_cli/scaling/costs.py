"""What a size costs between the sizes that were run: training from the runs' ledger, serving from it or from the clock.

Costs are interpolated, not modelled: for each number of experts a line through the measured sizes, both logarithmic,
and a line between numbers of experts. Beyond the ends the last segment goes on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import Row, Unreadable, contents, number, parsed
from softmoe_cli.scaling.laws import Number


@dataclass(frozen=True)
class Surface:
    """A cost at any size and number of experts. `lines`: experts -> logarithms of sizes (rising) and of costs."""

    lines: Mapping[float, tuple[np.ndarray, np.ndarray]]

    def __call__(self, size: Number, experts: float) -> Number:
        known = sorted(self.lines)
        at = np.log(size)
        if experts in self.lines or len(known) == 1:
            return np.exp(self._line(experts if experts in self.lines else known[0], at))
        above = min(max(int(np.searchsorted(known, experts)), 1), len(known) - 1)
        low, high = known[above - 1], known[above]
        share = (np.log(experts) - np.log(low)) / (np.log(high) - np.log(low))
        return np.exp((1 - share) * self._line(low, at) + share * self._line(high, at))

    def _line(self, experts: float, at: Number) -> Number:
        x, y = self.lines[experts]
        if len(x) == 1:
            return y[0] + self._slope() * (at - x[0])
        here = np.clip(np.searchsorted(x, at), 1, len(x) - 1)
        slope = (y[here] - y[here - 1]) / (x[here] - x[here - 1])
        return y[here - 1] + slope * (at - x[here - 1])

    def _slope(self) -> float:
        """For a number of experts of one size only: the mean slope of the others, else proportional."""
        slopes = [(y[-1] - y[0]) / (x[-1] - x[0]) for x, y in self.lines.values() if len(x) > 1]
        return float(np.mean(slopes)) if slopes else 1.0


def surface(size: np.ndarray, experts: np.ndarray, cost: np.ndarray) -> Surface:
    """Through the mean cost at each size and number of experts."""
    lines = {}
    for e in np.unique(experts):
        mine = experts == e
        sizes = np.unique(size[mine])
        lines[float(e)] = (
            np.log(sizes),
            np.array([np.log(cost[mine & (size == each)]).mean() for each in sizes]),
        )
    return Surface(lines)


SAME_MODEL = ("params_m", "forward_gflop")
"""A row of softmoe cost is of a run's model where both agree: they come from the same formulas."""


def clock_rows(path: Path, batch: int | None) -> tuple[list[Row], str]:
    """The measured rows of a file of `softmoe cost clock=true format=json`, of one batch size; and the machine.

    Raises:
        UsageError: the file cannot be read, measured nothing, or holds several batch sizes or machines.
    """
    try:
        told: Any = parsed(contents(path), finite=True)
    except FileNotFoundError:
        raise UsageError(f"--costs {path}: there is no such file") from None
    except Unreadable as error:
        raise UsageError(f"--costs {path} {error}") from error
    rows = told if isinstance(told, list) else [told]
    if not all(isinstance(row, dict) and set(SAME_MODEL) <= row.keys() for row in rows):
        raise UsageError(f"--costs {path} is not what softmoe cost format=json prints")
    rows = [row for row in rows if number(row.get("latency_ms")) and row["latency_ms"] > 0]
    if not rows:
        raise UsageError(f"--costs {path} measured nothing; make it with softmoe cost -m ... clock=true format=json")
    sizes = sorted({row["batch_size"] for row in rows})
    if batch is None and len(sizes) > 1:
        raise UsageError(f"--costs {path} has batches of {', '.join(map(str, sizes))}; choose one with --batch")
    rows = [row for row in rows if batch is None or row["batch_size"] == batch]
    if not rows:
        raise UsageError(f"--batch {batch}: --costs {path} has batches of {', '.join(map(str, sizes))} only")
    machines = sorted({str(row["hardware"]) for row in rows})
    if len(machines) > 1:
        raise UsageError(f"--costs {path} was measured on {' and on '.join(machines)}; give a file of one machine")
    return rows, f"batches of {rows[0]['batch_size']} on {machines[0]}"


def matched(rows: Sequence[Row], results: Sequence[Row]) -> tuple[list[tuple[int, Row]], int]:
    """(index of a result, its model's row of softmoe cost) for each result that has one, and how many rows fit none."""
    by_model: dict[tuple[float, ...], Row] = {tuple(row[key] for key in SAME_MODEL): row for row in rows}
    found, used = [], set()
    for index, result in enumerate(results):
        key = tuple(result[each] for each in SAME_MODEL)
        if key in by_model:
            found.append((index, by_model[key]))
            used.add(json.dumps(key))
    return found, len(by_model) - len(used)
