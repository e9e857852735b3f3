"""The figures: loss against training cost by experts with the law's band, and lines of equal loss over size and images;
held-out runs are hollow points."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from softmoe_cli.compare.figures import ABOVE, BETWEEN, LEFT, PLOT_HEIGHT, PLOT_WIDTH, drawn_files, legend_beside, safe
from softmoe_cli.compare.styles import COLOURS, MARKERS
from softmoe_cli.scaling.answer import sizes_at
from softmoe_cli.scaling.costs import surface
from softmoe_cli.scaling.fit import percentiles
from softmoe_cli.scaling.holdout import dearest
from softmoe_cli.scaling.report import Report, experts_said
from softmoe_cli.text import si

BAND_POINTS = 24
ISO_POINTS = 40
MOST_TICKS = 6
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Lines of equal loss: quantiles of the runs' losses."""


def law_figures(reports: Sequence[Report]) -> dict[str, bytes]:
    """`laws` and `iso_loss`, a panel for each router whose runs had a law, and one of size and images: file name to
    content; nothing where none had."""
    shown = [report for report in reports if report.chosen is not None]
    drawn = drawn_files("laws", lambda: _panels(shown, _law_panel)) if shown else {}
    flat = [report for report in shown if report.chosen is not None and _flat(report.chosen.form.law.sizes)]
    return drawn | (drawn_files("iso_loss", lambda: _panels(flat, _iso_panel)) if flat else {})


def _flat(sizes: Sequence[str]) -> bool:
    """Whether a law, of so many experts, is one of size and images alone."""
    return "D" in sizes[1:] and "G" not in sizes


def _panels(shown: Sequence[Report], draw: Callable[[Axes, Report], float]) -> Figure:
    figure = Figure()
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    beside = [draw(axes, report) for axes, report in zip(panels, shown, strict=True)]
    width, height = LEFT + PLOT_WIDTH + max(beside), len(shown) * (PLOT_HEIGHT + BETWEEN)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width, right=(LEFT + PLOT_WIDTH) / width, top=1 - ABOVE / height,
        bottom=(BETWEEN - ABOVE) / height, hspace=BETWEEN / PLOT_HEIGHT,
    )  # fmt: skip
    return figure


def _iso_panel(axes: Axes, report: Report) -> float:
    """Sizes and images with the same loss by the law, a colour for each number of experts: where the line of more
    experts lies below and to the left, they reach that loss with less."""
    fit, points = report.chosen, report.family.points
    assert fit is not None
    name, images = fit.form.law.sizes[0], points.sizes["D"]
    held, handles, labels = dearest(points), [], []
    experts = points.sizes.get("E", np.ones(len(points.loss)))
    levels = np.unique(np.quantile(points.loss, LEVELS))
    for place, e in enumerate(np.unique(experts)):
        mine = experts == e
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        size = points.sizes[name][mine]
        style: dict[str, Any] = {"color": colour, "markersize": 5, "clip_on": False}
        (handle,) = axes.plot(size[~held[mine]], images[mine & ~held], marker, **style)
        axes.plot(size[held[mine]], images[mine & held], marker, markerfacecolor="white", **style)
        if len(np.unique(size)) > 1 and len(np.unique(images[mine])) > 1:
            wide, tall = np.meshgrid(*(np.geomspace(x.min(), x.max(), ISO_POINTS) for x in (size, images[mine])))
            loss = np.asarray(fit.predict(sizes_at(report.family, wide, tall, float(e))))
            lines = axes.contour(wide, tall, loss, levels, colors=colour, linewidths=1)
            if place == 0:  # the others lie beside it
                axes.clabel(lines, fmt="%.3g", fontsize=9)
        handles.append(handle)
        labels.append(experts_said(float(e)))
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, values in ((axes.xaxis, points.sizes[name]), (axes.yaxis, images)):
        at = np.unique(values)
        axis.set_major_locator(FixedLocator(at[:: math.ceil(len(at) / MOST_TICKS)].tolist()))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda x, _place: si(float(f"{x:.3g}")))
    axes.set_xlabel(safe(f"size {name}"))
    axes.set_ylabel("images")
    axes.set_title(safe(f"{report.family.name}: equal loss by {fit.form.law.name}"), loc="left", fontsize=12)
    return legend_beside(axes, handles, labels)


def _law_panel(axes: Axes, report: Report) -> float:
    fit, points = report.chosen, report.family.points
    assert fit is not None
    held, handles, labels = dearest(points), [], []
    first = fit.form.law.sizes[0]
    experts = points.sizes.get("E", np.ones(len(points.loss)))
    for place, e in enumerate(np.unique(experts)):
        mine = experts == e
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        style: dict[str, Any] = {"color": colour, "markersize": 5}
        (handle,) = axes.plot(points.cost[mine & ~held], points.loss[mine & ~held], marker, **style)
        axes.plot(points.cost[mine & held], points.loss[mine & held], marker, markerfacecolor="white", **style)
        if "D" in points.sizes and first in points.sizes:
            for size in np.unique(points.sizes[first][mine]):
                _band(axes, report, mine & (points.sizes[first] == size), colour)
        handles.append(handle)
        labels.append(experts_said(float(e)))
    axes.set_xscale("log")
    axes.set_xlabel("training PFLOP")
    axes.set_ylabel(safe(report.quality if not points.share else f"error, from {report.quality}"))
    axes.xaxis.set_major_formatter(lambda x, _place: f"{x:g}")
    axes.set_title(safe(f"{report.family.name}: {fit.form.law.name}"), loc="left", fontsize=12)
    axes.annotate(
        "bands: 95% of the bootstrap, one for each size; hollow: held out for the law's error", (1, -0.17),
        xycoords="axes fraction", ha="right", va="top", fontsize=10, color="#767676",
    )  # fmt: skip
    return legend_beside(axes, handles, labels)


def _band(axes: Axes, report: Report, mine: np.ndarray, colour: str) -> None:
    """The law over the images of one size, as far as the runs go."""
    fit, points = report.chosen, report.family.points
    assert fit is not None
    images = points.sizes["D"][mine]
    if len(np.unique(images)) < 2:
        return
    along = np.geomspace(images.min(), images.max(), BAND_POINTS)
    of = {name: np.full(BAND_POINTS, values[mine][0]) for name, values in points.sizes.items()} | {"D": along}
    cost = surface(images, np.ones(len(images)), points.cost[mine])(along, 1.0)
    of["C"] = cost
    axes.plot(cost, fit.predict(of), color=colour, linewidth=1, zorder=1.8)
    if len(report.draws):
        drawn = np.array([fit.predict(of, free) for free in report.draws])
        low, high = np.array([percentiles(column) for column in drawn.T]).T
        if np.all(np.isfinite(low)) and not math.isclose(float(low[0]), float(high[0])):
            axes.fill_between(cost, low, high, color=colour, alpha=0.18, linewidth=0)
