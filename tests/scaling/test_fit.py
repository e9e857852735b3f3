"""Fits: planted laws come back, and what must not change a fit does not."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.optimize import least_squares

from softmoe_cli.errors import UsageError
from softmoe_cli.scaling.fit import (
    Points,
    auto_delta,
    bootstrap,
    fit_law,
    identified,
    intervals,
    missing,
    percentiles,
    seed_scatter,
)
from softmoe_cli.scaling.forms import FORMS, held_at
from softmoe_cli.scaling.holdout import dearest, last_value, neighbours, ranked, rms, trial, trivial_errors, verdict
from softmoe_cli.scaling.laws import chance_held
from tests.scaling.made_up import PLANTED, VALUES, beyond, points

CHEAP = ("chinchilla", "routed_bilinear", "saturating_compute")
LAWS_TRIED = [pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.thorough]) for name in FORMS]


@pytest.mark.parametrize("name", LAWS_TRIED)
def test_a_planted_law_comes_back(name: str) -> None:
    """Without noise: beyond the runs to 1e-6, and every coefficient to 1e-3."""
    fit = fit_law(FORMS[name], points(name), starts=16)
    want = FORMS[name].law.of(*beyond(name).values(), **PLANTED[name])
    np.testing.assert_allclose(fit.predict(beyond(name)), want, rtol=1e-6)
    for key, value in fit.coefficients().items():
        assert value == pytest.approx(PLANTED[name][key], rel=1e-3), key
    assert fit.agree >= 1


@pytest.mark.thorough
def test_intervals_hold_the_truth() -> None:
    """Seed noise of 0.5%: each coefficient lies in its 95% interval in nine of ten of 100 studies."""
    inside = dict.fromkeys(PLANTED["chinchilla"], 0)
    for random in range(100):
        runs = points("chinchilla", noise=0.005, seeds=3, random=random)
        fit = fit_law(FORMS["chinchilla"], runs, starts=2)
        for key, (low, high, _) in intervals(fit, bootstrap(fit, runs, 80, seed=random)).items():
            inside[key] += low <= PLANTED["chinchilla"][key] <= high
    assert min(inside.values()) >= 90, inside


def test_intervals_are_of_the_draws() -> None:
    runs = points("chinchilla", noise=0.005, seeds=2)
    fit = fit_law(FORMS["chinchilla"], runs, starts=2)
    drawn = bootstrap(fit, runs, 8)
    assert drawn.shape == (8, 5) and len(np.unique(drawn, axis=0)) == 8
    np.testing.assert_array_equal(drawn, bootstrap(fit, runs, 8))
    alphas = np.array([fit.coefficients(free)["alpha"] for free in drawn])
    low, high, known = intervals(fit, drawn)["alpha"]
    assert (low, high) == percentiles(alphas) and known and alphas.min() <= low < high <= alphas.max()


UNITS = {"N": 1e-6, "N_act": 1e-6, "N_total": 1e-6, "D": 1e-3, "C": 1e3}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in CHEAP else [pytest.mark.thorough])
                                  for name in FORMS if name != "inference_optimal"])  # fmt: skip
def test_units_do_not_matter(name: str) -> None:
    """With parameters in millions and images in thousands the predictions are the same."""
    runs = points(name, noise=0.002)
    scaled = {key: values * UNITS.get(key, 1.0) for key, values in runs.sizes.items()}
    if name == "data_constrained":
        scaled["U"] = runs.sizes["U"] * 1e-3
    a, b = (fit_law(FORMS[name], each, starts=8) for each in (runs, dataclasses.replace(runs, sizes=scaled)))
    np.testing.assert_allclose(a.predict(runs.sizes), b.predict(scaled), rtol=1e-5)
    assert a.cost == pytest.approx(b.cost, rel=1e-6)


@pytest.mark.thorough
def test_the_unit_matters_to_the_law_whose_interaction_is_not_free_of_it() -> None:
    """Yun et al.'s: in millions, d log N log e changes sign where N is one million, and no coefficient makes up."""
    runs = points("inference_optimal", d=-0.02)
    scaled = dataclasses.replace(runs, sizes={**runs.sizes, "N": runs.sizes["N"] * 1e-6})
    a, b = (fit_law(FORMS["inference_optimal"], each, starts=8) for each in (runs, scaled))
    assert a.cost < 1e-12 < 1e-6 < b.cost


def squared(runs: Points) -> np.ndarray:
    """Predictions of chinchilla's law by plain least squares, from the planted coefficients."""
    form = FORMS["chinchilla"]
    fit = fit_law(form, runs, starts=2)
    free = least_squares(lambda x: np.log(fit.predict(runs.sizes, x)) - np.log(runs.loss), fit.free).x
    return fit.predict(beyond("chinchilla"), free)


def test_one_wrong_run_moves_little() -> None:
    """A loss twice as high: under 1% of the predictions; least squares, which is not robust, moves by more."""
    runs = points("chinchilla", noise=0.002, seeds=2)
    wrong = runs.loss.copy()
    wrong[np.argmax(runs.cost)] *= 2
    hurt = dataclasses.replace(runs, loss=wrong)
    before, after = (
        fit_law(FORMS["chinchilla"], each, starts=4).predict(beyond("chinchilla")) for each in (runs, hurt)
    )
    assert abs(after / before - 1)[0] < 0.01
    assert abs(squared(hurt) / squared(runs) - 1)[0] > 0.01


def test_order_and_doubles_do_not_matter() -> None:
    runs = points("chinchilla", noise=0.004, seeds=2)
    fit = fit_law(FORMS["chinchilla"], runs, delta=0.005, starts=2)
    order = np.random.default_rng(0).permutation(len(runs.loss))
    mixed = fit_law(FORMS["chinchilla"], runs.taken(order), delta=0.005, starts=2)
    np.testing.assert_allclose(mixed.free, fit.free, rtol=1e-6)
    twice = fit_law(FORMS["chinchilla"], runs.taken(np.tile(np.arange(len(runs.loss)), 2)), delta=0.005, starts=2)
    np.testing.assert_allclose(twice.free, fit.free, rtol=1e-6)
    assert twice.cost == pytest.approx(2 * fit.cost, rel=1e-9)


def test_the_jacobian_is_exact() -> None:
    """The minimum is one for least_squares with numeric derivatives too, which gets no lower."""
    runs = points("chinchilla", noise=0.004)
    fit = fit_law(FORMS["chinchilla"], runs, delta=0.005, starts=4)

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(fit.predict(runs.sizes, x)) - np.log(runs.loss)

    other = least_squares(residuals, fit.free, loss="huber", f_scale=0.005, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    assert other.cost >= fit.cost * (1 - 1e-9)


def test_seed_scatter_is_that_of_the_seeds() -> None:
    assert seed_scatter(points("chinchilla")) == 0 and auto_delta(points("chinchilla")) == 0
    noisy = points("chinchilla", noise=0.02, seeds=200)
    assert seed_scatter(noisy) == pytest.approx(0.02, rel=0.05)
    assert auto_delta(noisy) == pytest.approx(1.345 * seed_scatter(noisy))


def test_an_error_is_held_at_that_of_guessing() -> None:
    """An error share is fitted on its logit, with d from the chance level."""
    compute = np.array(VALUES["C"])
    error = chance_held(compute, a=0.1, b=0.4, c=0.08, chance=0.9)
    plain = np.arange(len(compute))
    runs = Points({"C": compute}, error, plain, plain * 0, plain, compute, share=True, images=5000, chance=0.9)
    (form,), lacks = identified(runs)
    assert form.law.name == "saturating_compute" and any("law of a loss" in lack for lack in lacks)
    fit = fit_law(form, runs, starts=8)
    told = fit.coefficients()
    assert (told["b"], told["c"]) == pytest.approx((0.4, 0.08), rel=1e-4)
    assert fit.predict({"C": np.array([0.0])})[0] == pytest.approx(0.9, rel=1e-9)
    assert held_at(0.5).shares


DEGENERATE: dict[str, tuple[dict[str, Sequence[float]], str]] = {
    "two sizes": ({"N": (1e4, 1e6)}, "chinchilla needs 3 values of N, and the runs have 2 values"),
    "one number of images": ({"D": (1e5,)}, "chinchilla needs 3 values of D, and the runs have 1 value"),
    "one E": ({"E": (4,)}, "inference_optimal needs 3 values of E, and the runs have 1 value"),
    "too few": ({"N": (1e4, 1e5, 1e6), "D": (1e5, 2e5, 4e5), "E": (1, 4, 16)}, ""),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_what_runs_lack_is_said_in_one_sentence(case: str) -> None:
    values, want = DEGENERATE[case]
    name = (want or "inference_optimal").split()[0]
    runs = points(name, values={**VALUES, **values})
    assert missing(FORMS[name], runs) == want
    if want:
        with pytest.raises(UsageError, match=want):
            fit_law(FORMS[name], runs)


def test_other_lacks() -> None:
    runs = points("chinchilla")
    bad = dataclasses.replace(runs, loss=np.where(np.arange(len(runs.loss)) == 3, math.nan, runs.loss))
    assert missing(FORMS["chinchilla"], bad) == "chinchilla needs losses above 0, and 1 of 20 runs have none"
    ray = runs.taken(np.isclose(runs.sizes["D"], 5 * runs.sizes["N"]) | np.isclose(runs.sizes["D"], 1e5))
    one = dataclasses.replace(ray, sizes={"N": ray.sizes["N"], "D": 5 * ray.sizes["N"]})
    assert "grow together" in missing(FORMS["chinchilla"], one)
    assert missing(FORMS["granular_moe"], runs) == "granular_moe needs N_total and G, which these runs do not tell"
    known = dataclasses.replace(points("routed_bilinear"), sizes=points("routed_bilinear").sizes)
    varied = dataclasses.replace(known, sizes={**known.sizes, "D": np.arange(len(known.loss)) % 2 + 1.0})
    assert missing(FORMS["routed_bilinear"], varied) == "routed_bilinear knows no D, and the runs have 2 values of it"
    few = points("chinchilla", values={"N": (1e4, 1e5, 1e6), "D": (1e5, 2e5, 4e5)}).taken(np.array([0, 1, 3, 5, 7]))
    assert "5 free numbers, and there are 5 configurations" in missing(FORMS["chinchilla"], few)


def test_with_few_numbers_of_experts_nothing_saturates() -> None:
    runs = points("routed_bilinear", values=VALUES | {"E": (1, 4, 16)}, E_start=1.0, E_max=math.inf)
    fit = fit_law(FORMS["routed_bilinear"], runs, starts=4)
    assert fit.coefficients()["E_max"] == math.inf and "log_most" not in fit.names
    assert fit.cost < 1e-12


def test_predictors_without_a_law() -> None:
    """Against loops: the dearest configuration of as many experts; the three nearest."""
    runs = points("routed_bilinear", noise=0.01, seeds=2)
    held = dearest(runs)
    means = runs.means()
    assert len(means.loss) == 20 and held.sum() == 2 * 4
    outer = set(runs.config[held].tolist())
    want, near = [], []
    for row in range(20):
        if row not in outer:
            continue
        rest = [k for k in range(20) if k not in outer]
        alike = [k for k in rest if means.sizes["E"][k] == means.sizes["E"][row]]
        last = max(alike, key=lambda k: means.cost[k])
        want.append(math.log(means.loss[last] / means.loss[row]))
        spread = {name: np.log(means.sizes[name][rest]).std() for name in ("N", "E")}

        def off(k: int, row: int = row, spread: dict[str, float] = spread) -> float:
            return math.hypot(*(math.log(means.sizes[s][k] / means.sizes[s][row]) / spread[s] for s in spread))

        three = sorted(rest, key=off)[:3]
        near.append(np.mean([math.log(means.loss[k]) for k in three]) - math.log(means.loss[row]))
    np.testing.assert_allclose(last_value(runs, held), want, rtol=1e-9)
    np.testing.assert_allclose(neighbours(runs, held), near, rtol=1e-9)
    assert rms(np.array([3.0, 4.0])) == pytest.approx(math.sqrt(12.5))


@pytest.mark.thorough
def test_the_law_with_experts_is_preferred_where_they_count() -> None:
    """Runs with an interaction of experts: the law that has it errs least on the dearest runs, and the law without is
    refused in its turn where experts do nothing."""
    values = VALUES | {"D": (5e4, 1e5, 2e5, 4e5)}
    sizes = points("inference_optimal", noise=0.003, seeds=2, values=values, d=-0.01)
    names = ("inference_optimal", "chinchilla")
    trials = [trial(FORMS[name], sizes, starts=8) for name in names]
    assert [each.name for each in ranked(trials)] == list(names)
    told = verdict(trials, trivial_errors(sizes))
    assert told["inference_optimal"] == ""
    flat = points("chinchilla", noise=0.003, seeds=2)
    worse = dataclasses.replace(trials[0], largest=1.0)
    refused = verdict([worse, trial(FORMS["chinchilla"], flat, starts=4)], {"last value": 2.0})
    assert refused["inference_optimal"] == "no better than a law without experts"
    assert verdict([worse], {"last value": 0.5})["inference_optimal"] == "no better than the last value"
