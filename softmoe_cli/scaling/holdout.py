"""How far a law is off where it was not fitted, beside predictors that need no law.

Errors are root mean squares over configurations, of the logarithm of the loss (of the logit of an error share): 0.01 is
1% of the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softmoe_cli.scaling.fit import STARTS, LawFit, Points, Unidentified, fit_law, missing
from softmoe_cli.scaling.forms import Form

SHARE = 0.2
"""Of the configurations, the dearest ones, which are held out."""
NEAREST = 3
FEW_STARTS = 3
"""Searches of a fit that is made again without some runs: one of them begins at the fit to all."""
DISTANCES = ("N", "D", "E", "S", "G", "C")
"""Sizes in which neighbours are near, as far as they vary."""


@dataclass(frozen=True)
class Tested:
    """A law on these runs.

    Attributes:
        fit: to all of them.
        largest: its error on the dearest fifth when fitted to the others; None with the reason in `lacks`.
        by_size: its error on each size when fitted to the others, over all sizes; None likewise.
        held: predictions (configurations) of the fit without the dearest fifth, for figures.
    """

    fit: LawFit
    largest: float | None
    by_size: float | None
    held: np.ndarray
    lacks: str

    @property
    def name(self) -> str:
        return self.fit.form.law.name


def dearest(points: Points, share: float = SHARE) -> np.ndarray:
    """The mask of the runs of the configurations that cost the most."""
    configs = np.unique(points.config)
    cost = np.array([points.cost[points.config == config].mean() for config in configs])
    count = max(1, math.ceil(share * len(configs)))
    held = configs[np.argsort(cost, kind="stable")[len(configs) - count :]]
    return np.isin(points.config, held)


def apart_by(form: Form, points: Points, held: np.ndarray, fit: LawFit) -> tuple[np.ndarray, np.ndarray]:
    """Differences on the residuals' scale, and predictions, of the held-out configurations by a fit to the others.

    Raises:
        Unidentified: the others do not identify the law.
    """
    lack = missing(form, points.taken(~held))
    if lack:
        raise Unidentified(f"without what is held out, {lack}")
    rest = fit_law(form, points.taken(~held), delta=fit.delta, starts=FEW_STARTS, near=fit)
    means = points.taken(held).means()
    predicted = rest.predict(means.sizes)
    return np.asarray(points.scale(predicted) - points.scale(means.loss), dtype=float), predicted


def rms(apart: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(apart))))


def trial(form: Form, points: Points, delta: float | None = None, starts: int = STARTS) -> Tested:
    """Fits a law to all runs, and without the dearest, and without each size in turn."""
    fit = fit_law(form, points, delta=delta, starts=starts)
    lacks, largest, by_size, held = "", None, None, np.array([])
    try:
        apart, held = apart_by(form, points, dearest(points), fit)
        largest = rms(apart)
    except Unidentified as error:
        lacks = str(error)
    parts = []
    try:
        for size in np.unique(points.size):
            parts.append(apart_by(form, points, points.size == size, fit)[0])
        by_size = rms(np.concatenate(parts))
    except Unidentified as error:
        lacks = lacks or str(error)
    return Tested(fit, largest, by_size, held, lacks)


def last_value(points: Points, held: np.ndarray) -> np.ndarray:
    """What the dearest configuration of the others reached, of as many experts where there is one: the prediction that
    nothing changes any more. Differences as `apart_by` gives them."""
    known, wanted = points.taken(~held).means(), points.taken(held).means()
    experts = [np.asarray(p.sizes.get("E", np.ones(len(p.loss)))) for p in (known, wanted)]
    told = []
    for e in experts[1]:
        alike = np.flatnonzero(experts[0] == e)
        rows = alike if len(alike) else np.arange(len(known.loss))
        told.append(known.loss[rows[np.argmax(known.cost[rows])]])
    return np.asarray(points.scale(np.array(told)) - points.scale(wanted.loss))


def neighbours(points: Points, held: np.ndarray) -> np.ndarray:
    """The mean of the three nearest of the others, by standardised logarithms of sizes."""
    known, wanted = points.taken(~held).means(), points.taken(held).means()
    names = [name for name in DISTANCES if name in points.sizes and len(np.unique(points.sizes[name])) > 1]
    tables = [np.stack([_log(name, p.sizes[name]) for name in names], axis=1) for p in (known, wanted)]
    spread = tables[0].std(axis=0)
    spread[spread == 0] = 1.0
    off = np.linalg.norm((tables[1][:, None] - tables[0][None]) / spread, axis=2)
    nearest = np.argsort(off, axis=1, kind="stable")[:, :NEAREST]
    told = points.scale(known.loss)[nearest].mean(axis=1)
    return np.asarray(told - points.scale(wanted.loss))


def _log(name: str, values: np.ndarray) -> np.ndarray:
    return np.log(1 - values if name == "S" else values)


TRIVIAL = {"last value": last_value, "mean of 3 neighbours": neighbours}
"""Predictors that a law must beat."""


def trivial_errors(points: Points) -> dict[str, float]:
    """Their errors on the dearest fifth."""
    held = dearest(points)
    return {name: rms(predict(points, held)) for name, predict in TRIVIAL.items()}


def ranked(trials: Sequence[Tested]) -> list[Tested]:
    """The laws, the least error on the dearest runs first; those that have none last, by Akaike's criterion."""
    return sorted(trials, key=lambda each: (each.largest is None, each.largest or 0.0, each.fit.aicc, each.name))


EXPERTS_IN = ("E", "S", "G")


def verdict(trials: Sequence[Tested], trivial: dict[str, float]) -> dict[str, str]:
    """Why a law may not decide, by name; empty where it may: it must beat the trivial predictors, and a law of experts
    also the laws without them."""
    plain = [each.largest for each in trials if each.largest is not None and not _of_experts(each)]
    found = {}
    for each in trials:
        if each.largest is None:
            found[each.name] = each.lacks
            continue
        better = [name for name, error in trivial.items() if error <= each.largest]
        if better:
            found[each.name] = f"no better than the {better[0]}"
        elif _of_experts(each) and plain and min(plain) < each.largest:
            found[each.name] = "no better than a law without experts"
        else:
            found[each.name] = ""
    return found


def _of_experts(each: Tested) -> bool:
    return any(size in EXPERTS_IN for size in each.fit.form.law.sizes)
