"""Quality against the tuned value, a line for each arm, as SVG, PDF and PNG."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from softmoe_cli.compare.figures import (
    ABOVE,
    BETWEEN,
    LEFT,
    PLOT_HEIGHT,
    PLOT_WIDTH,
    drawn_files,
    half,
    legend_beside,
    safe,
)
from softmoe_cli.compare.styles import COLOURS, MARKERS
from softmoe_cli.run.rows import QUALITIES, number
from softmoe_cli.settle.tune import Tuned


def tuning_figure(found: Sequence[Tuned], key: str) -> dict[str, bytes]:
    """File name to content."""
    return drawn_files("tuning", lambda: _draw(found, key))


def _draw(found: Sequence[Tuned], key: str) -> Figure:
    by = found[0].by
    values = [trial.value for each in found for trial in each.trials]
    numbers = all(map(number, values))
    values = values if numbers else [trial.value for trial in found[0].trials]
    drawn = Figure()
    axes = drawn.subplots()
    handles: list[Any] = []
    for place, each in enumerate(found):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        means = [(trial, mean) for trial in each.trials if (mean := trial.mean(by))]
        points = sorted(
            ((trial.value if numbers else values.index(trial.value)), mean.mean, half(mean) or 0.0, trial is each.best)
            for trial, mean in means
        )
        x, y, bars, best = zip(*points, strict=True)
        axes.vlines(x, [m - b for m, b in zip(y, bars, strict=True)], [m + b for m, b in zip(y, bars, strict=True)],
                    colour, linewidth=1.2)  # fmt: skip
        handles += axes.plot(x, y, color=colour, marker=marker, markersize=7, markerfacecolor="white")
        at = best.index(True)
        axes.plot(x[at], y[at], marker, color=colour, markersize=10)
    if not numbers:
        axes.set_xticks(range(len(values)), [safe(str(value)) for value in values])
    elif min(values) > 0 and max(values) > 10 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _place: f"{x:g}")
    axes.set_xlabel(safe(key))
    axes.set_ylabel(QUALITIES[by].title)
    axes.set_title("filled: chosen; bars: 95% t-intervals over seeds", loc="left", fontsize=10)
    beside = legend_beside(axes, handles, [each.arm for each in found])
    width, height = LEFT + PLOT_WIDTH + beside, PLOT_HEIGHT + BETWEEN
    drawn.set_size_inches(width, height)
    drawn.subplots_adjust(
        left=LEFT / width, right=(LEFT + PLOT_WIDTH) / width, top=1 - ABOVE / height, bottom=(BETWEEN - ABOVE) / height
    )
    return drawn
