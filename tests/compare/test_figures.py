"""Figures: what they can draw."""

import io
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageOps

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.figures import LEFT, PLOT_HEIGHT, PLOT_WIDTH, figure_files, legend_beside, safe
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.question import Question
from softmoe_cli.text import shortened
from tests.synthetic import row, write


def test_names_that_figures_cannot_draw(nasty: Comparison) -> None:
    assert all(figure_files(nasty, "pareto").values()) and all(figure_files(nasty, "curves").values())


def test_what_was_shortened_before_is_drawn_as_shortened() -> None:
    assert safe(shortened("golden retriever", 12)) == "golden...iever"


@pytest.mark.parametrize(("cost", "column"), [(0.000998, True), (0.00098, False)])
def test_groups_of_equal_cost_are_drawn_beside_each_other(tmp_path: Path, cost: float, column: bool) -> None:
    """A scale of rounding would say that one of them is cheaper; so would a front with the worse one on it."""
    for seed in range(3):
        write(tmp_path / "runs", row(router="dense", seed=seed, name=f"dense{seed}", train_pflop=0.001))
        write(tmp_path / "runs", row(seed=seed, name=f"soft{seed}", train_pflop=cost, top1_pct=10 + seed / 10))
    comparison = compare([tmp_path / "runs"], Question())
    drawn = figure_files(comparison, "pareto")["pareto.svg"].decode()
    told = {group.label: (group.front, group.front_probability) for group in comparison.groups}
    assert told == {"dense": (True, 1.0), "soft": (not column, float(not column))}
    assert ("the same for all" in drawn) == column and ("Pareto front" in drawn) == (not column)
    ticks = re.findall(r'<g id="xtick_\d+">', drawn)
    assert (len(ticks) == 1) == column
    assert not column or "<!-- 999 -->" in drawn, "GFLOP, of both"


def test_names_too_long_to_draw(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    for seed, letters in enumerate(("x" * 20_000, "y" * 20_000)):
        own: dict[str, Any] = {
            "study": letters,
            "model__backbone__name": letters,
            "data": "z" * 20_000,
            "hardware": letters,
        }
        write(tmp_path / "runs", row(seed=seed, name=f"run{seed}", **own))
    comparison = compare([tmp_path / "runs"], Question())
    drawn = figure_files(comparison, "curves")
    assert int.from_bytes(drawn["curves.png"][16:20], "big") < 160 * 25, "inches"
    text = page(comparison, drawn | {"pareto.svg": b""}, tmp_path)
    assert len(text.partition("<h2>")[0]) < 20_000


def test_a_long_title_ends_in_the_figure(tmp_path: Path) -> None:
    for seed, fraction in enumerate((1 / 12, 1 / 14)):
        own: dict[str, Any] = {"data__validation_fraction": fraction, "data": "a set of a long name " * 3}
        write(tmp_path / "runs", row(seed=seed, name=f"run{seed}", **own))
    comparison = compare([tmp_path / "runs"], Question())
    for name in ("pareto", "curves"):
        with Image.open(io.BytesIO(figure_files(comparison, name)[f"{name}.png"])) as picture:
            assert ImageOps.invert(picture.convert("L")).getbbox()[2] < picture.width - 5  # type: ignore[index]


@pytest.mark.parametrize("count", [1, 15, 16, 40])
def test_a_legend_has_room_for_all_its_lines(count: int) -> None:
    """Each beside a sample that looks like what it names; none over another, outside the figure or over the panel."""
    figure = Figure()
    axes = figure.subplots()
    handles = [axes.plot([1], [i], "os"[i % 2], color=f"C{i % 10}", linestyle="--")[0] for i in range(count)]
    limits = axes.get_xlim(), axes.get_ylim()
    beside = legend_beside(axes, handles, [f"arm {i}" + i % 7 * " wide" for i in range(count)])
    assert (axes.get_xlim(), axes.get_ylim()) == limits, "samples are no data"
    width, height = LEFT + PLOT_WIDTH + beside, PLOT_HEIGHT + 1.2
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=LEFT / width, right=(LEFT + PLOT_WIDTH) / width, top=1 - 0.2 / height, bottom=1 / height
    )
    texts, samples = axes.texts, axes.lines[count:]
    boxes = [each.get_window_extent() for each in texts]
    assert [each.get_text().split()[1] for each in texts] == [str(i) for i in range(count)]
    for i, (box, sample, handle) in enumerate(zip(boxes, samples, handles, strict=True)):
        for what in ("color", "marker", "linestyle", "markerfacecolor"):
            assert getattr(sample, f"get_{what}")() == getattr(handle, f"get_{what}")()
        own = sample.get_window_extent()
        assert box.y0 < (own.y0 + own.y1) / 2 < box.y1 and own.x1 < box.x0
        assert axes.bbox.x1 < own.x0 and box.y0 > 0 and box.x1 < figure.bbox.x1 and box.y1 < figure.bbox.y1
        assert not any(box.overlaps(other) or own.overlaps(other) for other in boxes[:i])


def test_lines_of_a_legend_are_drawn_as_matplotlib_draws_them(
    compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte, in every form."""
    compared.groups[0].label = "$8, fi_ff"
    ours = figure_files(compared, "curves")
    monkeypatch.setattr("softmoe_cli.compare.figures._Line.draw", Text.draw)
    assert figure_files(compared, "curves") == ours
