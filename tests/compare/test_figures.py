"""Figures: what they can draw."""

from pathlib import Path
from typing import Any

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.figures import figure_files
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.question import Question
from tests.synthetic import row, write


def test_names_that_figures_cannot_draw(nasty: Comparison) -> None:
    assert all(figure_files(nasty, "pareto").values()) and all(figure_files(nasty, "curves").values())


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
