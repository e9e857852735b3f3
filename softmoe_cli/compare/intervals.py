"""How sure a comparison is: intervals, verdicts, budgets and fronts as pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from softmoe_cli.compare.anytime import NO_SPREAD, look

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


def mean_of(values: Sequence[float]) -> float:
    """The mean. Of equal values it is that value: the sum's rounding would make equal costs of three and of five seeds
    differ in the last digit, and one of them the cheaper."""
    return min(max(values), max(min(values), math.fsum(values) / len(values)))


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of a mean (Student, The probable error of a mean, 1908); needs two values."""
    n, mean = len(values), mean_of(values)
    if n < 2:
        return Interval(mean, None, None, n)
    half = _student(n - 1) * _standard_error(values)
    return Interval(mean, mean - half, mean + half, n)


def _student(freedom: float) -> float:
    """Half the width of the interval of Student's t, in standard errors."""
    from scipy.special import stdtrit  # here, so that what draws intervals need not import scipy

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _standard_error(values: Sequence[float], sizes: Sequence[float] = ()) -> float:
    """Zero for values that differ by rounding only: of numbers of these `sizes`, where the values are differences."""
    spread = float(np.std(np.asarray(values), ddof=1))
    return 0.0 if spread <= NO_SPREAD * max(*sizes, *map(abs, values)) else spread / math.sqrt(len(values))


def _paired(a: Mapping[Any, float], b: Mapping[Any, float], seeds: Sequence[Any]) -> tuple[list[float], list[float]]:
    """The differences of these seeds, and for each the larger size of its two values."""
    return [a[seed] - b[seed] for seed in seeds], [max(abs(a[seed]), abs(b[seed])) for seed in seeds]


@dataclass(frozen=True)
class Difference:
    """A group's mean minus the baseline's. `p` of no difference and `p_equal` of a difference of the margin or more are
    None where there is no test; `sign` is the direction that a verdict would have.

    `method` is the rule: `paired` or `Welch` for as many seeds as were meant from the start, `any-time` for any number.
    `deviation` is that of one seed's difference, `error` that of their mean, with `freedom` degrees. Where the `unit`
    is `cut`, a cut of the data with the mean of its seeds stands for a seed everywhere here.
    """

    interval: Interval
    p: float | None
    method: str
    unpaired_seeds: tuple[int, ...]
    sign: float = 0.0
    p_equal: float | None = None
    deviation: float | None = None
    error: float | None = None
    freedom: float | None = None
    unit: str = "seed"


def difference(
    ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]], margin: float | None = None
) -> Difference:
    """(seed, value) pairs of a group against a baseline's.

    Paired by seed with Student's t where at least three seeds are shared or the seeds are the same; else, and where a
    seed occurs twice in a group, Welch's t with the Welch-Satterthwaite degrees of freedom (Welch, The generalization
    of "Student's" problem, 1947). Which of the two depends on the seeds only, never on the values. Without spread
    there is a mean but neither interval nor p: values on a grid, such as shares of a few hundred images, agree by
    chance too often to conclude anything from it. Equality is two one-sided tests (Schuirmann, A comparison of the two
    one-sided tests procedure, 1987).
    """
    a, b = dict(ours), dict(theirs)
    shared = pairable(ours, theirs)
    if shared is not None:
        differences, sizes = _paired(a, b, shared)
        mean, n, method = mean_of(differences), len(shared), "paired"
        error, freedom = (_standard_error(differences, sizes) if n > 1 else 0.0), float(n - 1)
        deviation = error * math.sqrt(n)
        alone = tuple(sorted(a.keys() ^ b.keys()))
    else:
        x, y = [value for _, value in ours], [value for _, value in theirs]
        mean, n, method = mean_of(x) - mean_of(y), min(len(x), len(y)), "Welch"
        parts = [_standard_error(values) ** 2 if len(values) > 1 else 0.0 for values in (x, y)]
        error, alone = math.sqrt(sum(parts)), ()
        deviation = math.sqrt(sum(part * len(v) for part, v in zip(parts, (x, y), strict=True)))
        if n > 1 and error:
            freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (x, y), strict=True))
    if n < 2 or error == 0:
        return Difference(Interval(mean, None, None, n), None, method, alone)
    from scipy.special import stdtr

    half = _student(freedom) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error))
    equal = None if margin is None else float(stdtr(freedom, (abs(mean) - margin) / error))
    interval = Interval(mean, mean - half, mean + half, n)
    return Difference(interval, p, method, alone, math.copysign(1, mean), equal, deviation, error, freedom)


def pairable(ours: Sequence[tuple[Any, Any]], theirs: Sequence[tuple[Any, Any]]) -> list[Any] | None:
    """The seeds that both have, where the fixed rule pairs by seed; None where it does not."""
    a, b = {seed for seed, _ in ours}, {seed for seed, _ in theirs}
    repeated = len(a) < len(ours) or len(b) < len(theirs)
    return sorted(a & b) if not repeated and (len(a & b) >= MIN_SEEDS or a == b) else None


def anytime_difference(
    ours: Sequence[tuple[int, float]],
    theirs: Sequence[tuple[int, float]],
    order: Sequence[int],
    margin: float | None = None,
) -> Difference:
    """The same by the any-time rule, of the seeds in `order`, which both have once, as they are in that order. The
    interval is what the intervals of all numbers of seeds have in common; the mean need not lie in it. Without such
    seeds there is the difference of the means alone, of n = 0."""
    a, b = dict(ours), dict(theirs)
    differences, sizes = _paired(a, b, order)
    n, alone = len(differences), tuple(sorted((a.keys() | b.keys()) - set(order)))
    found = look(differences, LEVEL, margin, sizes)
    error = _standard_error(differences, sizes) if n > 1 else 0.0
    mean = mean_of(differences) if n else mean_of([v for _, v in ours]) - mean_of([v for _, v in theirs])
    if found is None or error == 0:
        return Difference(Interval(mean, None, None, n), None, "any-time", alone)
    low, high = (end if math.isfinite(end) else None for end in (found.low, found.high))
    return Difference(Interval(mean, low, high, n), found.p, "any-time", alone, found.sign, found.p_equal,
                      error * math.sqrt(n), error, float(n - 1))  # fmt: skip


def effect_interval(found: Difference) -> Interval | None:
    """The mean difference in deviations of one seed's difference, with the 95% interval from the noncentral t
    distribution, which is right for a number of seeds that was fixed; by the any-time rule without one."""
    if not found.deviation or not found.error or found.freedom is None:
        return None
    effect, scale = found.interval.mean / found.deviation, found.error / found.deviation
    if found.method == "any-time":
        return Interval(effect, None, None, found.interval.n)
    t = max(-MOST_T, min(MOST_T, effect / scale))
    low, high = (_noncentrality(t, found.freedom, tail) * scale for tail in ((1 + LEVEL) / 2, (1 - LEVEL) / 2))
    return Interval(effect, low, high, found.interval.n)


MOST_T = 200.0


def _noncentrality(t: float, freedom: float, probability: float) -> float:
    """The noncentrality with which the statistic is at most t with this probability, by bisection."""
    from scipy.special import nctdtr

    low, high = -5 * MOST_T, 5 * MOST_T
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if nctdtr(freedom, middle, t) > probability else (low, middle)
    return (low + high) / 2


def beats(found: Difference, *, higher_is_better: bool) -> Interval | None:
    """The probability that a new run of the group is better than the baseline's run of the same seed (of any seed,
    where seeds are not paired): the normal probability of the effect. As Bouthillier et al., Accounting for variance
    in machine learning benchmarks, 2021, ask; they count pairs, of which three seeds have three."""
    from scipy.special import ndtr

    effect = effect_interval(found)
    if effect is None:
        return None
    ends = [effect.mean, effect.low, effect.high]
    if not higher_is_better:
        ends = [None if end is None else -end for end in (effect.mean, effect.high, effect.low)]
    mean, low, high = (None if end is None else float(ndtr(end)) for end in ends)
    assert mean is not None
    return Interval(mean, low, high, effect.n)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false verdict among them stays below the level
    (Holm, A simple sequentially rejective multiple test procedure, 1979)."""
    told = shaffer({index: {"": each} for index, each in enumerate(p)})
    return [told[index, ""] for index in range(len(p))]


def shaffer(claims: Mapping[Any, Mapping[str, float]]) -> dict[tuple[Any, str], float]:
    """Holm's adjustment for comparisons that make several claims of which at most one can be false: that there is a
    difference, and that it is smaller than the margin. At each step p is multiplied by the number of comparisons with
    a claim still open (Shaffer, Modified sequentially rejective multiple test procedures, 1986). With one claim each
    this is Holm; of any-time p-values, which are inverses of e-values, it holds at all looks at once."""
    open_claims = {key: len(each) for key, each in claims.items()}
    adjusted: dict[tuple[Any, str], float] = {}
    largest = 0.0
    for p, _, key, claim in sorted(
        (p, place, key, claim) for place, (key, each) in enumerate(claims.items()) for claim, p in each.items()
    ):
        largest = max(largest, min(1.0, p * sum(count > 0 for count in open_claims.values())))
        adjusted[key, claim] = largest
        open_claims[key] -= 1
    return adjusted


class Verdict(NamedTuple):
    """The word, and the adjusted p-values that it comes from, None where there was no test."""

    word: str
    p: float | None = None
    p_equal: float | None = None


BETTER, WORSE, EQUAL, OPEN, FEW = (
    "better", "worse", "equal within the margin", "not distinguishable", "too few seeds",
)  # fmt: skip
LESS = ", by less than the margin"
"""What is added to better and worse where the difference is surely smaller than the margin."""


def tested(differences: Mapping[Any, Difference]) -> dict[Any, Difference]:
    """Those that have a test: what Holm's correction counts."""
    return {key: d for key, d in differences.items() if d.p is not None and d.interval.n >= MIN_SEEDS}


def verdicts(differences: Mapping[Any, Difference], *, higher_is_better: bool, family: int = 0) -> dict[Any, Verdict]:
    """The verdict of each of one family of comparisons. A family that was fixed at a larger number keeps it, whatever
    became of the others."""
    claims: dict[Any, dict[str, float]] = {}
    for key, d in tested(differences).items():
        assert d.p is not None
        claims[key] = {"different": d.p} | ({} if d.p_equal is None else {"equal": d.p_equal})
    gone = {("gone", place): {"different": 1.0} for place in range(family - len(claims))}
    adjusted = shaffer(claims | gone)
    verdict_of: dict[Any, Verdict] = {}
    for key, d in differences.items():
        p, equal = adjusted.get((key, "different")), adjusted.get((key, "equal"))
        within = equal is not None and equal < 1 - LEVEL
        if d.interval.n < MIN_SEEDS:
            word = FEW
        elif p is not None and p < 1 - LEVEL:
            word = (BETTER if (d.sign > 0) == higher_is_better else WORSE) + (LESS if within else "")
        else:
            word = EQUAL if within else OPEN
        verdict_of[key] = Verdict(word, p, equal)
    return verdict_of


def best_set(pairs: Mapping[tuple[Any, Any], Difference], groups: Sequence[Any], *, higher_is_better: bool) -> set[Any]:
    """The groups that may be the best: those to which no other is surely superior. `pairs` has the difference of the
    first from the second of each two. The best one is missing with a probability of at most 5%: it is missing only if
    one of the others is falsely called better, which Bonferroni's correction over the others keeps below that."""
    kept = set(groups)
    for (first, second), d in pairs.items():
        if d.p is not None and d.interval.n >= MIN_SEEDS and d.p * (len(groups) - 1) < 1 - LEVEL:
            kept.discard(second if (d.sign > 0) == higher_is_better else first)
    return kept


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
    rounded = [float(f"{math.floor(high / 2**i / digit + 1e-9) * digit:.6g}") for i in reversed(range(count))]
    return [budget for each in rounded if low <= (budget := min(each, high))]  # a round end may be rounding above high


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
        n = len(values)
        return mean_of(values) + random.standard_t(max(n - 1, 1), DRAWS) * (_standard_error(values) if n > 1 else 0.0)

    cost, quality = (np.stack([drawn(group[i]) for group in groups], axis=-1) for i in (0, 1))
    return [float(share) for share in on_front(cost, quality).mean(axis=0)]
