"""Fits a law to runs: robust least squares on logarithms from many starts, and a bootstrap of the fit.

The papers minimise the same function, the sum of Huber's loss of log L_law - log L_run, with L-BFGS from a grid of
starts (Hoffmann et al., 2022; Yun et al., 2024, appendix D). Here it is scipy's trust-region method with the exact
Jacobian, which needs a fraction of the time and ends at the optimum from nearly every start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import qmc

from softmoe_cli.errors import UsageError
from softmoe_cli.scaling.forms import EXPERTS_NEED, FORMS, Form, held_at
from softmoe_cli.scaling.laws import Number

DELTA = 1e-3
"""The least Huber delta there is, and the papers' own."""
WIDE_DELTA, FIRST_STARTS = 0.1, 4
"""Of the fit whose residuals give a delta where no seed is repeated."""
STARTS = 16
SAME = 0.01
"""Starts that end within this share of the best one agree with it."""


class Unidentified(UsageError):
    """The runs do not identify a law; the message says what is missing."""


@dataclass(frozen=True)
class Points:
    """Finished runs as a law sees them; every array has an entry for each run.

    Attributes:
        sizes: N, D, E and so on, by name.
        loss: in nats, or an error as a share of 1 if `share`.
        config: which configuration a run is of: runs of one differ in their seed only.
        seed: of the run.
        size: which size of model a run has: runs of one are held out together.
        cost: of its training, in any unit: by it the largest runs are held out.
        share: whether `loss` is an error share; residuals are then of its logit.
        images: with `share`, how many images the error is a share of, and so how sure it is; 0 where nobody says.
        chance: with `share`, the error of guessing; 0 where nobody says.
    """

    sizes: Mapping[str, np.ndarray]
    loss: np.ndarray
    config: np.ndarray
    seed: np.ndarray
    size: np.ndarray
    cost: np.ndarray
    share: bool = False
    images: int = 0
    chance: float = 0.0

    def taken(self, rows: np.ndarray) -> "Points":
        """The runs of these indices, or of this mask."""
        sizes = {name: values[rows] for name, values in self.sizes.items()}
        return replace(
            self, sizes=sizes, loss=self.loss[rows], config=self.config[rows], seed=self.seed[rows],
            size=self.size[rows], cost=self.cost[rows],
        )  # fmt: skip

    def means(self) -> "Points":
        """A point for each configuration: the mean of its runs on the scale of the residuals."""
        kept, of = np.unique(self.config, return_index=True)[1], self.scale(self.loss)
        mean = np.array([of[self.config == self.config[row]].mean() for row in kept])
        return replace(self.taken(kept), loss=self.back(mean))

    def scale(self, loss: Number) -> Number:
        """Where residuals are differences: log L, or the logit of an error share."""
        return np.log(loss) - np.log(1 - loss) if self.share else np.log(loss)

    def back(self, scaled: Number) -> Number:
        """The loss, or the error share, of what `scale` gives."""
        return 1 / (1 + np.exp(-scaled)) if self.share else np.exp(scaled)

    @property
    def weights(self) -> np.ndarray:
        """What residuals are multiplied by: the binomial standard error of an error share, else 1."""
        if not (self.share and self.images):
            return np.ones(len(self.loss))
        return np.sqrt(self.images * self.loss * (1 - self.loss)) / math.sqrt(self.images / 4)


@dataclass(frozen=True)
class LawFit:
    """A law that was fitted.

    Attributes:
        form: the law.
        free: the free numbers.
        centre: means of the logarithms of the sizes, which `free` is relative to.
        delta: Huber's.
        cost: the sum that was minimised.
        starts, agree: how many searches there were, and how many ended within 1% of the best.
        runs: how many the fit is to.
    """

    form: Form
    free: np.ndarray
    names: tuple[str, ...]
    centre: Mapping[str, float]
    delta: float
    cost: float
    starts: int
    agree: int
    runs: int

    def coefficients(self, free: Number = None) -> dict[str, Number]:
        """The law's own coefficients, of these free numbers or of the fit's; where nothing saturates E_max may be
        beyond what a float holds, which is infinity."""
        values = self.free if free is None else free
        with np.errstate(over="ignore"):
            return self.form.coefficients(dict(zip(self.names, values, strict=True)), self.centre)

    def predict(self, sizes: Mapping[str, Number], free: Number = None) -> Number:
        """What the law says of sizes."""
        return self.form.law.of(*(sizes[name] for name in self.form.law.sizes), **self.coefficients(free))

    @property
    def aicc(self) -> float:
        """Akaike's criterion, corrected for few runs (Hurvich and Tsai, Regression and time series model selection in
        small samples, 1989), of the robust sum of squares; infinite with too few runs for it."""
        k, n = len(self.free) + 1, self.runs
        if n - k - 1 <= 0:
            return math.inf
        return n * math.log(max(2 * self.cost / n, 1e-30)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def seed_scatter(points: Points) -> float:
    """Standard deviation of log L between runs of one configuration, pooled robustly; 0 where no seed is repeated."""
    deviations = []
    of = points.scale(points.loss)
    for config in np.unique(points.config):
        mine = of[points.config == config]
        if len(mine) > 1:
            deviations += list((mine - mine.mean()) * math.sqrt(len(mine) / (len(mine) - 1)))
    return 1.4826 * float(np.median(np.abs(deviations))) if deviations else 0.0


def auto_delta(points: Points) -> float:
    """Huber's delta: 1.345 standard deviations of the seeds (Huber, Robust Estimation of a Location Parameter, 1964),
    with which normal noise costs 5% of the sureness of least squares. 0 where no seed is repeated."""
    scatter = seed_scatter(points)
    return max(DELTA, 1.345 * scatter) if scatter else 0.0


def residual_delta(form: Form, points: Points) -> float:
    """The same from what a first fit leaves, which holds the law's own error too."""
    first = fit_law(form, points, delta=WIDE_DELTA, starts=FIRST_STARTS)
    apart = np.asarray(points.scale(first.predict(points.sizes)) - points.scale(points.loss), dtype=float)
    return max(DELTA, 1.345 * 1.4826 * float(np.median(np.abs(apart))))


def one_delta(forms: Sequence[Form], points: Points) -> float:
    """One Huber delta for several laws, as Akaike's criteria of fits with different ones cannot be compared: that of
    the seeds; where none is repeated, that of the law which leaves least."""
    return auto_delta(points) or min(residual_delta(form, points) for form in forms)


def missing(form: Form, points: Points) -> str:
    """What runs lack for a law to be identified, in one sentence; empty if they have it."""
    name = form.law.name
    if not np.all(np.isfinite(points.loss)) or not np.all(points.loss > 0):
        bad = int(np.sum(~(np.isfinite(points.loss) & (points.loss > 0))))
        return f"{name} needs losses above 0, and {bad} of {len(points.loss)} runs have none"
    if points.share and not np.all(points.loss < 1):
        return f"{name} needs errors below 100%, and a run has none"
    if points.share and not form.shares:
        return f"{name} is a law of a loss: an error is not held between 0 and what guessing has"
    lacking = [size for size in form.law.sizes if size not in points.sizes]
    if lacking:
        return f"{name} needs {' and '.join(lacking)}, which these runs do not tell"
    for size in form.single:
        found = len(np.unique(points.sizes.get(size, np.ones(1))))
        if found > 1:
            return f"{name} knows no {size}, and the runs have {found} values of it"
    for size, least in form.least.items():
        found = len(np.unique(points.sizes[size]))
        if found < least:
            values = "value" if found == 1 else "values"
            return f"{name} needs {least} values of {size}, and the runs have {found} {values}"
    varying = [size for size in form.least if size not in form.single]
    table = np.stack([np.log(1 - points.sizes[s] if s == "S" else points.sizes[s]) for s in varying], axis=1)
    spread = np.linalg.svd((table - table.mean(axis=0)) / table.std(axis=0), compute_uv=False)
    if spread[-1] < 1e-6 * spread[0]:
        return f"{name} needs {' and '.join(varying)} that vary apart: in these runs they grow together"
    configs, free = len(np.unique(points.config)), len(free_names(form, points))
    if configs <= free:
        return f"{name} has {free} free numbers, and there are {configs} configurations: it needs more than that many"
    return ""


def free_names(form: Form, points: Points) -> tuple[str, ...]:
    """The free numbers that these runs decide: E_start and E_max are none of them with few numbers of experts."""
    experts = len(np.unique(points.sizes.get("E", np.ones(1))))
    return tuple(name for name in form.box if experts >= EXPERTS_NEED.get(name, 0))


def fit_law(
    form: Form, points: Points, *, delta: float | None = None, starts: int = STARTS, near: LawFit | None = None
) -> LawFit:
    """The law with the least Huber loss.

    Args:
        form: the law.
        points: the runs.
        delta: Huber's; None: `auto_delta`.
        starts: how many searches; where they begin depends on the law and the runs only.
        near: a fit of the law to other runs, where one more search begins.

    Raises:
        Unidentified: the runs do not identify the law.
    """
    lack = missing(form, points)
    if lack:
        raise Unidentified(lack)
    names = free_names(form, points)
    sizes = form.law.sizes
    same = near if near is not None and near.names == names else None
    centre = {s: float(np.mean(np.log(points.sizes[s]))) for s in sizes if s != "S"}
    if same is not None:
        centre = dict(same.centre)
    delta = delta or auto_delta(points) or residual_delta(form, points)
    blank = LawFit(form, np.zeros(len(names)), names, centre, delta, math.inf, 0, 0, len(points.loss))
    level = float(np.mean(np.log(points.loss)))
    low, high = np.array([form.box[name] for name in names]).T
    offset = np.array([level if name in form.scaled else 0.0 for name in names])
    begins = list(
        low + offset + (high - low) * qmc.Sobol(len(names), rng=np.random.default_rng(0)).random(_power(starts))
    )
    begins = begins[:starts]
    if same is not None:
        begins.append(same.free)
    found = [_search(blank, points, begin, tolerance=1e-8, most=100) for begin in begins]
    rough = min(found, key=lambda each: each.cost)
    best = _search(blank, points, rough.free)
    floor = 1e-9 * blank.delta**2 * len(points.loss)  # below it, costs are rounding
    agree = sum(each.cost <= rough.cost * (1 + SAME) + floor for each in found)
    return replace(best, starts=len(found), agree=agree)


def _power(count: int) -> int:
    """Sobol points come in powers of two."""
    return 1 << max(0, count - 1).bit_length()


def _search(blank: LawFit, points: Points, begin: np.ndarray, *, tolerance: float = 1e-13, most: int = 400) -> LawFit:
    """One search, from one start."""
    goal, weights = points.scale(points.loss), points.weights
    sizes = {name: points.sizes[name] for name in blank.form.law.sizes}
    steps = 1e-30j * np.eye(len(begin))[:, :, None]

    def residuals(free: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            loss = blank.predict(sizes, free)
            apart = weights * (points.scale(loss) - goal)
        return np.where(np.isfinite(apart), apart, 1e6)

    def jacobian(free: np.ndarray) -> np.ndarray:
        """Exact: the imaginary part of a complex step so small that its square vanishes (Squire and Trapp, Using
        Complex Variables to Estimate Derivatives of Real Functions, 1998)."""
        with np.errstate(all="ignore"):  # all columns at once: (numbers, numbers, 1) gives losses (numbers, runs)
            losses = blank.predict(sizes, free[:, None, None] + steps)
            table = (weights * points.scale(losses).imag / 1e-30).T
        return np.where(np.isfinite(table), table, 0.0)

    answer = least_squares(
        residuals, begin, jac=jacobian, method="trf", loss="huber", f_scale=blank.delta, x_scale="jac",
        ftol=tolerance, xtol=tolerance, gtol=tolerance, max_nfev=most,
    )  # fmt: skip
    return replace(blank, free=answer.x, cost=float(answer.cost))


def bootstrap(fit: LawFit, points: Points, draws: int, seed: int = 0) -> np.ndarray:
    """Free numbers (draws, numbers) of fits to runs drawn anew: configurations first, because runs of one share what
    the law gets wrong about it, and seeds inside them (Davison and Hinkley, Bootstrap Methods and their Application,
    1997, section 3.8). Each search begins at the fit."""
    random = np.random.default_rng(seed)
    members = [np.flatnonzero(points.config == config) for config in np.unique(points.config)]
    found = []
    for _ in range(draws):
        chosen = random.integers(len(members), size=len(members))
        rows = np.concatenate([random.choice(members[config], len(members[config])) for config in chosen])
        found.append(_search(fit, points.taken(rows), fit.free, tolerance=1e-8, most=60).free)
    return np.array(found)


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The ends of the 95% interval of draws along the first axis; those that are no number are left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return math.nan, math.nan
    low, high = np.percentile(kept, [2.5, 97.5])
    return float(low), float(high)


TOO_WIDE = 100.0
"""A coefficient whose interval spans a factor of more than this, or ends at zero, is not identified."""


def intervals(fit: LawFit, drawn: np.ndarray) -> dict[str, tuple[float, float, bool]]:
    """Of each coefficient: the ends of its 95% interval, and whether the runs identify it."""
    tables = [fit.coefficients(free) for free in drawn]
    found = {}
    for name in fit.form.law.coefficients:
        low, high = percentiles(np.array([table[name] for table in tables], dtype=float))
        known = math.isfinite(low) and math.isfinite(high)
        if known and low >= 0:
            known = low > 0 and high / low <= TOO_WIDE
        elif known and high <= 0:
            known = high < 0 and low / high <= TOO_WIDE
        found[name] = (low, high, known)
    return found


def identified(points: Points, names: Sequence[str] = ()) -> tuple[list[Form], list[str]]:
    """The laws (of these names, or all) that the runs identify, and what is missing for each of the others."""
    forms = [FORMS[name] for name in names or FORMS]
    if points.share and points.chance:
        forms = [held_at(points.chance) if form.shares else form for form in forms]
    lacks = {form.law.name: missing(form, points) for form in forms}
    return [form for form in forms if not lacks[form.law.name]], [lack for lack in lacks.values() if lack]
