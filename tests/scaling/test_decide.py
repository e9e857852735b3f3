"""Decisions: brute force over sizes, and what must be monotone."""

import itertools
import math

import numpy as np
import pytest

from softmoe_cli.scaling.costs import surface
from softmoe_cli.scaling.decide import (
    Aim,
    Choice,
    World,
    best_choice,
    outside,
    second_price,
    win_shares,
    winner,
)
from softmoe_cli.scaling.laws import inference_optimal
from tests.scaling.made_up import PLANTED

TOLD = PLANTED["inference_optimal"]
SPAN, IMAGES = (1e2, 1e9), (5e4, 8e5)


def loss(size: np.ndarray, images: np.ndarray, experts: float) -> np.ndarray:
    return np.asarray(inference_optimal(size, images, experts, **TOLD))


WORLD = World(loss, lambda n, e: 6 * n * (1 + 0.01 * e), lambda n, e: 2 * n * (1 + 0.1 * e))


def best(e: float = 4.0, world: World = WORLD, **aim: float) -> Choice:
    devices = aim.pop("devices", None)
    return best_choice(Aim(**aim, devices=None if devices is None else int(devices)), world, e, SPAN, IMAGES)


@pytest.mark.parametrize("e", [1.0, 4.0, 16.0])
def test_no_size_is_better(e: float) -> None:
    """Each question against 10,000 sizes."""
    sizes = np.geomspace(*SPAN, 10_000)
    train, serve = 6 * sizes * (1 + 0.01 * e), 2 * sizes * (1 + 0.1 * e)
    budget = 1e12
    found = best(e, train=budget)
    losses = loss(sizes, budget / train, e)
    assert found.loss <= losses.min() * (1 + 1e-12) and found.train == pytest.approx(budget)
    limit = found.price / 3
    limited = best(e, train=budget, serve=limit)
    assert limited.loss == pytest.approx(losses[serve <= limit].min(), rel=1e-3)
    assert limited.loss <= losses[serve <= limit].min() and limited.price <= limit * (1 + 1e-9)
    target = found.loss * 1.05
    cheap = best(e, train=budget, loss=target)
    enough = losses <= target
    assert cheap.price <= serve[enough].min() and cheap.price == pytest.approx(serve[enough].min(), rel=2e-3)
    assert cheap.loss == pytest.approx(target, rel=1e-9)
    whole = best(e, total=budget, served=1e6)
    left = budget - 1e6 * serve
    kept = left > 0
    both = loss(sizes[kept], left[kept] / train[kept], e)
    assert whole.loss <= both.min() * (1 + 1e-12) and whole.loss == pytest.approx(both.min(), rel=1e-5)
    assert whole.train + 1e6 * whole.price == pytest.approx(budget)


@pytest.mark.parametrize("served", [0.0, 1e5, 1e8])
def test_cheapest_to_train_and_serve(served: float) -> None:
    """A loss, and images served: against sizes and images of a grid."""
    found = best(loss=1.5, served=served)
    sizes, images = np.meshgrid(np.geomspace(1e2, 1e7, 700), np.geomspace(1e3, 1e11, 700))
    reached = loss(sizes, images, 4.0) <= 1.5
    cost = 6 * sizes * 1.04 * images + served * 2 * sizes * 1.4
    least = cost[reached].min()
    mine = found.train + served * found.price
    assert mine <= least and mine == pytest.approx(least, rel=0.03)
    assert found.loss == pytest.approx(1.5, rel=1e-9)


def test_images_served_pull_towards_small_models() -> None:
    """None: the training optimum. More: never a larger model or dearer serving. Very many: the least serving cost with
    which the loss is reached at all."""
    found = [best(loss=1.5, served=served) for served in (0.0, 1e3, 1e6, 1e9, 1e12, 1e15)]
    sizes, prices = [each.size for each in found], [each.price for each in found]
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(sizes))
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(prices))
    budget = found[0].train
    assert best(train=budget).loss == pytest.approx(1.5, rel=1e-9)
    assert best(train=budget).size == pytest.approx(found[0].size, rel=1e-5)
    assert best(total=budget, served=0.0).size == pytest.approx(best(train=budget).size, rel=1e-9)
    smallest = best(loss=1.5, train=1e300)
    assert found[-1].size == pytest.approx(smallest.size, rel=0.05)


@pytest.mark.parametrize("e", [1.0, 16.0])
def test_tighter_limits_never_help(e: float) -> None:
    memory = World(loss, WORLD.train, WORLD.serve, lambda n, e: n * (1 + e) / 1e4)
    budgets = [best(e, train=10.0**k).loss for k in range(9, 14)]
    assert budgets == sorted(budgets, reverse=True)
    limits = [best(e, train=1e12, serve=10.0**k).loss for k in range(3, 8)]
    assert limits == sorted(limits, reverse=True) and limits[0] > limits[-1]
    devices = [best(e, memory, train=1e12, devices=k).loss for k in (1, 2, 4, 8, 16, 64)]
    assert devices == sorted(devices, reverse=True)


def test_devices_are_whole() -> None:
    """Weights of 1.2 devices take two, each paid for; none beyond the most."""
    world = World(loss, WORLD.train, WORLD.serve, lambda n, _: n / 1e4)
    found = best(world=world, total=1e12, served=1e6)
    assert found.devices == math.ceil(found.size / 1e4)
    assert found.price == pytest.approx(found.devices * WORLD.serve(found.size, 4.0))
    free = best(world=world, train=1e12)
    assert free.size == pytest.approx(best(train=1e12).size) and free.devices == math.ceil(free.size / 1e4)
    few = best(world=world, train=1e12, devices=1)
    assert few.size == pytest.approx(1e4, rel=1e-9)
    none = best_choice(Aim(train=1e12, devices=1), world, 4.0, (1e6, 1e7), IMAGES)
    assert none.reason == "no size keeps all limits"


def test_out_of_reach() -> None:
    floor = float(loss(np.array(1e9), np.array(1e15), 4.0))
    assert best(loss=floor / 2, served=1.0).reason == "no size reaches the loss"
    assert best(train=1e12, serve=1.0).reason == "no size keeps all limits"


def test_winners() -> None:
    a, b = Choice(1, objective=0.0), Choice(4, objective=-0.1)
    c = Choice(16, reason="refused")
    assert winner([a, b, c]) is b and winner([c]) is None
    second = second_price([a, b, c])
    assert second is not None and second[0] is a and second[1] == pytest.approx(math.expm1(0.1))
    assert win_shares([[a, b], [b, c], [c, c], [a, c]]) == {1: 0.25, 4: 0.5}
    assert outside(Choice(4, size=3e5, images=1e4), (1e4, 1e5), (2e4, 1e5), (1, 16)) == pytest.approx(3)
    assert outside(Choice(64, size=5e4, images=3e4), (1e4, 1e5), (2e4, 1e5), (1, 16)) == pytest.approx(4)
    assert outside(Choice(4, size=5e4, images=3e4), (1e4, 1e5), (2e4, 1e5), (1, 16)) == 1


def test_grids_come_near_the_search() -> None:
    for aim in (Aim(train=1e12), Aim(train=1e12, serve=1e5), Aim(loss=1.5, served=1e6)):
        exact, near = (best_choice(aim, WORLD, 4.0, SPAN, IMAGES, exact=each) for each in (True, False))
        assert near.size == pytest.approx(exact.size, rel=0.005)
        assert near.objective == pytest.approx(exact.objective, abs=5e-3)


def test_costs_between_the_runs() -> None:
    """Power laws come back between sizes and beyond them, and between numbers of experts."""
    size, experts = (np.array(each, dtype=float) for each in zip(*[(n, e) for n in (1e3, 1e4, 1e6) for e in (1, 4)],
                                                                 strict=True))  # fmt: skip
    made = surface(size, experts, 7 * size**1.1 * experts**0.2)
    for n in (1e2, 1e3, 3e4, 1e7):
        for e in (1.0, 2.0, 4.0, 16.0):
            assert made(n, e) == pytest.approx(7 * n**1.1 * e**0.2, rel=1e-9)
    one = surface(np.array([1e3, 1e4, 1e4]), np.array([1.0, 1, 4]), np.array([1.0, 10, 20]))
    assert one(1e5, 4.0) == pytest.approx(200)
