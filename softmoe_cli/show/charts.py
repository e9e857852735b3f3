"""Curves, calibration and confusion as pictures, for readers and trackers that do not open the page."""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from softmoe_cli.compare.figures import RECIPE, safe
from softmoe_cli.compare.styles import COLOURS, MARKERS
from softmoe_cli.evaluate.quality import Outcomes, reliability
from softmoe_cli.run.rows import COSTS, CURVES
from softmoe_cli.show.record import Record, curve, routing_curves, statistics_of, unchanged
from softmoe_cli.text import shortened

MOST_IN_SQUARE = 50
"""Above so many classes a square of counts shows nothing."""


def chart_files(record: Record, said: Outcomes | None, classes: list[str]) -> dict[str, bytes]:
    """File name to content, of those that there is something for."""
    found: dict[str, Figure] = {}
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(RECIPE)
        curves = {"training": curve(record.of("train")), "validation": curve(record.of("validation"))}
        keys = [key for key in ("loss", "top1_pct", "lr") if any(key in each for each in curves.values())]
        if keys:
            found["curves.png"] = _lines(curves, {key: CURVES[key].title if key in CURVES else key for key in keys})
        layers = routing_curves(record)
        keys = [key for key in statistics_of(layers) if not unchanged(layers, key)]
        if keys:
            found["routing.png"] = _lines(layers, {key: key.replace("_", " ") for key in keys})
        if said is not None:
            found["calibration.png"] = _calibration(said)
            if len(classes) <= MOST_IN_SQUARE:
                found["confusion.png"] = _confusion(said, classes)
        return {name: _file(figure) for name, figure in found.items()}


def _file(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    return out.getvalue()


def _lines(curves: Mapping[str, Mapping[str, list[Any]]], keys: Mapping[str, str]) -> Figure:
    """A panel for each key, over training images; a line for each of the curves that has it, of which 56 differ in
    colour or marker."""
    figure = Figure(figsize=(4.2 * min(3, len(keys)), 2.9 * -(-len(keys) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(keys) // 3), min(3, len(keys)), squeeze=False).flatten()
    for panel, (key, title) in zip(panels, keys.items(), strict=False):
        for place, (name, each) in enumerate(curves.items()):
            if key in each:
                points = [(x, y) for x, y in zip(each["images"], each[key], strict=True) if y is not None]
                panel.plot(*zip(*points, strict=True), label=safe(name), color=COLOURS[place % len(COLOURS)], lw=1.5,
                           marker=MARKERS[place % len(MARKERS)], markevery=-(-len(points) // 30), ms=4)  # fmt: skip
        panel.set_title(safe(title.removeprefix("validation ")), loc="left", fontsize=11)
        panel.set_xlabel(COSTS["images"].title)
    for panel in panels[len(keys) :]:
        panel.remove()
    panels[0].legend(fontsize=9)
    return figure


def _calibration(said: Outcomes) -> Figure:
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    panel = figure.subplots()
    bins = reliability(said.probability, said.right).numpy()
    there = bins[:, 0] > 0
    left = np.arange(len(bins)) / len(bins)
    panel.bar(left[there], bins[there, 1], 1 / len(bins), align="edge", color=COLOURS[6], edgecolor="white")
    panel.plot([0, 1], [0, 1], color="#767676", ls="--", lw=1)
    panel.plot(bins[there, 2], bins[there, 1], "o", color=COLOURS[1], ms=4)
    panel.set_title("dots: at the mean probability of a bar; dashed: no error", loc="left", fontsize=10)
    panel.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the prediction", ylabel="share that is right")
    return figure


def _confusion(said: Outcomes, classes: list[str]) -> Figure:
    counts = said.confusion.numpy()[: len(classes), : len(classes)]
    size = max(3.5, 0.42 * len(classes))
    figure = Figure(figsize=(size + 0.6, size), layout="constrained")
    panel = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = [safe(shortened(name, 12)) for name in classes]
    panel.set_xticks(range(len(names)), names, rotation=90)
    panel.set_yticks(range(len(names)), names)
    panel.set(xlabel="prediction", ylabel="label")
    panel.grid(visible=False)
    if len(classes) <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if share[row, column] > 0.5 else "black"
            panel.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9)
    return figure
