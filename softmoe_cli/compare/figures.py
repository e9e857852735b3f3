"""A comparison as figures: the Pareto plot and the curves, as SVG, PDF and PNG whose bytes depend on the input only."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from softmoe_cli.compare.findings import provisos
from softmoe_cli.compare.groups import Block, Comparison, Group, equal_costs
from softmoe_cli.compare.intervals import Interval, at_budget
from softmoe_cli.compare.styles import COLOURS, KINDS, reference_points, same_axes, styles
from softmoe_cli.compare.tables import units
from softmoe_cli.run.rows import AXES, CURVES, QUALITIES
from softmoe_cli.text import shortened

FIGURE_FORMATS: dict[str, Any] = {
    "svg": {"metadata": {"Date": None}},
    "pdf": {"metadata": {"CreationDate": None}},
    "png": {"pil_kwargs": {"compress_level": 3}},  # as small as by default, in less time
}
GREY = "#767676"
DRAWN_LETTERS = 120
LEFT, PLOT_WIDTH, PLOT_HEIGHT, ABOVE, BETWEEN = 0.8, 5.2, 3.2, 0.35, 1.15
"""Inches that place the panels: matplotlib's layout engine would take as long as the drawing."""
LEGEND_LINES, LEGEND_PITCH, LEGEND_SAMPLE = 15, 0.25, 0.33
"""Lines of a legend's column; inches from one to the next, and of the sample before each."""
RECIPE: Any = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 12, "pdf.fonttype": 42,
    "svg.hashsalt": "softmoe", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.25, "axes.formatter.useoffset": False, "axes.formatter.limits": (-3, 5),
    "axes.unicode_minus": False,
}  # fmt: skip
"""Fonts are embedded as TrueType, which journals ask for. STIX comes with matplotlib and is embedded fastest; a minus
sign outside ASCII would need a second font."""


def figure_files(comparison: Comparison, name: str) -> dict[str, bytes]:
    """`pareto` or `curves`: file name to content."""
    draw = {"pareto": _pareto, "curves": _curves}[name]
    return drawn_files(name, lambda: _panels(comparison, draw, apart=name == "pareto"))


def drawn_files(name: str, draw: Callable[[], Figure]) -> dict[str, bytes]:
    """A figure that is drawn by RECIPE, in every form: file name to content."""
    files = {}
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RECIPE)
        drawn = draw()
        for form, how in FIGURE_FORMATS.items():
            out = io.BytesIO()
            drawn.savefig(out, format=form, dpi=160, **how)
            files[f"{name}.{form}"] = out.getvalue()
    return files


def rehearse() -> None:
    """Draws one word in every form, which imports whatever matplotlib imports on the way: to be ready."""

    def word() -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, "word")
        return figure

    drawn_files("word", word)


def _panels(comparison: Comparison, draw: Callable[[Axes, Comparison, Block], float], *, apart: bool) -> Figure:
    """A panel per block, one below the other, each with its legend beside it, where the legend covers nothing."""
    other = apart and bool(comparison.reference) and not same_axes(comparison)
    count = len(comparison.blocks) + other
    figure = Figure()
    panels = figure.subplots(count, 1, squeeze=False)[:, 0]
    beside, titles = [], []
    for axes, block in zip(panels, comparison.blocks, strict=False):
        beside.append(draw(axes, comparison, block))
        titles.append(axes.set_title(safe(block.title), loc="left", fontsize=12))
    if other:
        beside.append(_published(panels[-1], comparison))
    title = max(each.get_window_extent().width for each in titles) / figure.dpi
    width = max(LEFT + PLOT_WIDTH + max(beside), LEFT + 0.2 + title)
    height = count * (PLOT_HEIGHT + BETWEEN)
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width,
        right=(LEFT + PLOT_WIDTH) / width,
        top=1 - ABOVE / height,
        bottom=(BETWEEN - ABOVE) / height,
        hspace=BETWEEN / PLOT_HEIGHT,
    )
    return figure


def safe(text: str) -> str:
    """The text without characters that matplotlib reads as mathematics or has no letter for, cut to what a figure can
    show."""
    text = shortened(text.replace("…", "..."), DRAWN_LETTERS, "...")
    shown = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    shown = shown.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


class _Line(Text):
    """One line of text that begins at its place. matplotlib's own draws the same, and measures it anew in each form to
    find where it ends, which takes as long as the drawing."""

    def draw(self, renderer: RendererBase) -> None:
        x, y = self.get_transform().transform(self.get_position())
        if renderer.flipy():
            y = renderer.get_canvas_width_height()[1] - y
        renderer.open_group("text")
        with_colour = renderer.new_gc()
        with_colour.set_foreground(self.get_color())
        letters = self.get_text().replace(r"\$", "$")  # nothing here is mathematics
        renderer.draw_text(with_colour, x, y, letters, self.get_fontproperties(), 0, mtext=self)
        with_colour.restore()
        renderer.close_group("text")


def legend_beside(axes: Axes, handles: Sequence[Line2D], labels: Sequence[str]) -> float:
    """A legend at the panel's side, in columns of up to 15 lines; returns the inches that it needs. Its places are
    reckoned once here, and not anew in each form, as matplotlib's own legend would."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    columns = max(1, math.ceil(len(labels) / LEGEND_LINES))
    lines = max(1, math.ceil(len(labels) / columns))
    left = PLOT_WIDTH + 0.2
    widest = 0.0
    for i, (handle, label) in enumerate(zip(handles, labels, strict=True)):
        if i and i % lines == 0:
            left, widest = left + widest, 0.0
        height = 1 - (0.15 + i % lines * LEGEND_PITCH) / PLOT_HEIGHT
        x = [(left + LEGEND_SAMPLE * share) / PLOT_WIDTH for share in (0, 0.5, 1)]
        sample = Line2D(x, [height] * 3)
        sample.update_from(handle)
        sample.set(transform=axes.transAxes, markevery=[1])
        axes.add_artist(sample).set_clip_on(False)
        at = (left + LEGEND_SAMPLE + 0.12) / PLOT_WIDTH, height - 0.05 / PLOT_HEIGHT
        text = axes.add_artist(_Line(*at, safe(label), transform=axes.transAxes))
        text.set_clip_on(False)
        width = text.get_window_extent(renderer).width / figure.dpi
        widest = max(widest, LEGEND_SAMPLE + 0.12 + width + 0.3)
    return left + widest - PLOT_WIDTH


def _pareto(axes: Axes, comparison: Comparison, block: Block) -> float:
    quality, cost = comparison.quality, comparison.cost
    marks, unit = styles(comparison.groups), units(comparison)[cost]
    handles: list[Any] = []
    labels: list[str] = []
    if comparison.reference and same_axes(comparison):
        points = reference_points(comparison)
        (handle,) = axes.plot(
            [x * unit.factor for x, _, _ in points], [y for _, y, _ in points], ".", color="#BBBBBB", zorder=1
        )
        handles, labels = [handle], [f"reference, not ours: {comparison.reference_name}"]
    costed = [group for group in block.groups if group.intervals[cost] is not None]
    if not costed:
        axes.text(0.5, 0.5, "no group states its cost", ha="center", transform=axes.transAxes, color=GREY)
        return 0.2
    at = {group.label: _point(group, comparison, unit.factor) for group in costed}
    front = sorted(at[group.label] for group in block.groups if group.front)
    (line,) = axes.plot(*zip(*front, strict=True), "--", color=GREY, linewidth=1, zorder=2, drawstyle="steps-post")
    groups = sorted(costed, key=lambda group: list(marks).index(group.label))
    colours = [COLOURS[marks[group.label][0]] for group in groups]
    x, y = np.array([at[group.label] for group in groups]).T
    x_half, y_half = np.array([[half(group.intervals[key]) or 0.0 for group in groups] for key in (cost, quality)])
    x_half *= unit.factor
    equal = not handles and equal_costs(x.tolist())
    if equal:  # in a column they would hide each other, and a finer scale would make much of rounding
        line.set_data([], [])
        axes.set_xticks([(len(x) - 1) / 2], [f"{x.mean():.4g}"])
        axes.set_xlim(-1, len(x))
        x, x_half = np.arange(len(x)), np.zeros(len(x))
    # One call draws all bars: a call per group would double the number of lines in the figure.
    axes.hlines(y, x - x_half, x + x_half, colours, linewidth=1.2, zorder=3)
    axes.vlines(x, y - y_half, y + y_half, colours, linewidth=1.2, zorder=3)
    for i, group in enumerate(groups):
        face = colours[i] if group.front and not equal else "white"
        style: Any = {"color": colours[i], "markerfacecolor": face, "markersize": 8, "zorder": 3}
        handles += axes.plot(x[i], y[i], marks[group.label][1], **style)
        n = " ".join(group.count.split())
        labels.append(f"{group.label} ({', '.join([f'n={n}', *provisos(group, cost)])})")
    if not equal:
        _scale(axes, x)
    axes.set_xlabel(f"{unit.head}, the same for all" if equal else unit.head)
    axes.set_ylabel(QUALITIES[quality].title)
    axes.annotate("bars: 95% t-intervals", (1, -0.17), xycoords="axes fraction", ha="right", va="top",
                  fontsize=10, color=GREY)  # fmt: skip
    front_line = ([], []) if equal else ([line], ["Pareto front (filled)"])
    return legend_beside(axes, handles + front_line[0], labels + front_line[1])


def _point(group: Group, comparison: Comparison, factor: float) -> tuple[float, float]:
    cost, quality = group.intervals[comparison.cost], group.intervals[comparison.quality]
    assert cost is not None and quality is not None
    return cost.mean * factor, quality.mean


def half(interval: Interval | None) -> float | None:
    """Half the interval's width, as an error bar shows it; None where it is unknown or zero."""
    if interval is None or interval.high is None or interval.high == interval.mean:
        return None
    return interval.high - interval.mean


def _scale(axes: Axes, x: Sequence[float]) -> None:
    """Logarithmic where costs span more than a factor of ten."""
    if min(x) > 0 and max(x) > 10 * min(x):
        axes.set_xscale("log")
        # Not "{x:g}": matplotlib would give it a minus that is not ASCII, and embed a second font for that one.
        axes.xaxis.set_major_formatter(lambda x, _place: f"{x:g}")


def curve_axis(comparison: Comparison) -> str:
    return comparison.cost if comparison.cost in AXES else AXES[0]


def _curves(axes: Axes, comparison: Comparison, block: Block) -> float:
    """A thin line per seed, and the mean of a group's seeds where all of them were evaluated."""
    key, axis = QUALITIES[comparison.quality].curve, curve_axis(comparison)
    marks, unit = styles(comparison.groups), units(comparison)[axis]
    handles, labels = [], []
    thin: list[tuple[Any, str]] = []  # drawn in one call, which is much faster
    for group in sorted(block.groups, key=lambda group: list(marks).index(group.label)):
        colour, marker = COLOURS[marks[group.label][0]], marks[group.label][1]
        curves = [[(x * unit.factor, y) for x, y in curve] for run in group.runs if (curve := run.curve(axis, key))]
        thin += [(curve, colour) for curve in curves]
        mean = mean_curve(curves)
        if mean:
            handles += axes.plot(
                *zip(*mean, strict=True), color=colour, marker=marker, linewidth=1.8, markersize=5,
                markevery=max(1, len(mean) // 8), markerfacecolor="white", zorder=2 if marks[group.label][0] else 4,
            )  # fmt: skip
            labels.append(f"{group.label} (n={len(curves)})")
    lines, colours = zip(*thin, strict=True) if thin else ((), ())
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=0.6, alpha=0.35, zorder=1.9))
    axes.set_xlabel(unit.head)
    axes.set_ylabel(CURVES[key].title)
    axes.autoscale_view()
    axes.annotate("thin: each seed; thick: their mean", (1, -0.17), xycoords="axes fraction", ha="right", va="top",
                  fontsize=10, color=GREY)  # fmt: skip
    return legend_beside(axes, handles, labels)


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves at the first one's points, in the range that all of them cover."""
    if not curves:
        return []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    x = [point for point, _ in curves[0] if low <= point <= high]
    reached = [[value for curve in curves if (value := at_budget(curve, point)) is not None] for point in x]
    return [(point, math.fsum(values) / len(curves)) for point, values in zip(x, reached, strict=True)]


def _published(axes: Axes, comparison: Comparison) -> float:
    points = reference_points(comparison)
    handles, labels = [], []
    for (kind, name), colour, marker in zip(KINDS.items(), ("#000000", *COLOURS[1:4]), "osD^", strict=True):
        mine = [(x, y) for x, y, each in points if each == kind]
        if mine:
            handles += axes.plot(*zip(*mine, strict=True), marker, color=colour, markersize=4, markerfacecolor="none")
            labels.append(f"{name}, the paper's")
    _scale(axes, [x for x, _, _ in points])
    axes.set_xlabel("training exaFLOP, the paper's convention")
    axes.set_ylabel("JFT-4B precision@1, %")
    axes.set_title(safe(f"Reference, not ours: {comparison.reference_name}"), loc="left", fontsize=12)
    axes.set_facecolor("#F4F4F4")
    return legend_beside(axes, handles, labels)
