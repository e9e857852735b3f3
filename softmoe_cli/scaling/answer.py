"""From a fitted law and the runs' costs to a decision with intervals, the run that would test it, and the next run."""

import math
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import Row
from softmoe_cli.scaling.costs import Surface, matched, surface
from softmoe_cli.scaling.decide import (
    Aim,
    Choice,
    World,
    best_choice,
    drawn_choices,
    outside,
    second_price,
    win_shares,
    winner,
)
from softmoe_cli.scaling.fit import LawFit, Points, percentiles, seed_scatter
from softmoe_cli.scaling.laws import Number
from softmoe_cli.scaling.points import Family, dense_parameters, loss_of, sizes_of

SIZES = ("N", "N_act", "N_total")
MOST_OUTSIDE = 10.0
"""How far beyond the runs a decision may lie, as a factor, unless more is asked for."""
SPAN_FACTOR = 1000.0
"""How far beyond the runs sizes are searched, so that a best one far away is seen to be there."""


@dataclass(frozen=True)
class Prices:
    """What is known of costs. `train`: of an image, in `unit` (PFLOP or s); `serve`: of an image, in `serve_unit`;
    `mib`: of the weights; `told`: where serving costs come from."""

    train: Surface
    unit: str
    serve: Surface
    serve_unit: str
    mib: Surface
    told: str


def prices(family: Family, size: str, clock: Sequence[Row] | None, where: str, *, seconds: bool) -> Prices:
    """Costs by the law's size and experts, from the runs' ledgers, and from the clock where it was given.

    Raises:
        UsageError: too few of the runs' models were measured.
    """
    at, experts = family.points.sizes[size], family.points.sizes["E"]
    spent = family.values("device_s" if seconds else "train_pflop") / family.values("images")
    train = surface(at, experts, spent)
    mib = surface(at, experts, family.values("params_m") * 4e6 / 2**20)
    if clock is None:
        serve = surface(at, experts, family.values("forward_gflop") / 1e6)
        return Prices(train, "s" if seconds else "PFLOP", serve, "PFLOP", mib, "forward FLOPs, not the clock")
    pairs, strangers = matched(clock, [run.row for run in family.runs])
    rows = [index for index, _ in pairs]
    if len({(at[row], experts[row]) for row in rows}) < 2:
        raise UsageError(
            f"--costs measured {len({at[row] for row in rows})} of the runs' models; it must measure two or more with "
            "the same data, such as softmoe cost -m GROUPS OF THE STUDY clock=true format=json"
        )
    cost = np.array([row["latency_ms"] / 1000 / row["batch_size"] for _, row in pairs])
    serve = surface(at[rows], experts[rows], cost)
    beside = f"; {strangers} of its rows are of other models" if strangers else ""
    return Prices(train, "s" if seconds else "PFLOP", serve, "s", mib, f"the clock, {where}{beside}")


def sizes_at(family: Family, size: Number, images: Number, experts: float) -> dict[str, Number]:
    """What a law takes, at a size in the law's own sense: sparsity as the runs' slots per token make it, and as many
    different images as the runs had."""
    return _sized(family)(size, images, experts)


def _sized(family: Family) -> Callable[[Number, Number, float], dict[str, Number]]:
    """The same for many sizes. Slots per token are the median of the runs with as many experts, or of all with
    experts."""
    sizes = family.points.sizes
    different, e = float(np.median(sizes["U"])), sizes["E"]
    slots = (1 - sizes["S"]) * e if "S" in sizes else np.ones(len(e))
    of_each = {float(number): float(np.median(slots[e == number])) for number in np.unique(e)}
    of_all = float(np.median(slots[e > 1])) if np.any(e > 1) else 1.0

    def at(size: Number, images: Number, experts: float) -> dict[str, Number]:
        sparsity = 0.0 if experts == 1 else 1 - of_each.get(experts, of_all) / experts
        return dict.fromkeys(SIZES, size) | {"D": images, "E": experts, "U": different, "S": sparsity}

    return at


def law_world(family: Family, fit: LawFit, cost: Prices, device_mib: float | None, free: Number = None) -> World:
    """The law of these free numbers (the fit's if None), with the costs, as functions of size, images and experts."""
    sized = _sized(family)

    def loss(size: Number, images: Number, experts: float) -> Number:
        return fit.predict(sized(size, images, experts), free)

    memory = None if device_mib is None else lambda size, experts: cost.mib(size, experts) / device_mib
    return World(loss, cost.train, cost.serve, memory)


@dataclass
class Answer:
    """An answer with how sure it is.

    Attributes:
        choices: of each number of experts, by the fit; refused ones have a reason.
        shares: how often each is the best in the bootstrap.
        spans: of each, 95% intervals of size, images and loss.
        factors: how far each lies outside the runs.
        best: the answer; None where there is none.
        second: the next best, and what it costs more.
        notes: what else must be known.
    """

    aim: Aim
    size: str
    cost: Prices
    choices: list[Choice]
    shares: dict[float, float]
    spans: dict[float, dict[str, tuple[float, float]]]
    factors: dict[float, float]
    best: Choice | None
    second: tuple[Choice, float] | None
    drawn: list[list[Choice]]
    notes: list[str] = field(default_factory=list)


def may_decide(fit: LawFit, family: Family) -> str:
    """Why a law cannot decide, or nothing: it must know size, images and, where they vary, experts; and seeds must
    agree well enough."""
    sizes = fit.form.law.sizes
    if sizes[0] not in SIZES or "D" not in sizes:
        return f"{fit.form.law.name} does not know both size and images"
    if "G" in sizes:
        return f"{fit.form.law.name} is a law of granularity, which no question asks for"
    if len(np.unique(family.points.sizes["E"])) > 1 and not {"E", "S"} & set(sizes):
        return f"{fit.form.law.name} knows no experts, of which the runs have several numbers"
    means = family.points.means()
    runs = len(family.points.loss) / len(means.loss)
    scatter, spread = seed_scatter(family.points) / math.sqrt(runs), float(np.std(np.log(means.loss)))
    if scatter > spread:
        return (
            f"the seeds of a configuration scatter by {100 * scatter:.2g}% of the loss in its mean, which is more than "
            f"the {100 * spread:.2g}% between configurations: more seeds or more validation images are needed"
        )
    return ""


def decision(
    family: Family, fit: LawFit, drawn_free: np.ndarray, aim: Aim, cost: Prices, experts: Sequence[float],
    device_mib: float | None, *, far: bool,
) -> Answer:  # fmt: skip
    """The best of these numbers of experts, with intervals from the bootstrap's laws; `far`: extrapolation was asked
    for."""
    size, points = fit.form.law.sizes[0], family.points
    if not far and "U" not in fit.form.law.sizes:
        aim = replace(aim, images=max(float(points.sizes["D"].max()), float(points.sizes["U"].max())))
    images = (float(points.sizes["D"].min()), float(points.sizes["D"].max()))
    ends = (float(points.sizes["E"].min()), float(points.sizes["E"].max()))

    def box(e: float) -> tuple[float, float]:
        mine = points.sizes[size][points.sizes["E"] == e]
        mine = mine if len(mine) else points.sizes[size]
        return float(mine.min()), float(mine.max())

    def span(e: float) -> tuple[float, float]:
        return box(e)[0] / SPAN_FACTOR, box(e)[1] * SPAN_FACTOR

    world = law_world(family, fit, cost, device_mib)
    choices = [best_choice(aim, world, e, span(e), images) for e in experts]
    factors = {each.experts: outside(each, box(each.experts), images, ends) for each in choices if not each.reason}
    judged = []
    for each in choices:
        if not each.reason and not far and factors[each.experts] > MOST_OUTSIDE:
            each = _refused(each, f"a factor of {factors[each.experts]:.3g} outside the runs")
        judged.append(each)
    worlds: Iterator[World] = (law_world(family, fit, cost, device_mib, free) for free in drawn_free)
    kept = [each.experts for each in judged if not each.reason]
    drawn = drawn_choices(aim, worlds, kept, span, images) if kept else []
    spans = {
        e: {
            name: percentiles(np.array([getattr(each[place], name) for each in drawn]))
            for name in ("size", "images", "loss")
        }
        for place, e in enumerate(kept)
    }
    best = winner(judged)
    return Answer(
        aim, size, cost, judged, win_shares(drawn), spans, factors, best, second_price(judged), drawn
    )  # fmt: skip


def _refused(choice: Choice, why: str) -> Choice:
    return Choice(choice.experts, reason=f"refused: {why}; --extrapolate asks for it")


# --- runs to type -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A run to make: what to type, and its sizes, which the width and the experts to type leave apart from the wanted
    ones. Where N is not its size, that is interpolated between the runs' own."""

    command: str
    size: float
    images: int
    experts: float


def proposal(family: Family, size: str, wanted: float, images: float, experts: float) -> Proposal:
    """The run nearest to these sizes: a run of the family with its width, experts and images changed."""
    points = family.points
    alike = np.flatnonzero(points.sizes["E"] == experts)
    if not len(alike):
        others = np.flatnonzero(points.sizes["E"] > 1)
        alike = others[np.argsort(np.abs(np.log(points.sizes["E"][others] / experts)), kind="stable")]
        alike = alike[points.sizes["E"][alike] == points.sizes["E"][alike[0]]]
    at = int(alike[np.argmin(np.abs(np.log(points.sizes[size][alike] / wanted)))])
    run, row = family.runs[at], family.runs[at].row
    here = float(points.sizes[size][at])
    changed, made = _width(row, wanted / here, _grown(points, size, at, experts))
    changed += _experts(family, at, experts)
    batch = int(row["batch_size"])
    count = max(1, round(images / batch)) * batch
    budgets = [f"train.{key}=null" for key in ("steps", "epochs", "minutes") if row.get(f"train.{key}") is not None]
    words = ["softmoe", "train", "-cp", os.path.abspath(run.folder), "-cn", "config", *changed]
    words += [f"train.images={count}", *budgets]
    return Proposal(shlex.join(words), here * made, count, experts)


def _experts(family: Family, at: int, experts: float) -> list[str]:
    """Overrides that give a run's model so many experts; where the runs have other slots with other experts, with as
    many slots per token as it has."""
    row, has = family.runs[at].row, float(family.points.sizes["E"][at])
    if experts == has:
        return []
    if experts == 1:
        return ["model.router._target_=null"]
    slots = {each.row.get("model.router.slots_per_expert") for each in family.runs if each.row["router"] != "dense"}
    own = row.get("model.router.slots_per_expert")
    kept = [] if own is None or len(slots) == 1 else [max(1, round(own * has / experts))]
    return [f"model.router.num_experts={experts:.0f}", *(f"model.router.slots_per_expert={each}" for each in kept)]


def _grown(points: Points, size: str, at: int, experts: float) -> Callable[[float, float], float]:
    """By what a run's size grows where its N goes from one number to another and it gets so many experts: all
    parameters grow with these too."""
    if size == "N" or "N" not in points.sizes:
        return lambda own, n: n / own
    sizes = surface(points.sizes["N"], points.sizes["E"], points.sizes[size])
    return lambda own, n: float(sizes(n, experts) / sizes(own, float(points.sizes["E"][at])))


def _width(row: Row, factor: float, grown: Callable[[float, float], float]) -> tuple[list[str], float]:
    """Overrides that make the size of a run's model nearest to `factor` times what it is, and the factor that they
    really make. A backbone of timm's stays as it is."""
    own = dense_parameters(row)
    if own is None:
        return [], 1.0
    width, heads = row["model.backbone.width"], row["model.backbone.heads"]
    ratio = row["model.backbone.mlp_width"] / width

    def made(w: int) -> float:
        changed = row | {"model.backbone.width": w, "model.backbone.mlp_width": max(1, round(w * ratio))}
        return grown(own, dense_parameters(changed) or own)

    nearest = min(
        range(heads, 16 * width + heads, heads), key=lambda w: (abs(math.log(made(w) / factor)), w)
    )  # fmt: skip
    if nearest == width:
        return [], made(width)
    hidden = max(1, round(nearest * ratio))
    words = [f"model.backbone.width={nearest}", f"model.backbone.mlp_width={hidden}"]
    if (narrow := row.get("model.expert_width")) is not None:
        words.append(f"model.expert_width={max(1, round(narrow * hidden / row['model.backbone.mlp_width']))}")
    return words, made(nearest)


def with_room(
    family: Family,
    fit: LawFit,
    made: Answer,
    offered: Proposal,
    images: tuple[float, float],
    device_mib: float | None,
) -> Proposal:
    """The proposal with as many images as the question leaves for the size that it really has; as it is, where that
    size keeps no limit."""
    span = (offered.size, offered.size * (1 + 1e-9))
    world = law_world(family, fit, made.cost, device_mib)
    at = best_choice(made.aim, world, offered.experts, span, images)
    if at.reason or made.best is None:
        return offered
    return proposal(family, made.size, offered.size, at.images, offered.experts)


def predicted(
    family: Family, fit: LawFit, drawn_free: np.ndarray, sizes: dict[str, Number]
) -> tuple[float, float, float]:
    """The law's loss, or error, at sizes, and the ends of a 95% interval for one run there: of the law, and of a
    seed."""
    of = {name: np.array([value]) for name, value in sizes.items()}
    points, middle = family.points, float(fit.predict(of)[0])
    drawn = np.array([float(points.scale(fit.predict(of, free)[0])) for free in drawn_free])
    noise = np.random.default_rng(1).standard_normal((len(drawn), 16)) * seed_scatter(points)
    low, high = percentiles((drawn[:, None] + noise).ravel())
    return middle, float(points.back(low)), float(points.back(high))


def held_against(family: Family, fit: LawFit, drawn_free: np.ndarray, run: FinishedRun, quality: str) -> str:
    """A finished run beside what the law, fitted without it, says of its sizes, in a sentence.

    Raises:
        UsageError: its row does not tell a size.
    """
    row = run.row
    sizes = sizes_of(row)
    lacks = [name for name in fit.form.law.sizes if sizes[name] is None]
    if lacks:
        raise UsageError(f"--check {run.place}: its row does not tell {' and '.join(lacks)}")
    middle, low, high = predicted(family, fit, drawn_free, {k: float(v or 0.0) for k, v in sizes.items()})
    value = loss_of(row, quality)
    what = f"error by {quality}" if family.points.share else quality
    where = "inside" if low <= value <= high else "outside"
    return (
        f"{run.place}: {what} {value:.4f}, predicted {middle:.4f} [{low:.4f}, {high:.4f}] by {fit.form.law.name}: "
        f"{where} the interval, {100 * (value / middle - 1):+.1f}%"
    )


# --- what to run next -------------------------------------------------------------------------------------------------

HALF_AS_GOOD = 0.5


@dataclass(frozen=True)
class Next:
    """The cheapest run that narrows the answer nearly as much as any: its cost, and by how much the spread of the
    answer shrinks."""

    proposal: Proposal
    cost: float
    narrower: float


def next_run(family: Family, fit: LawFit, drawn_free: np.ndarray, made: Answer, *, far: bool) -> Next | None:
    """Of the runs' sizes, experts and images, and of twice the most images, the cheapest run that narrows the answer at
    least half as much as the best of them.

    The answer is how far the best number of experts is ahead of the second, or the best size where there is one number
    only. Over the bootstrap's laws it has a variance; a run measures the law at its sizes, with the noise of a seed;
    what it takes off the variance is the squared covariance over the variance of what is measured (the normal
    posterior's: Gelman et al., Bayesian Data Analysis, 3rd ed., 2013, section 3.5).
    """
    if made.best is None or len(made.drawn) < 3:
        return None
    experts = [choice.experts for choice in made.drawn[0]]
    lead = experts.index(made.best.experts)
    if made.second is None:
        answer = np.array([math.log(each[lead].size) if not each[lead].reason else math.nan for each in made.drawn])
    else:
        rival = experts.index(made.second[0].experts)
        answer = np.array([each[rival].objective - each[lead].objective for each in made.drawn])
    usable = np.isfinite(answer)
    if usable.sum() < 3 or np.std(answer[usable]) == 0:
        return None
    points, noise = family.points, max(seed_scatter(family.points), 1e-4)
    counts = np.unique(points.sizes["D"])
    beyond = 2 * counts[-1]
    allowed = far or "U" in fit.form.law.sizes or beyond <= points.sizes["U"].max()
    options = []
    for e in np.unique(points.sizes["E"]):
        for at in np.unique(points.sizes[made.size][points.sizes["E"] == e]):
            options += [(e, at, d) for d in [*counts, *([beyond] if allowed else [])]]
    world = law_world(family, fit, made.cost, None)
    table = np.array([
        [math.log(float(law_world(family, fit, made.cost, None, free).loss(at, d, e))) for e, at, d in options]
        for free in drawn_free[usable]
    ])  # fmt: skip
    apart = answer[usable] - answer[usable].mean()
    shared = (table - table.mean(axis=0)).T @ apart / len(apart)
    gained = shared**2 / (table.var(axis=0) + noise**2) / apart.var()
    costs = np.array([float(world.train(at, e)) * d for e, at, d in options])
    good = np.flatnonzero(gained >= HALF_AS_GOOD * gained.max())
    chosen = int(good[np.argmin(costs[good])])
    e, at, d = options[chosen]
    narrower = 1 - math.sqrt(max(0.0, 1 - float(gained[chosen])))
    return Next(proposal(family, made.size, float(at), float(d), float(e)), float(costs[chosen]), narrower)


def read_one(folder: Path) -> FinishedRun:
    """The run of --check.

    Raises:
        UsageError: the folder holds no finished run, or several.
    """
    from softmoe_cli.compare.runs import read_runs

    runs, left_out = read_runs([folder])
    if len(runs) != 1:
        why = f": {left_out[0][1]}" if left_out else ""
        raise UsageError(f"--check {folder} must be the folder of one finished run, and it holds {len(runs)}{why}")
    return runs[0]
