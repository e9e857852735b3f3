"""The figure: loss against training cost by experts, the law's band, held-out runs as hollow points."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softmoe_cli.compare.figures import ABOVE, BETWEEN, LEFT, PLOT_HEIGHT, PLOT_WIDTH, drawn_files, legend_beside, safe
from softmoe_cli.compare.styles import COLOURS, MARKERS
from softmoe_cli.scaling.costs import surface
from softmoe_cli.scaling.fit import percentiles
from softmoe_cli.scaling.holdout import dearest
from softmoe_cli.scaling.report import Report, experts_said

BAND_POINTS = 24


def law_figure(reports: Sequence[Report]) -> dict[str, bytes]:
    """A panel for each router whose runs had a law: file name to content; nothing where none had."""
    shown = [report for report in reports if report.chosen is not None]
    return drawn_files("laws", lambda: _law_panels(shown)) if shown else {}


def _law_panels(shown: Sequence[Report]) -> Figure:
    figure = Figure()
    panels = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    beside = [_law_panel(axes, report) for axes, report in zip(panels, shown, strict=True)]
    width, height = LEFT + PLOT_WIDTH + max(beside), len(shown) * (PLOT_HEIGHT + BETWEEN)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width, right=(LEFT + PLOT_WIDTH) / width, top=1 - ABOVE / height,
        bottom=(BETWEEN - ABOVE) / height, hspace=BETWEEN / PLOT_HEIGHT,
    )  # fmt: skip
    return figure


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
