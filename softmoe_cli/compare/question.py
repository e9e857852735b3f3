"""What is asked of the runs: the command line's options, checked as far as no run is needed."""

import math
from dataclasses import dataclass

from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import AXES, COSTS, QUALITIES, number

SECOND = {
    "top1_pct": "nll", "top5_pct": "nll", "ece_pct": "nll", "loss": "top1_pct", "nll": "top1_pct",
    "validation_top1_pct": "validation_loss", "best_validation_top1_pct": "validation_loss",
    "validation_loss": "validation_top1_pct",
}  # fmt: skip
"""Beside a test accuracy stands NLL, which is the same loss whatever the runs were trained with."""


@dataclass(frozen=True)
class Question:
    """What is asked of the runs; the command line's options."""

    quality: str = "top1_pct"
    cost: str = "train_pflop"
    by: tuple[str, ...] = ()
    where: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    sort: str | None = None
    baseline: str | None = None
    at: tuple[str, ...] = ()
    strict: bool = False
    margin: float | None = None
    any_time: bool = False
    with_source: bool = False
    to_quality: str | None = None
    map: tuple[str, ...] = ()
    path: str | None = None
    typed: tuple[str, ...] = ()
    """The fields that somebody chose: settle.json of a study changes none of them."""

    def check(self) -> None:
        """Raises UsageError for a figure that does not exist."""
        for option, key, known in (("quality", self.quality, QUALITIES), ("cost", self.cost, COSTS)):
            if key not in known:
                raise UsageError(f"--{option} {key}: no such figure.{nearest(key, known)} Choices: {', '.join(known)}")
        if self.margin is not None and not (number(self.margin) and self.margin > 0):
            raise UsageError(f"--margin {self.margin:g}: must be a number above 0, in the unit of {self.quality}")
        if self.to_quality not in (None, "baseline") and self.target is None:
            raise UsageError(
                f"--to-quality {self.to_quality}: write baseline, or a number in the unit of {self.quality}"
            )
        for each in self.at:
            self._budgets(each)
        if self.with_source:
            self._check_source()

    def _check_source(self) -> None:
        for option, key in (("cost", self.cost), *(("at", axis) for axis, _ in self.budgets)):
            if key != "train_pflop" and COSTS[key].trained:
                raise UsageError(
                    f"--with-source counts training FLOPs, and checkpoints say nothing of {key}: leave out --{option} "
                    f"{key}, or --with-source"
                )

    def _budgets(self, text: str) -> tuple[str, list[float] | None]:
        axis, equals, values = text.partition("=")
        if axis not in AXES:
            raise UsageError(f"--at {text}: no such axis.{nearest(axis, AXES)} Choices: {', '.join(AXES)}")
        if not equals:
            return axis, None
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            numbers = []
        if not numbers or not all(math.isfinite(each) and each > 0 for each in numbers):
            raise UsageError(f"--at {text}: write {axis}=BUDGET,BUDGET with numbers above 0, or {axis} alone")
        return axis, numbers

    @property
    def second(self) -> str:
        """The measure beside the main one: a loss beside a share, a share beside a loss."""
        return SECOND[self.quality]

    @property
    def target(self) -> float | None:
        """The quality of --to-quality; None where it is the baseline's."""
        try:
            value = float(self.to_quality or "")
        except ValueError:
            return None
        return value if number(value) else None

    @property
    def axis(self) -> str:
        """What curves are drawn and compared against."""
        return self.cost if self.cost in AXES else AXES[0]

    @property
    def budgets(self) -> list[tuple[str, list[float] | None]]:
        """(axis, budgets); None: a few that every run covers."""
        return [self._budgets(text) for text in self.at or ([self.cost] if self.cost in AXES else ["train_pflop"])]

    @property
    def clocked(self) -> bool:
        return any(COSTS[key].clocked for key in (self.cost, *(axis for axis, _ in self.budgets)))
