"""Numbers for people: a unit that suits the column, as many digits as the uncertainty justifies, ratios in words.

Files for programs hold every digit in the units of result.json.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from softmoe_cli.compare.intervals import Difference, Interval
from softmoe_cli.run.rows import QUALITIES, RESULT
from softmoe_cli.text import FLOP, four_digits

BYTES = (("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40))
SECONDS = (("s", 1.0), ("h", 3600.0))
SCALES = {name: scale for scale in (FLOP, BYTES, SECONDS) for name, _ in scale}
"""Units that people read in several sizes."""


@dataclass(frozen=True)
class Unit:
    """A figure's name with the chosen unit, the unit alone, and the factor from result.json's unit to the chosen
    one."""

    head: str
    name: str
    factor: float


def unit(key: str, values: Iterable[float]) -> Unit:
    """The largest unit that is not above the smallest value; if the values span more than a factor of ten thousand, the
    largest unit that is not above their geometric mean."""
    own = RESULT[key].unit if key in RESULT else ""
    if own not in SCALES:
        return Unit(titled(key), "", 1.0)
    scale = SCALES[own]
    sizes = dict(scale)
    positive = [value * sizes[own] for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (sizes[own], sizes[own])
    bound = math.sqrt(low) * math.sqrt(high) if high > 1e4 * low else low
    name, size = max((each for each in scale if each[1] <= bound), key=lambda each: each[1], default=scale[0])
    before, _, after = RESULT[key].title.rpartition(own)
    return Unit(f"{before}{name}{after}", name, sizes[own] / size)


def titled(key: str) -> str:
    """What tables call a key of a result."""
    return (RESULT[key].title or key) if key in RESULT else key


def quantity(key: str, value: float) -> str:
    """One figure with its unit: 392.4 GFLOP"""
    chosen = unit(key, [value])
    return f"{figure(key, value * chosen.factor)} {chosen.name or RESULT[key].amount}"


def figure(key: str, value: float) -> str:
    """A quality gets two digits after the point if it is a share, else four; a cost gets four digits in all."""
    if key in QUALITIES:
        return f"{value:.2f}" if key.endswith("_pct") else f"{value:.4f}"
    return four_digits(value)


def cell(key: str, interval: Interval | None, factor: float = 1.0, *, signed: bool = False) -> str:
    """`96.47 ± 0.80`, `305 ± 140`; a spread that is zero or unknown is not shown.

    A cost's half interval has two significant digits, and its mean is rounded to the same place (at most to units). A
    half interval below the mean's sixth digit counts as zero.
    """
    if interval is None:
        return ""
    mean, sign = interval.mean * factor, "+" if signed and interval.mean > 0 else ""
    half = 0.0 if interval.high is None else (interval.high - interval.mean) * factor
    if key in QUALITIES:
        return f"{sign}{figure(key, mean)}" + (f" ± {figure(key, half)}" if half else "")
    if half <= abs(mean) * 1e-6 or half == 0:
        return f"{sign}{figure(key, mean)}"
    half = float(f"{half:.1e}")
    places = max(0, 1 - math.floor(math.log10(half)))
    return f"{sign}{mean:,.{places}f} ± {half:,.{places}f}"


def difference_cell(key: str, found: Difference | None) -> str:
    """`+1.20 ± 0.80`; by the any-time rule, whose intervals do not lie about their mean, `+1.20 (0.40 to 2.10)`."""
    if found is None or found.method != "any-time":
        return cell(key, found.interval if found else None, signed=True)
    interval = found.interval
    mean = cell(key, Interval(interval.mean, None, None, interval.n), signed=True)
    return f"{mean} ({ends(key, interval)})" if ends(key, interval) else mean


def ends(key: str, interval: Interval) -> str:
    """`0.40 to 2.10`; empty where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    return f"{figure(key, interval.low)} to {figure(key, interval.high)}"


def chance_cell(interval: Interval | None) -> str:
    """`93% (41% to >99%)`"""
    if interval is None:
        return ""
    mean, low, high = (None if end is None else _percent(end) for end in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})" if low and high and len({mean, low, high}) > 1 else f"{mean}"


def _percent(share: float) -> str:
    rounded = round(100 * share)
    return {0: "<1%", 100: ">99%"}.get(rounded, f"{rounded}%")


def points(key: str) -> str:
    """What stands behind a difference of qualities."""
    return " points" if key.endswith("_pct") else ""


def apart(ratio: float, amount: str) -> str:
    """`19% fewer training FLOPs`, from the ratio to the baseline's amount; empty if the two differ by less than half a
    percent."""
    percent = round(100 * abs(ratio - 1))
    if percent == 0:
        return ""
    if ratio >= 2 or percent == 100:  # 100% fewer would be none
        return f"{ratio:.3g} times the {amount}"
    less = "fewer" if amount.endswith("s") else "less"
    return f"{percent}% {'more' if ratio > 1 else less} {amount}"


def measure_name(quality: str) -> str:
    """A quality's name without its unit."""
    return QUALITIES[quality].title.removesuffix(", %")
