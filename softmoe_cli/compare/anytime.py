"""The any-time rule: verdicts and intervals of paired differences that stay right however often one looks.

For n paired differences (one for each seed, in a fixed order) with mean m and deviation s, and v = n - 1, let
t = (m - m0) sqrt(n) / s. The Bayes factor of t, with a Normal(0, g) prior of the effect size and the right-Haar prior
of the deviation, is

    e_n(m0) = (1 + n g)^(-1/2) * ((1 + t^2/v) / (1 + t^2 / (v (1 + n g))))^((v + 1)/2),  n >= 2

(Gönen, Johnson, Lu and Westfall, The Bayesian two-sample t test, 2005). While the true mean is m0, whatever the
deviation, the chance that it ever reaches 1/alpha is at most alpha (Hendriksen, de Heide and Grünwald, Optional
stopping with Bayes factors, 2021; Wang and Ramdas, Anytime-valid t-tests and confidence sequences for Gaussian means
with unknown variance, 2024). So one may look after every seed and stop for any reason.

Functions take arrays: differences "... n" in their order; what they return is "... n-1", one number for each of the
first 2, 3, ... n differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

EFFECT_VARIANCE = 1.0
"""g. A choice for all tables: one that is made after a look would be a look more."""
NO_SPREAD = 1e-12
"""Differences whose deviation is below this share of the largest, or of the largest number that they are differences
of, differ by rounding only: one image of 50,000 is 0.002 points, of which the rounding of 76.3 is no small share."""


def moments(differences: Any, sizes: Any = 0.0) -> tuple[Any, Any, Any]:
    """n, mean and deviation (n - 1) of the first 2, 3, ... differences (Welford's recurrence, 1962). A deviation that
    is rounding only is 0; `sizes` are of the numbers that each is the difference of."""
    values = np.asarray(differences, float)
    sizes = np.maximum(np.abs(values), sizes)
    means, spreads = [], []
    mean, squares, largest = values[..., 0].copy(), np.zeros(values.shape[:-1]), sizes[..., 0]
    for i in range(1, values.shape[-1]):
        step = values[..., i] - mean
        mean = mean + step / (i + 1)
        squares = squares + step * (values[..., i] - mean)
        largest = np.maximum(largest, sizes[..., i])
        spread = np.sqrt(squares / i)
        means.append(mean)
        spreads.append(np.where(spread <= NO_SPREAD * largest, 0.0, spread))
    return np.arange(2, values.shape[-1] + 1), np.stack(means, -1), np.stack(spreads, -1)


def log_e(n: Any, mean: Any, spread: Any, m0: float = 0.0, g: float = EFFECT_VARIANCE) -> Any:
    """The logarithm of e_n(m0); 0 without a spread, from which nothing is concluded."""
    n, mean, spread = (np.asarray(each, float) for each in (n, mean, spread))
    v, wide = n - 1, 1 + n * g
    with np.errstate(divide="ignore", invalid="ignore"):
        square = ((mean - m0) / spread) ** 2 * n / v
        ratio = np.log1p(square) - np.log1p(square / wide)
        ratio = np.where(np.isinf(square), np.log(wide), ratio)  # the limit, for a spread that is nearly 0
        return np.where(spread > 0, -0.5 * np.log(wide) + (v + 1) / 2 * ratio, 0.0)


def critical(n: Any, alpha: float, g: float = EFFECT_VARIANCE) -> Any:
    """The |t| at which e_n reaches 1/alpha; infinite where no t does."""
    n = np.asarray(n, float)
    v, wide = n - 1, 1 + n * g
    r = np.exp(2 / (v + 1) * (0.5 * np.log(wide) - np.log(alpha)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(r < wide, np.sqrt((r - 1) * v * wide / (wide - r)), np.inf)


def intersection(differences: Any, alpha: float, g: float = EFFECT_VARIANCE) -> tuple[Any, Any]:
    """The ends of what the intervals of the first 2, 3, ... differences have in common: the m0 that has had e < 1/alpha
    at every n so far. It holds the truth at all n at once with probability 1 - alpha; it can be empty (low > high)."""
    return _intersection(moments(differences), alpha, g)


def _intersection(found: tuple[Any, Any, Any], alpha: float, g: float) -> tuple[Any, Any]:
    n, mean, spread = found
    with np.errstate(invalid="ignore"):
        half = np.where(spread > 0, critical(n, alpha, g) * spread / np.sqrt(n), np.inf)
    return np.maximum.accumulate(mean - half, -1), np.minimum.accumulate(mean + half, -1)


def p_zero(differences: Any, g: float = EFFECT_VARIANCE) -> Any:
    """The any-time p-value of "no difference": 1 over the largest e so far, at most 1."""
    return _p(log_e(*moments(differences), 0.0, g))


def p_equal(differences: Any, margin: float, g: float = EFFECT_VARIANCE) -> Any:
    """The any-time p-value of "the difference is `margin` or more": the smallest alpha whose intersection lies within
    the margin."""
    return _p_equal(moments(differences), margin, g)


def _p_equal(found: tuple[Any, Any, Any], margin: float, g: float) -> Any:
    _, mean, _ = found
    below = np.where(mean > -margin, log_e(*found, -margin, g), 0.0)
    above = np.where(mean < margin, log_e(*found, margin, g), 0.0)
    return np.maximum(_p(below), _p(above))


def _p(logs: Any) -> Any:
    return np.exp(-np.maximum.accumulate(np.maximum(logs, 0.0), -1))


@dataclass(frozen=True)
class Look:
    """What the any-time rule says of all differences so far: `low` and `high` may be infinite or, where intervals
    contradict each other, the wrong way round; `p` of no difference, and the sign of the mean where that was
    smallest; `p_equal` of the margin, None without one."""

    low: float
    high: float
    p: float
    sign: float
    p_equal: float | None


def look(
    differences: Sequence[float], level: float, margin: float | None = None, sizes: Sequence[float] | float = 0.0
) -> Look | None:
    """The rule after all of the differences, of numbers of these `sizes`; None for fewer than two."""
    if len(differences) < 2:
        return None
    found = moments(differences, sizes)
    low, high = _intersection(found, 1 - level, EFFECT_VARIANCE)
    logs = log_e(*found)
    sign = np.sign(found[1][np.argmax(logs)])
    equal = None if margin is None else float(_p_equal(found, margin, EFFECT_VARIANCE)[-1])
    return Look(float(low[-1]), float(high[-1]), float(_p(logs)[-1]), float(sign), equal)
