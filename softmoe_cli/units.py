"""Figures for people: the unit that suits a column, as many digits as its uncertainty leaves, more or less in words.

Files for programs hold every digit in the units of result.json.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from softmoe_cli.intervals import Interval
from softmoe_cli.runs import COSTS, QUALITIES

FLOP = (("FLOP", 1.0), ("kFLOP", 1e3), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15),
        ("EFLOP", 1e18))  # fmt: skip
BYTES = (("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40))
SECONDS = (("s", 1.0), ("h", 3600.0))
SCALES = {
    "train_pflop": (FLOP, "PFLOP"), "forward_gflop": (FLOP, "GFLOP"), "train_gflop": (FLOP, "GFLOP"),
    "peak_mib": (BYTES, "MiB"), "device_s": (SECONDS, "s"), "eval_s": (SECONDS, "s"), "save_s": (SECONDS, "s"),
    "compile_s": (SECONDS, "s"),
}  # fmt: skip
"""Figures that people read in several units, and the one that result.json has."""
AMOUNTS = {
    "train_pflop": "training FLOPs", "device_s": "training time", "forward_gflop": "forward FLOPs",
    "train_gflop": "training FLOPs an image", "params_m": "parameters", "active_params_m": "active parameters",
    "peak_mib": "peak memory", "images": "training images", "epochs": "epochs", "steps": "updates",
    "eval_s": "evaluation time", "save_s": "saving time", "compile_s": "compilation time", "energy_kj": "energy",
}  # fmt: skip
"""What costs are amounts of."""


@dataclass(frozen=True)
class Unit:
    """A figure's name with the unit that was chosen, the unit alone, and how many of it one of result.json's is."""

    head: str
    name: str
    factor: float


def unit(key: str, values: Iterable[float]) -> Unit:
    """The largest unit that is not above the smallest value; where the largest is more than ten thousand times that,
    not above their geometric mean."""
    if key not in SCALES:
        head = COSTS.get(key) or (QUALITIES[key].head if key in QUALITIES else key)
        return Unit(head, "", 1.0)
    scale, own = SCALES[key]
    sizes = dict(scale)
    positive = [value * sizes[own] for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (sizes[own], sizes[own])
    bound = math.sqrt(low) * math.sqrt(high) if high > 1e4 * low else low
    name, size = max((each for each in scale if each[1] <= bound), key=lambda each: each[1], default=scale[0])
    before, _, after = COSTS[key].rpartition(own)
    return Unit(f"{before}{name}{after}", name, sizes[own] / size)


def quantity(key: str, value: float) -> str:
    """One figure with its unit: 392.4 GFLOP"""
    chosen = unit(key, [value])
    return f"{figure(key, value * chosen.factor)} {chosen.name or AMOUNTS.get(key, key)}"


def figure(key: str, value: float) -> str:
    """Of a quality two digits after the point where it is a share, else four; of a cost four digits in all."""
    if key in QUALITIES:
        return f"{value:.2f}" if key.endswith("_pct") else f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cell(key: str, interval: Interval | None, factor: float = 1.0, *, signed: bool = False) -> str:
    """`96.47 ± 0.80`, `305 ± 140`; a spread of nothing is not shown, an unknown one neither.

    A cost's half interval has two digits that count, and its mean ends where they do (at the units at the latest); one
    that is below the mean's sixth digit is a spread of nothing.
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


def apart(ratio: float, amount: str) -> str:
    """`19% fewer training FLOPs`, of a ratio to what is compared with; empty within half a percent."""
    percent = round(100 * abs(ratio - 1))
    if percent == 0:
        return ""
    if ratio >= 2:
        return f"{ratio:.3g} times the {amount}"
    less = "fewer" if amount.endswith("s") else "less"
    return f"{percent}% {'more' if ratio > 1 else less} {amount}"
