"""What tuning found, as pure functions of its runs: the best value for each arm, where it lies, and what it changed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from softmoe_cli.compare.intervals import Interval, mean_interval
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.run.rows import QUALITIES, number
from softmoe_cli.settle.spent import Spent

TUNING_SEED = 1_000_000_000
"""The first seed of tuning: no verdict ever rests on seeds from here on."""
TIE_BREAK = "validation_loss"
"""Shares of few validation images are often equal; the loss then decides."""


def chosen_by(quality: str) -> str:
    """The quality on validation images that values are chosen by: the main measure's own kind, or the loss."""
    return "validation_top1_pct" if QUALITIES[quality].curve == "top1_pct" else "validation_loss"


@dataclass(frozen=True)
class Tried:
    """The runs of one value for one arm; `failed` of them have no result."""

    value: Any
    runs: list[FinishedRun]
    failed: int = 0

    def mean(self, key: str) -> Interval | None:
        """The mean quality; None where a run failed: a value that fails with a seed is none to choose."""
        return None if self.failed or not self.runs else mean_interval([run.row[key] for run in self.runs])


@dataclass(frozen=True)
class Tuned:
    """All trials of one arm, in the order of the list or the search. `default` is the value that the arm has without
    tuning."""

    arm: str
    trials: list[Tried]
    default: Any
    by: str
    spent: Spent = field(default_factory=Spent)
    given: str | None = None
    """The value, as text, that the arm was given under a command before: fixed, whatever trials have come since."""
    searched: bool = False
    """Whether the values were found one after the other in a range, for each arm its own."""

    @property
    def best(self) -> Tried | None:
        """The trial of the value that was given; else that of the best mean, of equal ones that of the smaller loss,
        then the first. None where all failed."""
        if self.given is not None:
            return next(trial for trial in self.trials if str(trial.value) == self.given)
        sign = -1 if QUALITIES[self.by].better == "higher" else 1

        def place(trial: Tried) -> tuple[float, float]:
            mean, loss = trial.mean(self.by), trial.mean(TIE_BREAK)
            assert mean is not None and loss is not None
            return sign * mean.mean, loss.mean

        return min((trial for trial in self.trials if trial.mean(self.by)), key=place, default=None)

    @property
    def at_end(self) -> str:
        """`smallest` or `largest`, where the best value of a list of numbers is that: a longer list may have a better
        one. Empty elsewhere."""
        values = [trial.value for trial in self.trials]
        if self.best is None or not all(map(number, values)):
            return ""
        return {min(values): "smallest", max(values): "largest"}.get(self.best.value, "")

    def at(self, value: Any) -> Interval | None:
        return next((trial.mean(self.by) for trial in self.trials if trial.value == value), None)


def order(quality: Mapping[str, float], by: str) -> list[str]:
    """The arms, the best first; equal ones as they were typed."""
    sign = -1 if QUALITIES[by].better == "higher" else 1
    return sorted(quality, key=lambda arm: sign * quality[arm])


def changed_order(tuned: Sequence[Tuned]) -> tuple[list[str], list[str]] | None:
    """The order of the arms by their means with their defaults, and with their best values; None where some arm's
    default is not among the values, or failed."""
    default = {each.arm: each.at(each.default) for each in tuned}
    best = {each.arm: each.best.mean(each.by) for each in tuned if each.best}
    if len(best) < len(tuned) or not all([*default.values(), *best.values()]):
        return None
    by = tuned[0].by
    before, after = (order({arm: mean.mean for arm, mean in means.items() if mean}, by) for means in (default, best))
    return before, after
