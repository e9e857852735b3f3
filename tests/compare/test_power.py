"""Power against tables that were simulated elsewhere, scipy, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.intervals import anytime_difference, difference
from softmoe_cli.compare.power import (
    POWER,
    pooled,
    power,
    power_of_equality,
    seeds_to_equal,
    seeds_to_see,
    visible_effect,
)

SEEDS = {
    0.25: (128, 155, 191, 217), 0.5: (34, 41, 51, 58), 0.75: (16, 20, 25, 28), 1: (10, 13, 16, 18), 1.5: (6, 7, 9, 10),
    2: (5, 6, 7, 8), 3: (4, 4, 5, 6),
}  # fmt: skip
"""Effect -> seeds for 80% power at the first step of Holm over 1, 2, 5 and 10 comparisons."""
VISIBLE = {3: (3.26, 6.55), 4: (2.13, 3.45), 5: (1.68, 2.48), 6: (1.43, 2.01), 8: (1.16, 1.53), 10: (1.00, 1.28),
           15: (0.78, 0.97), 20: (0.66, 0.81)}  # fmt: skip
"""Seeds -> the effect seen with 80% power, alone and as the first of four."""


def test_seeds_and_effects_are_those_of_the_tables() -> None:
    for effect, row in SEEDS.items():
        assert tuple(seeds_to_see(effect, m) for m in (1, 2, 5, 10)) == row
    for n, effects in VISIBLE.items():
        assert [visible_effect(n, m) for m in (1, 4)] == pytest.approx(list(effects), abs=0.006)
    assert seeds_to_see(0.001) is None and visible_effect(2) is None


@pytest.mark.parametrize("anytime", [False, True])
def test_power_is_what_simulated_studies_show(anytime: bool) -> None:
    """The chance of a verdict at the last look; and of equality, in studies without a difference."""
    random = np.random.default_rng(0)
    n, trials = 7, 20_000
    for effect, margin in ((1.6, 1.4), (2.2, 2.0)):
        values = random.normal(0, 1, (trials, n))
        mean, error = values.mean(1), values.std(1, ddof=1) / math.sqrt(n)
        if anytime:
            from softmoe_cli.compare.anytime import critical

            seen = np.abs(mean + effect) / error >= critical(n, 0.05)
            within = np.abs(mean) + critical(n, 0.05) * error < margin
        else:
            seen = stats.ttest_1samp(values + effect, 0, axis=1).pvalue < 0.05
            within = np.abs(mean) + stats.t.ppf(0.95, n - 1) * error < margin
        allowed = 4 * 0.5 / math.sqrt(trials)
        assert power(effect, n, anytime=anytime) == pytest.approx(float(np.mean(seen)), abs=allowed)
        assert power_of_equality(margin, n, anytime=anytime) == pytest.approx(float(np.mean(within)), abs=allowed)


def test_few_pairs_and_many_comparisons() -> None:
    """There scipy's nctdtr is nan in places; more comparisons always see less."""
    values = np.random.default_rng(0).normal(5, 1, (20_000, 3))
    seen = stats.ttest_1samp(values, 0, axis=1).pvalue < 0.05 / 4
    assert power(5, 3, 4) == pytest.approx(float(np.mean(seen)), abs=4 * 0.5 / math.sqrt(20_000))
    effects = [visible_effect(3, m) or 0.0 for m in range(1, 13)]
    assert effects == sorted(set(effects))


@pytest.mark.parametrize("anytime", [False, True])
def test_the_fewest_seeds_are_the_fewest(anytime: bool) -> None:
    for effect in (0.9, 2.5):
        for chance, fewest in ((power, seeds_to_see), (power_of_equality, seeds_to_equal)):
            n = fewest(effect, 3, anytime=anytime)
            assert n is not None and chance(effect, n, 3, anytime=anytime) >= POWER
            assert chance(effect, n - 1, 3, anytime=anytime) < POWER
        n = seeds_to_see(effect, 3, anytime=anytime)
        seen = visible_effect(n or 0, 3, anytime=anytime)
        assert seen is not None and seen <= effect


def test_the_any_time_rule_sees_nothing_in_three_seeds() -> None:
    assert visible_effect(3, anytime=True) is None and power(50, 3, anytime=True) == 0 == power_of_equality(
        50, 3, anytime=True
    )
    assert (seeds_to_see(1, anytime=True) or 0) > (seeds_to_see(1) or 0)


def test_a_pooled_deviation_and_how_often_its_interval_holds_it() -> None:
    """Of four arms with one baseline, whose differences have a deviation of sqrt(2)."""
    alone = pooled([(0.7, 4.0)])
    expected = [0.7 * math.sqrt(4 / stats.chi2.ppf(p, 4)) for p in (0.975, 0.025)]
    assert [alone.mean, alone.low, alone.high] == pytest.approx([0.7, *expected])
    assert pooled([(3.0, 2.0), (4.0, 6.0)]).mean == pytest.approx(math.sqrt((2 * 9 + 6 * 16) / 8))
    random, held, trials = np.random.default_rng(2), 0, 600
    for _ in range(trials):
        runs = random.normal(0, 1, (5, 5))
        found = pooled([(float(np.std(arm - runs[0], ddof=1)), 4.0) for arm in runs[1:]])
        assert found.low is not None and found.high is not None
        held += found.low <= math.sqrt(2) <= found.high
    assert held / trials == pytest.approx(0.95, abs=0.036)


def test_effects_of_made_up_arms_need_the_seeds_that_the_table_says() -> None:
    """From two arms to seeds, through what compare holds of them."""
    ours, theirs = [(s, 90 + (-1) ** s + 1.0) for s in range(6)], [(s, 90.0) for s in range(6)]
    found = difference(ours, theirs)
    assert found.deviation == pytest.approx(float(np.std([2, 0] * 3, ddof=1)))
    assert seeds_to_see(found.interval.mean / (found.deviation or 0)) == seeds_to_see(1 / math.sqrt(1.2))
    assert anytime_difference(ours, theirs, range(6)).deviation == pytest.approx(found.deviation)
