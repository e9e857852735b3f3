"""The any-time rule against quadrature, inversion, and simulated studies that are looked at after every seed."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from softmoe_cli.compare.anytime import critical, intersection, log_e, look, moments, p_equal, p_zero
from tests.conftest import thinned


def bayes_factor(t: float, n: int, g: float) -> float:
    """The density of t, averaged over the prior of the effect size, over its density without an effect."""
    v = n - 1

    def joint(effect: float) -> float:
        return float(stats.nct.pdf(t, v, effect * math.sqrt(n)) * stats.norm.pdf(effect, scale=math.sqrt(g)))

    peak = t / math.sqrt(n)
    marginal, _ = integrate.quad(joint, -12, 12, points=[0, peak], limit=400, epsabs=0, epsrel=1e-11)
    return float(marginal / stats.t.pdf(t, v))


@pytest.mark.parametrize(
    ("n", "t", "g"),
    thinned([(2, 1.0, 1.0), (3, -2.5, 1.0), (5, 8.4532, 1.0), (10, 0.3, 1.0), (10, 3.87, 4.0), (20, -1.0, 0.5),
             (30, 3.3466, 1.0), (30, 0.0, 1.0)], 4),
)  # fmt: skip
def test_e_is_the_bayes_factor_by_quadrature(n: int, t: float, g: float) -> None:
    mean, spread, m0 = 0.7, 2.0, 0.7 - t * 2.0 / math.sqrt(n)
    assert math.exp(log_e(n, mean, spread, m0, g)) == pytest.approx(bayes_factor(t, n, g), rel=1e-9)


def test_the_interval_ends_where_e_is_one_over_alpha() -> None:
    """Also the four critical values that were worked out by hand."""
    for n in (4, 5, 10, 20, 30, 200):
        for alpha in (0.05, 0.0125):
            t = float(critical(n, alpha))
            if math.isfinite(t):
                assert math.exp(log_e(n, t / math.sqrt(n), 1.0)) == pytest.approx(1 / alpha, rel=1e-9)
    assert math.isinf(critical(3, 0.05))
    assert [float(critical(n, 0.05)) for n in (5, 10, 20, 30)] == pytest.approx(
        [8.4532, 3.8698, 3.4248, 3.3466], abs=5e-5
    )
    assert [float(critical(n, 0.05)) / math.sqrt(n) for n in (5, 10, 20, 30)] == pytest.approx(
        [3.7804, 1.2237, 0.7658, 0.6110], abs=5e-5
    )


def test_moments_are_numpys() -> None:
    random = np.random.default_rng(0)
    values = random.normal(90, 1e-3, (3, 12))
    n, mean, spread = moments(values)
    for i, count in enumerate(n):
        assert mean[:, i] == pytest.approx(values[:, :count].mean(-1), rel=1e-14)
        assert spread[:, i] == pytest.approx(values[:, :count].std(-1, ddof=1), rel=1e-6)
    assert moments([0.1 + 0.2, 0.3, 0.3])[2].tolist() == [0, 0], "rounding is no spread"


def test_units_and_signs_do_not_matter_and_the_past_does_not_change() -> None:
    random = np.random.default_rng(1)
    values = random.normal(0.8, 1, 20)
    whole = look(values.tolist(), 0.95, 0.6)
    larger = look((values * 1e6).tolist(), 0.95, 0.6e6)
    turned = look((-values).tolist(), 0.95, 0.6)
    assert whole is not None and larger is not None and turned is not None and whole.p_equal is not None
    assert (larger.p, larger.p_equal) == pytest.approx((whole.p, whole.p_equal))
    assert (larger.low, larger.high) == pytest.approx((whole.low * 1e6, whole.high * 1e6))
    assert (turned.p, turned.p_equal, turned.sign) == pytest.approx((whole.p, whole.p_equal, -whole.sign))
    assert (turned.low, turned.high) == pytest.approx((-whole.high, -whole.low))
    mixed = np.concatenate([random.permutation(values[:8]), values[8:]])
    for mine, others in zip(moments(values), moments(mixed), strict=True):
        assert mine[7 - 1 :] == pytest.approx(others[7 - 1 :]), "the first eight in another order"


def test_p_values_are_where_the_intersection_lets_go() -> None:
    """`p_zero` is the smallest alpha without 0 in the intersection, `p_equal` that with all of it in the margin."""
    for seed in range(8):
        values = np.random.default_rng(seed).normal(0.4 * seed, 1, 14)
        p, equal = float(p_zero(values)[-1]), float(p_equal(values, 2.5)[-1])
        for alpha, ours in ((p, "zero"), (equal, "equal")):
            if not 1e-12 < alpha < 0.9:
                continue
            inside = []
            for near in (alpha * 0.999, alpha * 1.001):
                low, high = (float(end[-1]) for end in intersection(values, near))
                inside.append(low < 0 < high if ours == "zero" else not (low > -2.5 and high < 2.5))
            assert inside == [True, False], ours


def test_what_cannot_be_told() -> None:
    assert look([1.0], 0.95) is None
    same = look([1.0, 1.0, 1.0], 0.95, 3.0)
    assert same is not None and (same.p, same.p_equal, same.low) == (1.0, 1.0, -math.inf)
    three = look([1.0, 1.01, 0.99], 0.95)
    assert three is not None and (three.low, three.high) == (-math.inf, math.inf) and three.p > 0.05
    astray = look([*np.random.default_rng(0).normal(5, 0.1, 10), *np.random.default_rng(1).normal(-5, 0.1, 200)], 0.95)
    assert astray is not None and astray.low > astray.high, "an empty intersection is not hidden"


def settled(effect: float, margin: float | None, studies: int, alpha: float = 0.05, most: int = 30) -> dict[str, float]:
    """Shares of verdicts and mean seeds of studies that are looked at after each seed from the third on and stop at the
    first verdict. Differences have a deviation of 1."""
    values = np.random.default_rng(20261128).normal(effect, 1, (studies, most))
    low, high = (end[:, 1:] for end in intersection(values, alpha))
    better, worse = low > 0, high < 0
    equal = np.zeros_like(better) if margin is None else (-margin < low) & (high < margin) & ~better & ~worse
    any_verdict = better | worse | equal
    stop = np.where(any_verdict.any(1), any_verdict.argmax(1), most - 3)
    at = np.arange(studies), stop
    shares: dict[str, Any] = {"better": better[at], "worse": worse[at], "equal": equal[at]}
    told = {name: 100 * float(share.mean()) for name, share in shares.items()}
    return told | {"open": 100 - sum(told.values()), "seeds": float(stop.mean()) + 3}


STUDIES = [  # margin, effect, better, worse, equal, open (in percent), mean seeds: simulated with other code
    (None, 0.0, 0.9, 1.1, 0.0, 98.0, 29.7), (None, 0.5, 40.9, 0.0, 0.0, 59.1, 25.2),
    (None, 0.8, 88.2, 0.0, 0.0, 11.8, 17.5), (None, 1.0, 98.5, 0.0, 0.0, 1.5, 13.3),
    (None, 1.5, 100.0, 0.0, 0.0, 0.0, 8.6), (None, 2.0, 100.0, 0.0, 0.0, 0.0, 6.9),
    (None, 3.0, 100.0, 0.0, 0.0, 0.0, 5.8), (1.0, 0.0, 0.9, 1.0, 95.5, 2.6, 16.6),
    (1.0, 0.5, 38.2, 0.0, 37.7, 24.1, 20.8), (1.0, 0.8, 86.1, 0.0, 5.2, 8.7, 16.9),
    (1.0, 1.0, 97.8, 0.0, 0.9, 1.3, 13.2), (1.0, 2.0, 100.0, 0.0, 0.0, 0.0, 6.9),
    (1.5, 0.0, 0.5, 0.6, 98.9, 0.0, 9.8), (1.5, 0.5, 17.1, 0.0, 82.8, 0.1, 12.1),
    (1.5, 1.0, 83.4, 0.0, 16.6, 0.1, 12.0), (1.5, 1.5, 99.6, 0.0, 0.4, 0.0, 8.5),
]  # fmt: skip


def agrees(told: dict[str, float], expected: tuple[float, ...], studies: int) -> None:
    """Within four standard errors of both simulations (the other had 20,000 studies), and the rounding."""
    for name, share in zip(("better", "worse", "equal", "open"), expected, strict=False):
        chance = min(max(share / 100, 0.001), 0.999)
        error = 100 * math.sqrt(chance * (1 - chance) * (1 / studies + 1 / 20_000))
        assert told[name] == pytest.approx(share, abs=4 * error + 0.1), (name, told)
    assert told["seeds"] == pytest.approx(expected[-1], abs=4 * 9 * math.sqrt(1 / studies + 1 / 20_000) + 0.05), told


@pytest.mark.parametrize(("margin", "effect", *["better", "worse", "equal", "open", "seeds"]), STUDIES)
def test_studies_end_as_they_should(
    margin: float | None, effect: float, better: float, worse: float, equal: float, open: float, seeds: float
) -> None:
    agrees(settled(effect, margin, 20_000), (better, worse, equal, open, seeds), 20_000)


def test_four_arms_and_effects_at_the_margin() -> None:
    """Bonferroni over four arms; and arms whose difference is the margin, which are falsely called equal seldom."""
    studies = 20_000
    four = settled(0.0, 1.0, studies, alpha=0.05 / 4)
    assert four["equal"] == pytest.approx(88.8, abs=400 * math.sqrt(0.1 / studies) + 0.3)
    assert four["better"] + four["worse"] <= 0.4 + 400 * math.sqrt(0.004 / studies)
    assert four["seeds"] == pytest.approx(21.5, abs=36 / math.sqrt(studies) + 0.2)
    for margin, share, most in ((0.5, 1.3, 60), (1.0, 1.0, 30), (1.5, 0.4, 30)):
        told = settled(margin, margin, studies, most=most)
        assert told["equal"] == pytest.approx(share, abs=400 * math.sqrt(share / 100 / studies) + 0.15)


def test_all_intervals_hold_the_truth_at_once() -> None:
    """Missed at any of up to 60 looks by 2.85% of studies."""
    studies = 20_000
    low, high = intersection(np.random.default_rng(3).normal(0.3, 1, (studies, 60)), 0.05)
    missed = float(np.mean((low[:, -1] > 0.3) | (high[:, -1] < 0.3)))
    assert missed == pytest.approx(0.0285, abs=4 * math.sqrt(0.0285 / studies))
