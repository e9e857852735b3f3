"""How many seeds a settling may be expected to take, simulated by the rule that decides it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softmoe_cli.compare.anytime import p_equal, p_zero
from softmoe_cli.compare.intervals import LEVEL

SIMULATED = 4000
"""Simulated studies behind each row: shares are right to 0.8 points (one standard error), seeds to a tenth."""
EFFECTS = (0.5, 1.0, 2.0)
"""Differences, and margins, in standard deviations of one seed's difference."""


@dataclass(frozen=True)
class Expected:
    """What becomes of one arm whose true difference is `effect` deviations: the shares of studies that end with a
    difference and with equality, and the mean number of seeds at the end."""

    effect: float
    margin: float | None
    different: float
    equal: float
    seeds: float

    @property
    def open(self) -> float:
        return 1 - self.different - self.equal


def expected(
    effect: float, comparisons: int, least: int, most: int, margin: float | None = None, studies: int = SIMULATED
) -> Expected:
    """Looks at every number of seeds from `least` to `most`, at the first step of Holm over the comparisons, of normal
    differences with a deviation of 1; `margin` in the same unit. The draws are the same for the same question."""
    random = np.random.default_rng(0)
    differences = effect + random.standard_normal((studies, most))
    alpha = (1 - LEVEL) / comparisons
    looked = slice(least - 2, None)
    different = p_zero(differences)[:, looked] < alpha
    equal = np.zeros_like(different) if margin is None else p_equal(differences, margin)[:, looked] < alpha
    ended = different | equal
    decided, first = ended.any(1), ended.argmax(1)
    at_end = different[np.arange(studies), first] & decided
    seeds = np.where(decided, first + least, most)
    return Expected(effect, margin, float(at_end.mean()), float((decided & ~at_end).mean()), float(seeds.mean()))


def expectations(comparisons: int, least: int, most: int, margins: Sequence[float]) -> list[Expected]:
    """Each of EFFECTS without a margin; then, for each margin, arms without a difference."""
    found = [expected(effect, comparisons, least, most) for effect in EFFECTS]
    return found + [expected(0.0, comparisons, least, most, margin) for margin in margins]
