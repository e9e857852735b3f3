"""Cost to equal quality: how much cheaper a group reaches the quality of its baseline, as pure functions of curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from softmoe_cli.compare.cuts import Draw
from softmoe_cli.compare.intervals import Difference, Interval, pairable

Curve = Sequence[tuple[float, float]]
Values = list[tuple[Draw, float]]


@dataclass(frozen=True)
class Reached:
    """The baseline's cost over the group's, each when it first reached the quality; above 1 the group is cheaper.

    `reached` of `n` seeds have done so, and `baseline_reached` of `baseline_n`. `ratio` is a geometric mean over seeds,
    None where one of them has not: then the mean is `below` or `above` a bound, or nothing is known. `cost` is the
    group's, likewise.
    """

    axis: str
    n: int
    reached: int
    baseline_n: int
    baseline_reached: int
    cost: float | None
    ratio: Interval | None
    below: float | None
    above: float | None


def first_reach(curve: Curve, target: float, *, higher_is_better: bool) -> float | None:
    """The cost at which the best so far first reaches the target, linear between looks; None where it never does."""
    sign = 1.0 if higher_is_better else -1.0
    before: tuple[float, float] | None = None
    for cost, value in curve:
        now = (cost, sign * value)
        if before is not None and now[1] <= before[1]:
            now = (cost, before[1])
        if now[1] >= sign * target:
            if before is None:
                return cost
            return before[0] + (cost - before[0]) * (sign * target - before[1]) / (now[1] - before[1])
        before = now
    return None


def reached(
    ours: Sequence[tuple[Draw, Curve]],
    theirs: Sequence[tuple[Draw, Curve]],
    target: float | None,
    axis: str,
    compare: Callable[[Values, Values], Difference],
    *,
    higher_is_better: bool,
) -> Reached | None:
    """(draw, curve) of a group and its baseline. Without a target it is the baseline's last quality: of the same seed
    where seeds are paired, and then of the shared seeds only, else the mean over its seeds. `compare` compares the
    logarithms of the costs. A seed that never reaches the target is censored: it needs more than its whole cost. None
    without curves (a look before training alone is none), or where one begins above the target, so that it cannot be
    told when it got there."""
    if not all(curve and curve[-1][0] > 0 for _, curve in (*ours, *theirs)):
        return None
    shared = pairable(ours, theirs)
    if shared is not None:
        ours, theirs = ([each for each in runs if each[0] in shared] for runs in (ours, theirs))
    if target is not None:
        targets = dict.fromkeys((seed for seed, _ in (*ours, *theirs)), target)
    elif shared is not None:
        targets = {seed: curve[-1][1] for seed, curve in theirs}
    else:
        last = math.fsum(curve[-1][1] for _, curve in theirs) / len(theirs)
        targets = dict.fromkeys((seed for seed, _ in (*ours, *theirs)), last)
    sides = []
    for runs in (ours, theirs):
        costs = [first_reach(curve, targets[seed], higher_is_better=higher_is_better) for seed, curve in runs]
        if any(cost == curve[0][0] for cost, (_, curve) in zip(costs, runs, strict=True)):
            return None
        least = [(seed, math.log(cost or curve[-1][0])) for cost, (seed, curve) in zip(costs, runs, strict=True)]
        sides.append((least, sum(cost is not None for cost in costs)))
    (mine, count), (its, baseline_count) = sides
    n, baseline_n = len(mine), len(its)
    found = compare(mine, its)
    interval = found.interval
    mean = math.exp(-interval.mean)
    ratio = below = above = None
    if count == n and baseline_count == baseline_n:
        low, high = (None if end is None else math.exp(-end) for end in (interval.high, interval.low))
        ratio = Interval(mean, low, high, interval.n)
    elif baseline_count == baseline_n:
        below = mean
    elif count == n:
        above = mean
    cost = math.exp(math.fsum(value for _, value in mine) / n) if count == n else None
    return Reached(axis, n, count, baseline_n, baseline_count, cost, ratio, below, above)
