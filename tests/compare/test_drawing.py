"""Figures that other processes draw."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from softmoe_cli.cli import run
from softmoe_cli.compare.drawing import drawing, figures
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.errors import RunError, UsageError
from tests.synthetic import study

FIGURE_FILES = "softmoe_cli.compare.figures.figure_files"


def drawn_beside(comparison: Comparison) -> dict[str, bytes]:
    with drawing() as drawn:
        drawn.begin(comparison)
        return drawn.files()


@pytest.fixture(autouse=True)
def _no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softmoe_cli.compare.figures.rehearse", lambda: None)


def test_each_process_draws_what_would_be_drawn_here(compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the whole comparison, each figure in a process of its own."""
    here = os.getpid()

    def draw(comparison: Comparison, name: str) -> dict[str, bytes]:
        return {name: repr(comparison).encode(), f"{name} {os.getpid()}": b""}

    monkeypatch.setattr(FIGURE_FILES, draw)
    mine, theirs = figures(compared), drawn_beside(compared)
    assert [file for file in mine if f" {here}" not in file] == [file for file in theirs if " " not in file]
    assert all(mine[name] == theirs[name] for name in ("curves", "pareto"))
    processes = {int(file.split()[1]) for file in theirs if " " in file}
    assert len(processes) == 2 and here not in processes


@pytest.mark.parametrize("figure", ["curves", "pareto"])
def test_what_breaks_there_breaks_here(figure: str, compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: Comparison, name: str) -> dict[str, bytes]:
        if name == figure:
            raise LookupError("no such colour")
        return {}

    monkeypatch.setattr(FIGURE_FILES, draw)
    with pytest.raises(LookupError, match="no such colour") as raised:
        drawn_beside(compared)
    assert "in draw" in raised.value.__notes__[0], "where it broke"


def test_what_breaks_before_there_is_something_to_draw(compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def rehearse() -> None:
        raise ImportError("matplotlib is damaged")

    monkeypatch.setattr("softmoe_cli.compare.figures.rehearse", rehearse)
    with pytest.raises(ImportError, match="matplotlib is damaged"):
        drawn_beside(compared)


@pytest.mark.parametrize("figure", ["curves", "pareto"])
def test_a_killed_process_is_said(figure: str, compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: Comparison, name: str) -> dict[str, bytes]:
        if name == figure:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    monkeypatch.setattr(FIGURE_FILES, draw)
    with pytest.raises(RunError, match="was killed, which is what the system does when memory runs out"):
        drawn_beside(compared)


def test_no_process_is_left_where_there_is_nothing_to_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study(tmp_path / "runs")
    code, why = run(["compare", "runs", "--where", "router=none"])
    assert code == 2 and "router" in why
    assert multiprocessing.active_children() == []
    with pytest.raises(UsageError), drawing():
        raise UsageError("stopped")
    assert multiprocessing.active_children() == []
