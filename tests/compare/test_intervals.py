"""Intervals, verdicts, budgets and fronts against scipy, brute force and simulation."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.intervals import (
    DRAWS,
    at_budget,
    budgets,
    difference,
    front_probability,
    holm,
    mean_interval,
    on_front,
    verdicts,
)


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_intervals_are_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        values = random.normal(90, 2, n).tolist()
        found = mean_interval(values)
        expected = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
        assert [found.low, found.high, found.n] == pytest.approx([*expected, n])


@pytest.mark.parametrize("n", [3, 4, 10])
def test_paired_differences_are_scipys(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(20):
        seeds, x, y = random.permutation(n).tolist(), random.normal(90, 2, n), random.normal(90.5, 1, n)
        found = difference(list(zip(seeds, x.tolist(), strict=True)), list(zip(seeds, y.tolist(), strict=True))[::-1])
        expected = stats.ttest_rel(x, y)
        assert found.method == "paired"
        assert found.p == pytest.approx(expected.pvalue)
        assert [found.interval.low, found.interval.high] == pytest.approx([*expected.confidence_interval(0.95)])


def test_unpaired_differences_are_scipys() -> None:
    random = np.random.default_rng(0)
    for n, m in [(3, 3), (3, 8), (2, 5), (12, 4)]:
        x, y = random.normal(90, 3, n), random.normal(91, 1, m)
        found = difference(list(enumerate(x.tolist())), list(enumerate(y.tolist(), 100)))
        expected = stats.ttest_ind(x, y, equal_var=False)
        assert found.method == "Welch"
        assert found.p == pytest.approx(expected.pvalue)
        assert [found.interval.low, found.interval.high] == pytest.approx([*expected.confidence_interval(0.95)])


def test_which_test_depends_on_the_seeds_only() -> None:
    shared = [(0, 1.0), (1, 2.0), (2, 4.0)]
    found = difference([*shared, (7, 3.0)], [*shared[::-1], (8, 0.0), (9, 1.0)])
    assert (found.method, found.interval.n, found.unpaired_seeds) == ("paired", 3, (7, 8, 9))
    assert difference(shared, [(0, 1.0), (5, 2.0), (6, 3.0)]).method == "Welch"
    assert difference([*shared, (0, 1.5)], shared).method == "Welch", "a seed that occurs twice has no one partner"


def test_what_cannot_be_told_has_no_interval() -> None:
    alone = mean_interval([3.0])
    assert (alone.mean, alone.low, alone.high) == (3.0, None, None)
    assert mean_interval([0.1 + 0.2, 0.3, 0.3]).low == pytest.approx(0.3), "rounding is no spread"
    same = difference([(0, 2.0), (1, 3.0), (2, 4.0)], [(0, 1.0), (1, 2.0), (2, 3.0)])
    assert (same.interval.mean, same.interval.low, same.p) == (1.0, None, None)
    assert verdicts({"a": same}, higher_is_better=True)["a"][0] == "not distinguishable"
    single = difference([(0, 2.0)], [(0, 1.0)])
    assert (single.interval.mean, single.p) == (1.0, None)
    pair = difference([(0, 2.0), (1, 9.0)], [(0, 1.0), (1, 7.9)])
    assert pair.p is not None
    assert {v for v, *_ in verdicts({"a": single, "b": pair}, higher_is_better=True).values()} == {"too few seeds"}


def test_better_and_worse_follow_the_direction() -> None:
    up = difference([(0, 5.0), (1, 6.1), (2, 7.0)], [(0, 1.0), (1, 2.0), (2, 3.0)])
    assert verdicts({"a": up}, higher_is_better=True)["a"][0] == "better"
    assert verdicts({"a": up}, higher_is_better=False)["a"][0] == "worse"


@pytest.mark.parametrize("kind", ["paired", "Welch", "images", "family"])
@pytest.mark.parametrize("n", [3, 5])
def test_verdicts_are_rarely_wrong_where_there_is_no_difference(kind: str, n: int) -> None:
    """At most 6% of comparisons, or of families of five, on seeds without a difference. `images` has qualities on a
    grid, as 359 test images make them."""
    random, trials, wrong = np.random.default_rng(0), 3000, 0
    shift = n if kind == "Welch" else 0
    for _ in range(trials):
        values = random.normal(96, 0.6, (6 if kind == "family" else 2, n))
        if kind == "images":
            values = np.round(values * 3.59) / 3.59
        base, *others = values.tolist()
        compared = {
            i: difference(list(enumerate(other)), list(enumerate(base, shift))) for i, other in enumerate(others)
        }
        told = verdicts(compared, higher_is_better=True)
        wrong += any(verdict in ("better", "worse") for verdict, *_ in told.values())
    assert wrong / trials <= 0.06


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        found = mean_interval(random.normal(7, 2, 3).tolist())
        assert found.low is not None and found.high is not None
        held += found.low <= 7 <= found.high
    assert 0.93 <= held / 2000 <= 0.97


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 0.005*4, 0.01*3, 0.03*2, 0.06
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_interpolation_is_a_ruler_and_stops_at_the_ends() -> None:
    curve = [(1.0, 10.0), (3.0, 30.0), (4.0, 0.0)]
    assert [at_budget(curve, x) for x in (1.0, 1.5, 3.0, 3.25, 4.0)] == pytest.approx([10, 15, 30, 22.5, 0])
    assert at_budget(curve, math.nextafter(1, 0)) is None
    assert at_budget(curve, math.nextafter(4, 5)) is None
    assert at_budget([], 1.0) is None


def test_budgets_lie_where_every_curve_does() -> None:
    curves = [[(1.0, 0.0), (10.3, 0.0)], [(2.0, 0.0), (8.127, 0.0)]]
    assert budgets(curves) == [2.03, 4.06, 8.12]
    assert all(at_budget(curve, budget) is not None for curve in curves for budget in budgets(curves))
    assert budgets([[(1.0, 0.0), (2.0, 0.0)], [(3.0, 0.0), (4.0, 0.0)]]) == []
    assert budgets([[(1.0, 0.0)], []]) == []


def dominated(points: list[tuple[float, float]]) -> list[bool]:
    """Word for word: another point is at least as good in both and better in one."""
    return [
        any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in points) for cost, quality in points
    ]


def test_front_is_brute_force() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 3, 7, 30):
        for _ in range(60):
            points: Any = random.integers(0, 6, (size, 2)).astype(float)  # small numbers: many ties
            expected = [not each for each in dominated(points.tolist())]
            assert on_front(points[:, 0], points[:, 1]).tolist() == expected


def test_front_probability() -> None:
    """Certain, impossible, a fair coin, and scipy's t where only quality varies; same input, same output."""
    certain = front_probability([([1.0] * 3, [90.0, 91, 92]), ([2.0] * 3, [10.0, 11, 12])])
    assert certain == [1.0, pytest.approx(0, abs=0.01)]
    coin = front_probability([([1.0] * 3, [90.0, 91, 92]), ([1.0] * 3, [90.0, 91, 92])])
    assert coin == [pytest.approx(0.5, abs=0.03), pytest.approx(0.5, abs=0.03)]
    values = [90.0, 91.5, 92.0, 90.5]
    chance = front_probability([([1.0], [90.5]), ([2.0] * 4, values)])[1]
    expected = stats.t.sf((90.5 - np.mean(values)) / stats.sem(values), 3)
    assert chance == pytest.approx(expected, abs=4 / math.sqrt(DRAWS))
    assert front_probability([([1.0], [90.5]), ([2.0] * 4, values)])[1] == chance
