"""The options of `softmoe settle`, and those of them that `softmoe train -m` has as well."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from softmoe_cli.config.commands import FREE_KEYS
from softmoe_cli.config.option import Section, option
from softmoe_cli.errors import UsageError

EQUALLED = ("train_pflop", "forward_gflop", "latency_ms", "params_m")


@dataclass
class Fairness(Section):
    """What makes the arms of a sweep comparable before they start."""

    path: ClassVar[str] = ""
    baseline: str | None = option(
        "the arm that others are measured against, by its name or one of its words; null: the first without "
        "adapters and, if there is one, without experts"
    )
    equal: str | None = option("make every arm cost what the baseline does, before it starts", choices=EQUALLED)
    free: str | None = option(
        "equal: the setting that is solved for; null: train.steps for training FLOPs, slots of a router that has them "
        "for what the layers compute, else experts",
        choices=FREE_KEYS,
    )
    tolerance: float = option("equal: largest difference, as a share of the baseline's cost", above=0, high=1)
    tune: str | None = option("the setting that is tuned for each arm, on validation images, before its first seed")
    tune_values: list[Any] = option("tune: the values that are tried, the same for every arm")
    tune_trials: int | None = option(
        "tune, instead of tune_values: how many values are tried for each arm; Optuna chooses them", low=2, high=1000
    )
    tune_range: list[float] = option("tune_trials: the smallest and the largest value, [LOW,HIGH]", above=0)
    tune_seeds: int = option("tune: seeds of each value; none of them is used again", low=1, high=1000)

    def check(self) -> None:
        if self.equal is None and self.free is not None:
            raise UsageError(f"free={self.free} has no effect without equal=")
        if self.free == "train.steps" and self.equal != "train_pflop":
            raise UsageError(f"free=train.steps changes no {self.equal}; use equal=train_pflop")
        self._check_tuning()

    def _check_tuning(self) -> None:
        ways = [bool(self.tune_values), self.tune_trials is not None or bool(self.tune_range)]
        if sum(ways) != (self.tune is not None):
            raise UsageError(
                "tune=KEY goes together with tune_values=[VALUE,VALUE], or with tune_trials=N tune_range=[LOW,HIGH]"
            )
        if self.tune_values and len({str(value) for value in self.tune_values}) < max(2, len(self.tune_values)):
            raise UsageError(f"tune_values={self.tune_values}: give two values or more, each once")
        if (self.tune_trials is None) != (not self.tune_range):
            raise UsageError("tune_trials=N and tune_range=[LOW,HIGH] go together")
        if self.tune_range and (len(self.tune_range) != 2 or self.tune_range[0] >= self.tune_range[1]):
            raise UsageError(f"tune_range={self.tune_range}: give the smallest and the largest value, [LOW,HIGH]")

    @property
    def trials(self) -> int:
        """How many values of the tuned setting each arm tries."""
        return self.tune_trials or len(self.tune_values)


FAIR_KEYS = tuple(each.name for each in fields(Fairness))


@dataclass
class SettleConfig(Fairness):
    """What `softmoe settle` takes beside the words of `softmoe train`, or with a checkpoint of `softmoe finetune`."""

    margin: float | None = option("a difference, in the unit of the quality, below which arms are equal", above=0)
    quality: str = option("the main measure, which verdicts are about, as in softmoe compare --quality")
    max_seeds: int = option("the most seeds of an arm", low=2, high=1000)
    hours: float | None = option("most hours of training and evaluation, of all runs together", above=0)
    pflop: float | None = option("most training PFLOP, of all runs together", above=0)
    format: str = option("what is printed at the end", choices=("table", "json"))
