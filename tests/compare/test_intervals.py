"""Intervals, verdicts, budgets and fronts against scipy, brute force and simulation."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.anytime import look, p_zero
from softmoe_cli.compare.intervals import (
    DRAWS,
    Interval,
    anytime_difference,
    at_budget,
    beats,
    best_set,
    budgets,
    difference,
    front_probability,
    holm,
    mean_interval,
    on_front,
    shaffer,
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


@pytest.mark.parametrize("images", [359, 10_000, 50_000, 10**6])
def test_rounding_of_what_is_subtracted_is_no_spread(images: int) -> None:
    """One image more with every seed: a hundredth of a point or less, in which the rounding of some 80% shows."""
    right = np.random.default_rng(images).integers(images * 3 // 4, images - 2, 8).tolist()
    theirs = [(seed, 100 * count / images) for seed, count in enumerate(right)]
    ours = [(seed, 100 * (count + 1) / images) for seed, count in enumerate(right)]
    for found in (difference(ours, theirs, 1.0), anytime_difference(ours, theirs, range(8), 1.0)):
        assert (found.p, found.p_equal, found.interval.low) == (None, None, None)
        assert found.interval.mean == pytest.approx(100 / images)
    ours[0] = 0, 100 * (right[0] + 2) / images
    for found in (difference(ours, theirs), anytime_difference(ours, theirs, range(8))):
        assert found.p is not None and found.deviation == pytest.approx(100 / images / math.sqrt(8))


def test_a_seed_that_went_astray_does_not_make_rounding_of_those_before_it() -> None:
    ours = [(seed, 2.1 + 1e-4 * seed) for seed in range(8)]
    theirs = [(seed, 2.3) for seed in range(8)]
    before = anytime_difference(ours, theirs, range(8))
    after = anytime_difference([*ours, (8, 1e10)], [*theirs, (8, 1e10)], range(9))
    alone = difference([*ours, (8, 1e10)], theirs)
    assert before.p is not None and before.p < 0.01 and after.p == before.p
    assert alone.p == difference(ours, theirs).p is not None, "nor one without a partner"


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
    for end in (0.00762, 0.207, 3 * 0.000301, 0.001, 128.0):  # round ends, and one that rounding puts below one
        curve = [(end / 100, 0.0), (end, 1.0)]
        assert len(budgets([curve])) == 3 and at_budget(curve, budgets([curve])[-1]) == pytest.approx(1)
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


def test_equal_costs_of_few_and_of_many_seeds_are_equal() -> None:
    """The mean of equal numbers is that number, which their sum over n often is not; so the worse of two groups of one
    cost is never on the front."""
    for cost in np.random.default_rng(1).uniform(0.001, 10, 50).tolist():
        for n, m in ((3, 4), (4, 3), (5, 7), (10, 2)):
            assert mean_interval([cost] * n) == Interval(cost, cost, cost, n)
            told = front_probability([([cost] * n, [90.0, 91.0] * n), ([cost] * m, [10.0, 11.0] * m)])
            assert told == [1.0, 0.0]


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


@pytest.mark.parametrize("n", [3, 8])
def test_equality_is_two_one_sided_tests(n: int) -> None:
    random = np.random.default_rng(n)
    for _ in range(10):
        x, y = random.normal(90, 1, n), random.normal(90.3, 1, n)
        found = difference(list(enumerate(x.tolist())), list(enumerate(y.tolist())), margin=2.0)
        lower = stats.ttest_1samp(x - y, -2.0, alternative="greater").pvalue
        upper = stats.ttest_1samp(x - y, 2.0, alternative="less").pvalue
        assert found.p_equal == pytest.approx(max(lower, upper))
        turned = difference(list(enumerate(y.tolist())), list(enumerate(x.tolist())), margin=2.0)
        assert (turned.p_equal, turned.p, turned.sign) == pytest.approx((found.p_equal, found.p, -found.sign))


def test_verdicts_within_a_margin() -> None:
    base = [(seed, 90.0 + seed) for seed in range(6)]
    wobble = (0.03, -0.02, 0.01, -0.03, 0.02, 0.0)

    def arm(by: float) -> list[tuple[int, float]]:
        return [(seed, value + by + noise) for (seed, value), noise in zip(base, wobble, strict=True)]

    found = {by: difference(arm(by), base, margin=0.5) for by in (0.0, 0.2, 3.0, -0.2, 0.5)}
    words = {by: told.word for by, told in verdicts(found, higher_is_better=True).items()}
    assert words == {0.0: "equal within the margin", 0.2: "better, by less than the margin", 3.0: "better",
                     -0.2: "worse, by less than the margin", 0.5: "better"}  # fmt: skip
    turned = verdicts(found, higher_is_better=False)
    assert turned[0.2].word == "worse, by less than the margin" and turned[3.0].p_equal == 1.0
    few = difference(arm(0.0)[:2], base[:2], margin=0.5)
    assert verdicts({0: few}, higher_is_better=True)[0].word == "too few seeds"


def test_claims_of_which_one_may_be_false() -> None:
    """Word for word: every set of claims that may be false together, one for each comparison at most, keeps the level
    (closed testing with Bonferroni's test over the largest such set)."""
    random = np.random.default_rng(0)
    for _ in range(50):
        claims = {
            arm: {"different": float(random.random() ** 4), "equal": float(random.random() ** 4)} for arm in "abc"
        }
        told = shaffer(claims)
        order = sorted((p, arm, claim) for arm, each in claims.items() for claim, p in each.items())
        for level in (0.02, 0.1, 0.5):
            accepted, left = set(), list(order)
            while left and left[0][0] * len({arm for _, arm, _ in left}) < level:
                accepted.add(left.pop(0)[1:])
            assert accepted == {key for key, p in told.items() if p < level}


@pytest.mark.parametrize("studies", [150, pytest.param(4000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", ["null", "mixed"])
def test_families_within_a_margin_are_rarely_wrong(kind: str, studies: int) -> None:
    """Four arms and a margin of one deviation: arms without a difference are never called different, and arms with one
    of the margin never equal, but in 5% of studies."""
    random, wrong = np.random.default_rng(5), 0
    truth = [0.0, 0.0, 0.0, 0.0] if kind == "null" else [0.0, 0.0, 1.0, -1.0]
    seeds = list(range(6))
    for _ in range(studies):
        found = {}
        for arm, by in enumerate(truth):
            values = random.normal(by, 1, 6).tolist()
            found[arm] = difference(list(zip(seeds, values, strict=True)), [(s, 0.0) for s in seeds], margin=1.0)
        told = verdicts(found, higher_is_better=True)
        wrong += any(
            ("better" in told[arm].word or "worse" in told[arm].word) if by == 0 else "margin" in told[arm].word
            for arm, by in enumerate(truth)
        )
    assert wrong / studies <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)


@pytest.mark.parametrize("arms", [1, 4, 12])
@pytest.mark.parametrize("studies", [1000, pytest.param(20_000, marks=pytest.mark.thorough)])
def test_the_any_time_rule_is_rarely_wrong_though_looked_at_after_every_seed(arms: int, studies: int) -> None:
    """Studies without any difference, looked at from 3 to 12 seeds, arms against one baseline: a false verdict at any
    look in at most 5% of them, where Student's test would have one in every sixth, of one arm."""
    runs = np.random.default_rng(arms).normal(90, 1, (studies, arms + 1, 12))
    apart = runs[:, 1:] - runs[:, :1]
    false = p_zero(apart).min(1)[:, 1:] * arms < 0.05  # the first step of Holm
    student = [stats.ttest_1samp(apart[:, 0, :n], 0, axis=1).pvalue < 0.05 for n in range(3, 13)]
    allowed = 4 * math.sqrt(0.05 * 0.95 / studies)
    assert false.any(1).mean() <= 0.05 + allowed
    assert np.any(student, axis=0).mean() >= 0.18 - 4 * math.sqrt(0.18 * 0.82 / studies)
    for study in [*range(5), *np.flatnonzero(false.any(1))[:3]]:
        for n in (3, 12):
            base, *others = [list(enumerate(values)) for values in runs[study, :, :n].tolist()]
            found = {arm: anytime_difference(each, base, range(n)) for arm, each in enumerate(others)}
            words = {told.word for told in verdicts(found, higher_is_better=True).values()}
            assert bool(words & {"better", "worse"}) == bool(false[study, : n - 2].any())


def test_any_time_differences_take_seeds_in_the_order_given() -> None:
    ours, theirs = {0: 91.0, 1: 92.5, 2: 90.7, 7: 95.0}, {0: 90.0, 1: 90.0, 2: 90.0, 3: 1.0}
    found = anytime_difference(list(ours.items()), list(theirs.items()), [2, 0, 1], 1.0)
    told = look([0.7, 1.0, 2.5], 0.95, 1.0)
    assert told is not None
    assert (found.method, found.unpaired_seeds) == ("any-time", (3, 7))
    assert (found.p, found.p_equal) == pytest.approx((told.p, told.p_equal))
    assert found.interval.mean == pytest.approx(1.4) and (found.interval.low, found.interval.n) == (None, 3)
    same = anytime_difference([(0, 2.0), (1, 3.0), (2, 4.0)], [(0, 1.0), (1, 2.0), (2, 3.0)], [0, 1, 2])
    assert (same.p, same.interval.low) == (None, None)
    apart = anytime_difference([(0, 2.0), (1, 3.0)], [(5, 1.0)], [])
    assert (apart.interval, apart.unpaired_seeds) == (Interval(1.5, None, None, 0), (0, 1, 5))
    words = [verdicts({0: each}, higher_is_better=True)[0].word for each in (same, apart)]
    assert words == ["not distinguishable", "too few seeds"]


def test_the_chance_to_win_is_the_normal_one_and_agrees_with_the_test() -> None:
    """Its interval is scipy's noncentral t turned round, and has one half inside just where Student's has zero."""
    random = np.random.default_rng(4)
    for n in (3, 5, 12):
        for shift in (0.0, 0.8, 3.0):
            x, y = random.normal(90 + shift, 1, n), random.normal(90, 0.5, n)
            found = difference(list(enumerate(x.tolist())), list(enumerate(y.tolist())))
            won = beats(found, higher_is_better=True)
            lost = beats(found, higher_is_better=False)
            d, t = x - y, float(stats.ttest_rel(x, y).statistic)
            assert won is not None and lost is not None and won.low is not None and won.high is not None
            assert won.mean == pytest.approx(stats.norm.cdf(d.mean() / d.std(ddof=1)))
            for end, tail in ((won.low, 0.975), (won.high, 0.025)):
                assert stats.nct.cdf(t, n - 1, stats.norm.ppf(end) * math.sqrt(n)) == pytest.approx(tail, abs=1e-6)
            assert (won.low < 0.5 < won.high) == (found.p is not None and found.p > 0.05)
            assert [lost.mean, lost.low, lost.high] == pytest.approx([1 - won.mean, 1 - won.high, 1 - won.low])
    apart = difference([(0, 5.0), (1, 6.0), (2, 7.5)], [(7, 1.0), (8, 2.5), (9, 3.0)])
    won = beats(apart, higher_is_better=True)
    spread = math.hypot(np.std([5, 6, 7.5], ddof=1), np.std([1, 2.5, 3], ddof=1))
    assert won is not None and won.mean == pytest.approx(stats.norm.cdf((18.5 - 6.5) / 3 / spread))
    assert beats(difference([(0, 1.0)], [(0, 2.0)]), higher_is_better=True) is None


def test_the_set_of_best_groups() -> None:
    """One that stands out; several that cannot be told apart; few seeds exclude nobody and are not excluded."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 5))
    values = {name: list(enumerate((level + noise[i]).tolist())) for i, (name, level) in enumerate(
        {"a": 95, "b": 94.98, "c": 90, "d": 91}.items())}  # fmt: skip

    def pairs(names: str) -> dict[tuple[str, str], Any]:
        return {(x, y): difference(values[x], values[y]) for i, x in enumerate(names) for y in names[i + 1 :]}

    assert best_set(pairs("abcd"), "abcd", higher_is_better=True) == {"a", "b"}
    assert best_set(pairs("acd"), "acd", higher_is_better=True) == {"a"}
    assert best_set(pairs("abcd"), "abcd", higher_is_better=False) == {"c"}
    values["d"] = values["d"][:2]
    assert best_set(pairs("acd"), "acd", higher_is_better=True) == {"a", "d"}


@pytest.mark.parametrize("studies", [150, pytest.param(5000, marks=pytest.mark.thorough)])
def test_the_best_group_is_rarely_left_out(studies: int) -> None:
    """Where all are equally good: each of them is missing in at most 5% of studies."""
    random, missing = np.random.default_rng(6), 0
    for _ in range(studies):
        runs = [list(enumerate(each)) for each in random.normal(0, 1, (4, 4)).tolist()]
        found = {(i, j): difference(runs[i], runs[j]) for i in range(4) for j in range(i + 1, 4)}
        missing += 0 not in best_set(found, range(4), higher_is_better=True)
    assert missing / studies <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / studies)
