"""The options of `softmoe settle`, and those of them that `softmoe train -m` has as well."""

from dataclasses import dataclass
from typing import ClassVar

from softmoe_cli.config.option import Section, option


@dataclass
class SettleConfig(Section):
    """What `softmoe settle` takes beside the words of `softmoe train`."""

    path: ClassVar[str] = ""
    margin: float | None = option("a difference, in the unit of the quality, below which arms are equal", above=0)
    quality: str = option("the main measure, which verdicts are about, as in softmoe compare --quality")
    baseline: str | None = option(
        "the arm that others are measured against, by its name or one of its words; null: the first dense arm, else "
        "the first arm"
    )
    max_seeds: int = option("the most seeds of an arm", low=2, high=100_000)
    hours: float | None = option("most hours of training and evaluation, of all runs together", above=0)
    pflop: float | None = option("most training PFLOP, of all runs together", above=0)
    format: str = option("what is printed at the end", choices=("table", "json"))
