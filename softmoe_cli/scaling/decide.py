"""Which experts, which size, how many images: the best choice under a budget, by any law and any costs.

For every number of experts one search over the size; the images follow from the budget or from the quality that is
wanted. Yun et al. (2024) call two of these their Algorithms 1 (least serving cost at a loss) and 2 (least loss at a
serving cost); with a price of serving it is Sardana et al., Beyond Chinchilla-Optimal, 2024, arXiv 2401.00448.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from softmoe_cli.scaling.laws import Number


@dataclass(frozen=True)
class Aim:
    """What is asked for; costs are in one unit.

    Attributes:
        train: the most that training may cost.
        total: the most that training and serving may cost together.
        loss: the loss that must be reached, or a lower one.
        served: images that will be served.
        serve: the most that serving an image may cost.
        devices: the most devices that the weights may fill.
    """

    train: float | None = None
    total: float | None = None
    loss: float | None = None
    served: float = 0.0
    serve: float | None = None
    devices: int | None = None

    @property
    def goal(self) -> str:
        """What is made least: the loss; serving, where a loss must be reached for a training budget; or all costs."""
        if self.loss is None:
            return "loss"
        return "serve" if self.train is not None and not self.served else "total"


@dataclass(frozen=True)
class World:
    """The law and the costs: functions of size, images and experts. `memory` is what the weights take, in devices."""

    loss: Callable[[Number, Number, float], Number]
    train: Callable[[Number, float], Number]
    serve: Callable[[Number, float], Number]
    memory: Callable[[Number, float], Number] | None = None


@dataclass(frozen=True)
class Choice:
    """The best size and images of one number of experts; with `reason` there is none. `price` is what serving an image
    costs on all its devices; `objective` is what was made least."""

    experts: float
    size: float = math.nan
    images: float = math.nan
    loss: float = math.nan
    train: float = math.nan
    price: float = math.nan
    devices: int = 1
    objective: float = math.inf
    reason: str = ""


GRID = 241
"""Sizes that are looked at before the search between them."""
FINER = 101
"""Sizes between two of these, where a search would take too long."""
NEAR = 1e-3
"""How near to a minimum its slope is followed, in logarithms of the size."""
MOST_IMAGES = 1e6
"""Times the images of the runs, beyond which a loss counts as out of reach."""
MOST_SERVING = 64
"""Devices that are looked at where no number of them is given."""


@dataclass(frozen=True)
class _Search:
    """One number of experts on so many devices: everything as a function of the logarithm of the size."""

    aim: Aim
    world: World
    experts: float
    devices: int
    images: tuple[float, float]

    def at(self, log_size: Number) -> tuple[Number, Number, Number]:
        """Images, objective and whether all limits hold; the objective is a logarithm."""
        aim, world, size = self.aim, self.world, np.exp(log_size)
        train, serve = world.train(size, self.experts), world.serve(size, self.experts)
        price = serve * self.devices
        with np.errstate(all="ignore"):
            if aim.goal == "total":
                images = self._images_for(size, aim.loss or 0.0)
                objective = np.log(train * images + aim.served * price)
                holds = np.isfinite(images)
            else:
                budget = aim.train if aim.total is None else aim.total - aim.served * price
                images = budget / train
                loss = world.loss(size, images, self.experts)
                objective = np.log(loss if aim.goal == "loss" else price)
                holds = (images > 0) & np.isfinite(loss)
                if aim.loss is not None:
                    holds = holds & (loss <= aim.loss)
            if aim.train is not None:
                holds = holds & (train * images <= aim.train * (1 + 1e-12))
            if aim.serve is not None:
                holds = holds & (serve <= aim.serve * (1 + 1e-12))
            if world.memory is not None:
                holds = holds & (world.memory(size, self.experts) <= self.devices)
        return images, objective, holds

    def _images_for(self, size: Number, loss: float) -> Number:
        """The images with which the law says this loss, by bisection; infinite where it is out of reach."""
        low = np.full(np.shape(size), math.log(self.images[0] / MOST_IMAGES))
        high = np.full(np.shape(size), math.log(self.images[1] * MOST_IMAGES))
        reached = self.world.loss(size, np.exp(high), self.experts) <= loss
        for _ in range(64):
            middle = (low + high) / 2
            enough = self.world.loss(size, np.exp(middle), self.experts) <= loss
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return np.where(reached, np.exp(high), math.inf)

    def best(self, span: tuple[float, float], *, exact: bool) -> tuple[float, float] | None:
        """(logarithm of the best size, objective) between the ends of `span`; None where nothing holds."""
        grid = np.linspace(math.log(span[0]), math.log(span[1]), GRID)
        _, objective, holds = self.at(grid)
        if not np.any(holds):
            return None
        least = int(np.nanargmin(np.where(holds, objective, math.inf)))
        if not exact:
            finer = np.linspace(grid[max(0, least - 1)], grid[min(GRID - 1, least + 1)], FINER)
            _, objective, holds = self.at(finer)
            least = int(np.nanargmin(np.where(holds, objective, math.inf)))
            return float(finer[least]), float(objective[least])
        low, high = (self._edge(grid[least], grid[min(max(least + way, 0), GRID - 1)]) for way in (-1, 1))
        between = minimize_scalar(self._held, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
        at = min((low, high, float(between.x)), key=self._held)
        near = [max(low, at - NEAR), min(high, at + NEAR)]
        slopes = [self._slope(end) for end in near]
        if slopes[0] < 0 < slopes[1]:  # a minimum between limits: its place by the slope, which is sharper
            at = float(brentq(self._slope, *near, xtol=1e-13, rtol=1e-13))
        return at, float(self.at(at)[1])

    def _held(self, log_size: float) -> float:
        """The objective; infinite where a limit does not hold."""
        _, objective, holds = self.at(log_size)
        return float(objective) if holds else math.inf

    def _edge(self, inside: float, outside: float) -> float:
        """The last size from `inside` towards `outside` at which all limits hold."""
        if self.at(outside)[2]:
            return float(outside)
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if self.at(middle)[2] else (inside, middle)
        return float(inside)

    def _slope(self, log_size: float, step: float = 1e-3) -> float:
        """Of the objective, by differences of fourth order."""
        a, b, c, d = (float(self.at(log_size + k * step)[1]) for k in (-2, -1, 1, 2))
        return (a - 8 * b + 8 * c - d) / (12 * step)


def best_choice(
    aim: Aim,
    world: World,
    experts: float,
    span: tuple[float, float],
    images: tuple[float, float],
    *,
    exact: bool = True,
) -> Choice:
    """The best size for one number of experts.

    Args:
        aim: the question.
        world: law and costs.
        experts: how many; 1 is a dense model.
        span: the least and the largest size that is looked at.
        images: the least and the most images of the runs, where the search for a loss begins.
        exact: False: the best of two grids of sizes, the second within the first, for many draws.
    """
    found = Choice(experts, reason="no size keeps all limits" if aim.loss is None else "no size reaches the loss")
    for devices in _device_counts(aim, world, experts, span):
        search = _Search(aim, world, experts, devices, images)
        best = search.best(span, exact=exact)
        if best is None or best[1] >= found.objective:
            continue
        size = math.exp(best[0])
        seen = float(search.at(best[0])[0])
        filled = 1 if world.memory is None else max(1, math.ceil(float(world.memory(size, experts)) * (1 - 1e-9)))
        found = Choice(
            experts, size, seen, float(world.loss(size, seen, experts)), float(world.train(size, experts)) * seen,
            float(world.serve(size, experts)) * filled, filled, best[1],
        )  # fmt: skip
    return found


def _device_counts(aim: Aim, world: World, experts: float, span: tuple[float, float]) -> range:
    """How many devices the weights may fill. Where their number costs nothing, only the most of them matters."""
    most = aim.devices or MOST_SERVING
    if world.memory is None:
        return range(1, 2)
    if aim.goal == "loss" and aim.total is None:
        return range(most, most + 1)
    ends = [math.ceil(float(world.memory(size, experts))) for size in span]
    return range(max(1, ends[0]), min(most, max(1, ends[1])) + 1)


def winner(choices: Sequence[Choice]) -> Choice | None:
    """The best of several numbers of experts; None where none has a choice."""
    able = [choice for choice in choices if not choice.reason]
    return min(able, key=lambda choice: choice.objective) if able else None


def second_price(choices: Sequence[Choice]) -> tuple[Choice, float] | None:
    """The second best, and what taking it costs: its objective over the best one's, less 1."""
    able = sorted((choice for choice in choices if not choice.reason), key=lambda choice: choice.objective)
    return (able[1], math.exp(able[1].objective - able[0].objective) - 1) if len(able) > 1 else None


def drawn_choices(
    aim: Aim, worlds: Iterator[World], experts: Sequence[float], span: Callable[[float], tuple[float, float]],
    images: tuple[float, float],
) -> list[list[Choice]]:  # fmt: skip
    """The choices of every number of experts by each law of a bootstrap."""
    return [[best_choice(aim, world, e, span(e), images, exact=False) for e in experts] for world in worlds]


def win_shares(drawn: Sequence[Sequence[Choice]]) -> dict[float, float]:
    """How often each number of experts is the best, over all draws."""
    shares: dict[float, float] = {choice.experts: 0.0 for choices in drawn[:1] for choice in choices}
    for choices in drawn:
        best = winner(choices)
        if best is not None:
            shares[best.experts] += 1 / len(drawn)
    return shares


def outside(
    choice: Choice, sizes: tuple[float, float], images: tuple[float, float], experts: tuple[float, float]
) -> float:
    """How far a choice lies outside the box of the runs: the largest factor in any direction, 1 inside."""
    factors = [1.0]
    for value, (low, high) in ((choice.size, sizes), (choice.images, images), (choice.experts, experts)):
        factors += [value / high, low / value]
    return max(factors)
