"""How sure a comparison is: intervals, verdicts, budgets and fronts as pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL = 0.95
MIN_SEEDS = 3
"""Fewer seeds than this get no verdict: with two, the t-interval is 9 spreads wide and says nothing."""
DRAWS = 4000


@dataclass(frozen=True)
class Interval:
    """A mean over n values; `low` and `high` are None where its uncertainty cannot be told."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of a mean (Student, The probable error of a mean, 1908); needs two values."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = _student(n - 1) * _standard_error(values)
    return Interval(mean, mean - half, mean + half, n)


def _student(freedom: float) -> float:
    """Half the width of the interval of Student's t, in standard errors."""
    from scipy.special import stdtrit  # here, so that what draws intervals need not import scipy

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _standard_error(values: Sequence[float]) -> float:
    """Zero for values that differ by rounding only."""
    spread = float(np.std(np.asarray(values), ddof=1))
    return 0.0 if spread <= 1e-12 * max(map(abs, values)) else spread / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """A group's mean minus the baseline's. `p` is None where there is no test."""

    interval: Interval
    p: float | None
    method: str
    unpaired_seeds: tuple[int, ...]


def difference(ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> Difference:
    """(seed, value) pairs of a group against a baseline's.

    Paired by seed with Student's t where at least three seeds are shared or the seeds are the same; else, and where a
    seed occurs twice in a group, Welch's t with the Welch-Satterthwaite degrees of freedom (Welch, The generalization
    of "Student's" problem, 1947). Which of the two depends on the seeds only, never on the values. Without spread
    there is a mean but neither interval nor p: values on a grid, such as shares of a few hundred images, agree by
    chance too often to conclude anything from it.
    """
    a, b = dict(ours), dict(theirs)
    shared = sorted(a.keys() & b.keys())
    repeated = len(a) < len(ours) or len(b) < len(theirs)
    if not repeated and (len(shared) >= MIN_SEEDS or a.keys() == b.keys()):
        differences = [a[seed] - b[seed] for seed in shared]
        mean, n, method = math.fsum(differences) / len(shared), len(shared), "paired"
        error, freedom = (_standard_error(differences) if n > 1 else 0.0), float(n - 1)
        alone = tuple(sorted(a.keys() ^ b.keys()))
    else:
        x, y = [value for _, value in ours], [value for _, value in theirs]
        mean, n, method = math.fsum(x) / len(x) - math.fsum(y) / len(y), min(len(x), len(y)), "Welch"
        parts = [_standard_error(values) ** 2 if len(values) > 1 else 0.0 for values in (x, y)]
        error, alone = math.sqrt(sum(parts)), ()
        if n > 1 and error:
            freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (x, y), strict=True))
    if n < 2 or error == 0:
        return Difference(Interval(mean, None, None, n), None, method, alone)
    from scipy.special import stdtr

    half = _student(freedom) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    return Difference(Interval(mean, mean - half, mean + half, n), p, method, alone)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false verdict among them stays below the level
    (Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def verdicts(differences: Mapping[Any, Difference], *, higher_is_better: bool) -> dict[Any, tuple[str, float | None]]:
    """better, worse, not distinguishable or too few seeds, and Holm's p, of each of one family of comparisons."""
    tested = {key: d.p for key, d in differences.items() if d.p is not None and d.interval.n >= MIN_SEEDS}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    verdict_of: dict[Any, tuple[str, float | None]] = {}
    for key, d in differences.items():
        if d.interval.n < MIN_SEEDS:
            verdict_of[key] = ("too few seeds", None)
        elif key not in adjusted or adjusted[key] >= 1 - LEVEL:
            verdict_of[key] = ("not distinguishable", adjusted.get(key))
        else:
            verdict_of[key] = ("better" if (d.interval.mean > 0) == higher_is_better else "worse", adjusted[key])
    return verdict_of


def at_chance(values: Sequence[float], chance_pct: float, images: int | None) -> bool:
    """Whether shares of right answers, in percent, are not surely above what guessing reaches.

    They are surely above it if the 95% interval of their mean is, which takes three values; or if each value is so high
    that guessing on as many `images` reaches it with a probability of 2.5% at most (binomial). If neither test is
    possible, their mean decides.
    """
    interval = mean_interval(values)
    if interval.mean <= chance_pct:
        return True
    if images:
        from scipy.special import bdtrc

        right = np.round(images * np.asarray(values) / 100)
        if np.all(bdtrc(right - 1, images, min(1.0, chance_pct / 100)) <= (1 - LEVEL) / 2):
            return False
    if len(values) >= MIN_SEEDS and interval.low is not None and interval.low < interval.mean:
        return interval.low <= chance_pct
    return bool(images)


def at_budget(curve: Sequence[tuple[float, float]], budget: float) -> float | None:
    """The curve's value at `budget`, linear between its points; None outside them: nothing is extrapolated."""
    if not curve or not curve[0][0] <= budget <= curve[-1][0]:
        return None
    x, y = zip(*curve, strict=True)
    return float(np.interp(budget, x, y))


def budgets(curves: Sequence[Sequence[tuple[float, float]]], count: int = 3) -> list[float]:
    """Up to `count` round budgets, each twice the one before, in the range that every curve covers."""
    if not curves or not all(curves):
        return []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    if low > high or high <= 0:
        return []
    digit = 10 ** (math.floor(math.log10(high)) - 2)
    candidates = [math.floor(high / 2**i / digit + 1e-9) * digit for i in reversed(range(count))]
    return [float(f"{budget:.6g}") for budget in candidates if low <= budget <= high]


def on_front(cost: Any, quality: Any) -> Any:
    """Which points of the last axis nothing dominates; lower cost and higher quality are better.

    A point is dominated when another is at least as good in both and better in one. Equal points are therefore on the
    front together or not at all.
    """
    cost, quality = np.asarray(cost, float), np.asarray(quality, float)
    order = np.lexsort((-quality, cost), axis=-1)
    c, q = np.take_along_axis(cost, order, -1), np.take_along_axis(quality, order, -1)
    best = np.maximum.accumulate(q, axis=-1)
    before = np.concatenate([np.full_like(best[..., :1], -np.inf), best[..., :-1]], axis=-1)
    setter = np.maximum.accumulate(np.where(q > before, np.arange(q.shape[-1]), 0), axis=-1)
    kept = (q == best) & (c == np.take_along_axis(c, setter, -1))
    front = np.empty_like(kept)
    np.put_along_axis(front, order, kept, -1)
    return front


def front_probability(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[float]:
    """How often each group of (costs, qualities) is on the front when its two means are drawn anew.

    A mean is drawn from its posterior under a normal model without prior knowledge, which is Student's t about the
    sample mean with the standard error as its scale (Gelman et al., Bayesian Data Analysis, 3rd ed., 2013, section
    3.2): the distribution whose central 95% is `mean_interval`. A bootstrap of three seeds would know ten different
    means. A group of one seed stays where it is. The draws are the same for the same input.
    """
    random = np.random.default_rng(0)

    def drawn(values: Sequence[float]) -> Any:
        n, mean = len(values), math.fsum(values) / len(values)
        return mean + random.standard_t(max(n - 1, 1), DRAWS) * (_standard_error(values) if n > 1 else 0.0)

    cost, quality = (np.stack([drawn(group[i]) for group in groups], axis=-1) for i in (0, 1))
    return [float(share) for share in on_front(cost, quality).mean(axis=0)]
