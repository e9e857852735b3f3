"""The laws: numbers computed from the papers' formulas, slow loops, and the papers' own optima."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from softmoe_cli.check.official import official_cases, read_case
from softmoe_cli.scaling.decide import Aim, World, best_choice
from softmoe_cli.scaling.fit import Points, bootstrap, fit_law
from softmoe_cli.scaling.forms import FORMS
from softmoe_cli.scaling.laws import (
    LAWS,
    best_x,
    chance_held,
    chinchilla,
    e_hat,
    effective_parameters,
    fresh_images,
    joint_moe,
    joint_optimum,
    joint_reduced,
    saturating_compute,
)
from tests.scaling.made_up import PLANTED, VALUES

Arrays = dict[str, np.ndarray]


def coefficients(meta: dict[str, Any]) -> dict[str, float]:
    return {"lambda_" if key == "lambda" else key: value for key, value in meta["config"]["coefficients"].items()}


def curve(meta: dict[str, Any], z: Arrays) -> None:
    """Section 18: a law at each point."""
    law, told = LAWS[meta["config"]["law"]], coefficients(meta)
    sizes = [z[name] for name in meta["arrays"] if "/" not in name]
    np.testing.assert_allclose(law.of(*sizes, **told), z["out/loss"], rtol=1e-12)
    if "mid/e_hat" in z:
        np.testing.assert_allclose(e_hat(z["E"], told["E_start"], told["E_max"]), z["mid/e_hat"], rtol=1e-12)
    if "mid/m" in z:
        reduced = joint_reduced(z["E"], **{key: value for key, value in told.items() if key != "c"})
        for name, got in zip(("m", "mu", "n", "nu"), reduced, strict=True):
            np.testing.assert_allclose(got, z[f"mid/{name}"], rtol=1e-12)
    if "out/effective_parameters" in z:
        np.testing.assert_allclose(effective_parameters(*sizes, **told), z["out/effective_parameters"], rtol=1e-12)
    if "out/x_optimal" in z:
        np.testing.assert_allclose(best_x(z["t"], **told), z["out/x_optimal"], rtol=1e-12)


WIDE, IMAGES = (1e4, 1e14), (1e9, 1e12)


def optimum(meta: dict[str, Any], z: Arrays) -> None:
    """Section 18: the least loss of 6 N D + 2 N served = F."""
    told = coefficients(meta)
    world = World(lambda n, d, e: joint_moe(n, d, e, **told), lambda n, _: 6 * n, lambda n, _: 2 * n)
    columns = [z[name].tolist() for name in ("F", "E", "D_inf", "out/N_act", "out/D", "out/loss")]
    for budget, e, served, n, d, loss in zip(*columns, strict=True):
        found = best_choice(Aim(total=budget, served=served), world, e, WIDE, IMAGES)
        assert (found.size, found.images) == pytest.approx((n, d), rel=1e-6)
        assert found.loss == pytest.approx(loss, rel=1e-12)


def amended(meta: dict[str, Any], z: Arrays) -> None:
    """Section 18: the least loss of 6 N D = B; and both Algorithms of the amended objective."""
    told, law = coefficients(meta), LAWS["inference_optimal"].of
    world = World(lambda n, d, e: law(n, d, e, **told), lambda n, _: 6 * n, lambda n, e: (1 + (e - 1) / 3) * n)
    names = ("B", "E", "out/N_optimal", "out/D_optimal", "out/loss_optimal", "out/cost_optimal")
    for budget, e, n, d, loss, cost in zip(*(z[name].tolist() for name in names), strict=True):
        found = best_choice(Aim(train=budget), world, e, WIDE, IMAGES)
        assert (found.size, found.images, found.price) == pytest.approx((n, d, cost), rel=1e-6)
        assert found.loss == pytest.approx(loss, rel=1e-10)
        if told["d"] == 0:
            closed = joint_optimum(budget, told["A"], -told["alpha"], told["C"], -told["gamma"])
            assert (found.size, found.images) == pytest.approx(closed, rel=1e-6)
    for row in range(len(z["amended/B"])):
        budget, e, loss, cost = (float(z[f"amended/{name}"][row]) for name in ("B", "E", "base_loss", "base_cost"))
        cheap = best_choice(Aim(train=budget, loss=loss), world, e, WIDE, IMAGES)
        good = best_choice(Aim(train=budget, serve=cost), world, e, WIDE, IMAGES)
        want = {name.rpartition("/")[2]: float(z[name][row]) for name in z if name.startswith("amended/out/")}
        assert (cheap.size, cheap.price) == pytest.approx((want["N_bounded_loss"], want["cost_bounded_loss"]), rel=1e-6)
        assert good.size == pytest.approx(want["N_bounded_cost"], rel=1e-6)
        assert good.loss == pytest.approx(want["loss_bounded_cost"], rel=1e-10)


def fitted(meta: dict[str, Any], z: Arrays) -> None:
    """Section 18: runs of a planted law, then larger ones."""
    form = FORMS[meta["config"]["law"]]
    sizes = {name: z[name] for name in form.law.sizes}
    config = np.unique(np.stack(list(sizes.values())), axis=1, return_inverse=True)[1].ravel()
    runs = Points(sizes, z["loss"], config, z["seed"], config, sizes[form.law.sizes[0]] * sizes["D"])
    fit = fit_law(form, runs, starts=16)
    larger = {name: z[f"holdout/{name}"] for name in form.law.sizes}
    apart = np.log(fit.predict(larger) / z["holdout/out/true_loss"])
    if not meta["config"]["noise"]:
        assert np.abs(apart).max() < 1e-4
        return
    drawn = np.array([np.log(fit.predict(larger, free)) for free in bootstrap(fit, runs, 60)])
    assert (np.abs(apart) < 3 * drawn.std(axis=0)).all()


HANDLERS = {
    "scaling_law_curve": curve,
    "scaling_law_optimum": optimum,
    "scaling_law_amended": amended,
    "scaling_law_fit": fitted,
}
CASES = {name: meta for name, meta in official_cases().items() if meta["kind"].startswith("scaling_law_")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.thorough] * (meta["kind"] == "scaling_law_fit"))
        for name, meta in CASES.items()
    ],
)
def test_numbers_from_the_formulas(name: str, record_property: Callable[[str, object], None]) -> None:
    record_property("case", name)
    record_property("kind", CASES[name]["kind"])
    HANDLERS[CASES[name]["kind"]](*read_case(name))


@pytest.mark.parametrize(("start", "most"), [(1.0, 50.0), (2.0732, 290.4521), (4.175, 477.741), (1.5, math.inf)])
def test_e_hat_is_e_start_when_dense_and_grows_to_e_max(start: float, most: float) -> None:
    e = np.array([1.0, 1.5, 2, 3, 10, 100, 1e4, 1e6])
    hat = e_hat(e, start, most)
    assert hat[0] == pytest.approx(start, rel=1e-14)
    assert (np.diff(hat) > 0).all() and (hat < most).all()
    if math.isfinite(most):
        assert e_hat(1e15, start, most) == pytest.approx(most, rel=1e-9)
    else:
        np.testing.assert_allclose(hat, e - 1 + start, rtol=1e-14)


def test_effective_parameters_have_the_same_loss() -> None:
    told = PLANTED["routed_bilinear"]
    law = LAWS["routed_bilinear"].of
    for n in VALUES["N"]:
        for e in VALUES["E"]:
            same = effective_parameters(n, e, **told)
            assert law(same, 1.0, **told) == pytest.approx(law(n, e, **told), rel=1e-13)


def test_images_that_come_again_are_worth_less_each_time() -> None:
    """Until they are seen once, all count; then each repetition less than the one before, and never more than R*."""
    seen = np.array([1e3, 5e4, 1e5, 1.5e5, 2e5, 1e9])
    worth = fresh_images(seen, 5e4, 15.0)
    assert worth[0] == 1e3 and worth[1] == 5e4
    gains = np.diff(worth[1:5]) / np.diff(seen[1:5])
    assert (np.diff(gains) < 0).all() and (gains < 1).all()
    assert worth[-1] == pytest.approx(5e4 * 16)
    told = {key: value for key, value in PLANTED["data_constrained"].items() if key != "R_star"}
    once = LAWS["data_constrained"].of(1e5, 5e4, 5e4, R_star=12.0, **told)
    assert once == pytest.approx(chinchilla(1e5, 5e4, **told), rel=1e-14)


def test_an_error_begins_at_that_of_guessing() -> None:
    told = {"a": 0.3, "b": 0.35, "c": 0.1}
    assert chance_held(0.0, **told, chance=0.9) == pytest.approx(0.9, rel=1e-12)
    assert chance_held(1e30, **told, chance=0.9) == pytest.approx(0.1, rel=1e-6)
    assert saturating_compute(1e30, d=0.5, **told) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("e", [1.0, 4.0, 32.0])
def test_optimum_of_the_joint_law(e: float) -> None:
    """At the optimum mu m N^mu = nu n D^nu; and none of 10,000 sizes has a lower loss."""
    told = PLANTED["joint_moe"]
    m, mu, n, nu = joint_reduced(e, **{key: value for key, value in told.items() if key != "c"})
    size, images = joint_optimum(1e12, m, mu, n, nu)
    assert 6 * size * images == pytest.approx(1e12, rel=1e-12)
    assert mu * m * size**mu == pytest.approx(nu * n * images**nu, rel=1e-12)
    sizes = np.geomspace(1e2, 1e9, 10_000)
    losses = joint_moe(sizes, 1e12 / (6 * sizes), e, **told)
    least = float(joint_moe(size, images, e, **told))
    assert least <= losses.min() and losses.min() == pytest.approx(least, rel=1e-6)
