"""What a table could have seen: power of its tests, and the seeds that would settle a comparison.

Effects are in standard deviations of one paired difference. Power is that of the paired t statistic, which is
noncentral t (Johnson and Welch, Applications of the non-central t-distribution, 1940): a normal probability, mean over
quantiles of the deviation, since scipy's nctdtr is nan in its far tails. For the any-time rule it is the power of the
last look alone, so that the rule sees a little more than is said.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from softmoe_cli.compare.anytime import critical
from softmoe_cli.compare.intervals import LEVEL, MIN_SEEDS, Difference, Interval, effect_interval, tested

POWER = 0.8
MOST_SEEDS = 10_000
"""More seeds than this are not counted."""
LARGEST_EFFECT = 100.0
"""Effects beyond so many deviations are not looked for."""
SHARED = 0.25
"""How much two arms' variances are correlated: their differences share the baseline's noise, half of their variance,
so that they have a correlation of 1/2 and their variances one of its square."""


def threshold(n: int, comparisons: int, *, anytime: bool) -> float:
    """The |t| that gives n pairs a verdict at the first step of Holm over so many comparisons."""
    alpha = (1 - LEVEL) / comparisons
    if anytime:
        return float(critical(n, alpha))
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - alpha / 2))


def power(effect: float, n: int, comparisons: int = 1, *, anytime: bool = False) -> float:
    """The chance that n pairs give a verdict."""
    from scipy.special import ndtr

    needed = threshold(n, comparisons, anytime=anytime)
    if math.isinf(needed):
        return 0.0
    shift, limit = min(abs(effect), LARGEST_EFFECT) * math.sqrt(n), needed * _spreads(n)
    return float((ndtr(shift - limit) + ndtr(-shift - limit)).mean())


def _spreads(n: int) -> np.ndarray[Any, Any]:
    """400 quantiles of the deviation that n pairs show, over the true one."""
    from scipy.special import chdtri

    return np.sqrt(chdtri(n - 1, (np.arange(400) + 0.5) / 400) / (n - 1))


def power_of_equality(margin: float, n: int, comparisons: int = 1, *, anytime: bool = False) -> float:
    """The chance that n pairs of arms without any difference get the verdict *equal within the margin*: a normal
    probability, mean over quantiles of the deviation."""
    from scipy.special import ndtr, stdtrit

    alpha = (1 - LEVEL) / comparisons
    needed = float(critical(n, alpha)) if anytime else float(stdtrit(n - 1, 1 - alpha))
    if math.isinf(needed):
        return 0.0
    return float(np.maximum(0, 2 * ndtr(margin * math.sqrt(n) - needed * _spreads(n)) - 1).mean())


def visible_effect(n: int, comparisons: int = 1, *, anytime: bool = False) -> float | None:
    """The smallest effect that n pairs see with POWER; None where there is none."""
    if n < MIN_SEEDS or power(LARGEST_EFFECT, n, comparisons, anytime=anytime) < POWER:
        return None
    low, high = 0.0, LARGEST_EFFECT
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, n, comparisons, anytime=anytime) < POWER else (low, middle)
    return high


def seeds_to_see(effect: float, comparisons: int = 1, *, anytime: bool = False) -> int | None:
    """The fewest pairs that see an effect with POWER; None beyond MOST_SEEDS."""
    return _fewest(lambda n: power(effect, n, comparisons, anytime=anytime))


def seeds_to_equal(margin: float, comparisons: int = 1, *, anytime: bool = False) -> int | None:
    """The fewest pairs that find equal arms equal within a margin with POWER; None beyond MOST_SEEDS."""
    return _fewest(lambda n: power_of_equality(margin, n, comparisons, anytime=anytime))


def _fewest(chance: Callable[[int], float]) -> int | None:
    """By bisection, as the chance grows with n."""
    low, high = MIN_SEEDS - 1, MIN_SEEDS
    while chance(high) < POWER:
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if chance(middle) < POWER else (low, middle)
    return high


def pooled(deviations: Sequence[tuple[float, float]]) -> Interval:
    """The root mean square of the deviations of several arms' differences from one baseline, with its 95% interval
    from the chi-square distribution. Each is given with its degrees of freedom, by which it is weighted; arms count for
    fewer than their sum, because they share the baseline."""
    from scipy.special import chdtri

    freedom = math.fsum(each for _, each in deviations)
    value = math.sqrt(math.fsum(each * deviation**2 for deviation, each in deviations) / freedom)
    effective = freedom / (1 + (len(deviations) - 1) * SHARED)
    low, high = (value * math.sqrt(effective / chdtri(effective, tail)) for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value, low, high, len(deviations))


@dataclass(frozen=True)
class Needed:
    """Seeds that would see the difference that was found: as many at its estimate, and at the ends of its 95% interval;
    None for `most` where the interval holds 0, and for each beyond MOST_SEEDS."""

    seeds: int | None
    fewest: int | None
    most: int | None


@dataclass(frozen=True)
class Outlook:
    """What a table could have seen, in the unit of its quality.

    With `n` seeds, the fewest of its comparisons, it sees `sees`, and with `later_n` `later_sees`, with POWER at the
    first step of Holm over `comparisons`; None where nothing could be seen. `deviation` is that of one seed's
    difference. `equal_n` seeds would find equal groups equal within the margin. `needed`, by label, for the groups
    without a verdict. Where the `unit` is `cut`, all of this is of cuts with as many seeds as there are now.
    """

    n: int
    comparisons: int
    anytime: bool
    deviation: Interval
    sees: float | None
    later_n: int
    later_sees: float | None
    equal_n: int | None
    needed: dict[str, Needed]
    unit: str = "seed"


LATER = (10, 20, 50, 100, 200, 500, 1000)
"""Round numbers of seeds; the first that is twice what there is, is told."""


def outlook(
    found: Mapping[str, Difference], undecided: Iterable[str], margin: float | None, family: int = 0
) -> Outlook | None:
    """Of the comparisons of a table, by label, that are paired by seed; None where no deviation is known. Holm's
    correction counts the others too, and at least `family` comparisons."""
    paired = {label: d for label, d in found.items() if d.method != "Welch" and d.deviation and d.freedom}
    if not paired:
        return None
    anytime = any(d.method == "any-time" for d in paired.values())
    n = min(d.interval.n for d in paired.values())
    comparisons = max(family, len(tested(found)) or len(paired))
    deviation = pooled([(d.deviation or 0.0, d.freedom or 0.0) for d in paired.values()])
    later = next((each for each in LATER if each >= 2 * n), 2 * n)
    sees, later_sees = (visible_effect(each, comparisons, anytime=anytime) for each in (n, later))
    return Outlook(
        n, comparisons, anytime, deviation,
        None if sees is None else sees * deviation.mean,
        later, None if later_sees is None else later_sees * deviation.mean,
        None if margin is None else seeds_to_equal(margin / deviation.mean, comparisons, anytime=anytime),
        {label: _needed(paired[label], comparisons, anytime) for label in undecided if label in paired},
        "cut" if any(d.unit == "cut" for d in paired.values()) else "seed",
    )  # fmt: skip


def _needed(found: Difference, comparisons: int, anytime: bool) -> Needed:
    effect = effect_interval(found)
    assert effect is not None
    seeds = seeds_to_see(effect.mean, comparisons, anytime=anytime)
    if effect.low is None or effect.high is None:
        return Needed(seeds, None, None)
    near, far = sorted(abs(end) for end in (effect.low, effect.high))
    crosses = effect.low < 0 < effect.high
    fewest = seeds_to_see(far, comparisons, anytime=anytime)
    return Needed(seeds, fewest, None if crosses else seeds_to_see(near, comparisons, anytime=anytime))
