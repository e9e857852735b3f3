"""What runs have cost so far, finished or not, from their folders alone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli.compare.runs import FinishedRun, unfinished
from softmoe_cli.config.settle import Fairness, SettleConfig

CLOCKS = ("device_s", "eval_s", "save_s", "compile_s")


@dataclass(frozen=True)
class Spent:
    """Seconds of training, evaluation, saving and compilation, and PFLOP of training."""

    seconds: float = 0.0
    pflop: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(self.seconds + other.seconds, self.pflop + other.pflop)

    def times(self, number: float) -> "Spent":
        return Spent(self.seconds * number, self.pflop * number)


def spent_by(row: dict[str, Any]) -> Spent:
    """By one run, as its result or its last row says."""
    return Spent(math.fsum(row.get(key) or 0.0 for key in CLOCKS), row.get("train_pflop") or 0.0)


def passed(asked: Fairness, spent: Spent) -> str:
    """Which budget that would pass, as it was typed; empty for none."""
    if not isinstance(asked, SettleConfig):
        return ""
    if asked.hours is not None and spent.seconds > 3600 * asked.hours:
        return f"hours={asked.hours:g}"
    return f"pflop={asked.pflop:g}" if asked.pflop is not None and spent.pflop > asked.pflop else ""


def total(parts: Iterable[Spent]) -> Spent:
    return sum(parts, Spent())


def spent_in(finished: Sequence[FinishedRun], folders: Sequence[Path]) -> Spent:
    """By finished runs, and by those of the folders that have begun and are not finished."""
    begun = unfinished([folder for folder in folders if folder.is_dir()])
    return total([*(spent_by(run.row) for run in finished), *(spent_by(row) for row in begun)])
