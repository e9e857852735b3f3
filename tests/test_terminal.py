"""Rows and evaluations on terminals of some width."""

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from softmoe_cli import text
from softmoe_cli.launch.tables import fitted
from softmoe_cli.terminal import Listened, Screen
from softmoe_cli.text import aligned
from tests.conftest import TINY
from tests.terminals import on_pty


def on_terminal(width: int) -> tuple[Screen, io.StringIO]:
    screen, out = Screen(), io.StringIO()
    screen.console = Listened(
        file=out, force_terminal=True, width=width, highlight=False, soft_wrap=True, no_color=True
    )
    return screen, out


def test_rows_wrap_between_words_on_a_terminal() -> None:
    screen, out = on_terminal(60)
    words = "soft (num_experts=16, slots_per_expert=1) in blocks [3, 4, 5]; 0.25 slots per token"
    screen.row("router", words)
    lines = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 60
    assert all(line.startswith(" " * 19) for line in lines[1:])
    assert " ".join(line[19:] for line in lines) == words
    long = "outputs/" + "x" * 80
    screen.row("folder", long)
    assert long in out.getvalue()


@pytest.mark.parametrize("words", ["outputs/a\\", "[bold]x[/bold]", "a\\[b]", "[/]", "a\\\\", ":smile:"])
def test_what_looks_like_markup_is_printed_as_it_is(words: str) -> None:
    screen, out = on_terminal(80)
    screen.say(words)
    screen.table(words, {"folder": words})
    plain = re.sub(r"\x1b\[\d+m", "", out.getvalue())
    assert plain == f"{words}\n{words}\n  {'folder':<17}{words}\n"


def test_an_evaluation_fits_80_columns() -> None:
    row = {"split": "validation", "step": 123_456, "epoch": 1234.5, "loss": 12.3456, "top1_pct": 100.0}
    row |= {"train_pflop": 0.1234567, "device_s": 47.9}
    screen, out = on_terminal(80)
    screen.evaluation(row, "best")
    assert out.getvalue() == "validation  step 123,456  loss 12.3456  top-1 100.00%  123.5 TFLOP  48 s  best\n"
    screen, out = on_terminal(120)
    screen.evaluation(row)
    assert "epoch 1234.50" in out.getvalue()


def test_an_evaluation_fits_60_columns() -> None:
    row = {"split": "validation", "step": 123_456, "epoch": 1234.5, "loss": float("nan"), "top1_pct": 100.0}
    row |= {"train_pflop": 0.1234567, "device_s": 47.9}
    screen, out = on_terminal(60)
    screen.evaluation(row, "best")
    assert out.getvalue() == "validation  step 123,456  loss nan  top-1 100.00%  best\n"
    screen, out = on_terminal(60)
    screen.evaluation(row | {f"task_number_{i}_top1_pct": 10.0 * i for i in range(6)})
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) > 1
    assert re.findall(r"number_(\d) (\d+)\.00%", " ".join(line.strip() for line in lines)) == [
        (str(i), str(10 * i)) for i in range(6)
    ]


@pytest.mark.parametrize("width", [1, 12, 15])
def test_a_terminal_too_narrow_for_anything_stops_no_run(width: int) -> None:
    screen, out = on_terminal(width)
    row = {"split": "test", "step": 3, "epoch": 1.0, "loss": 1.0, "top1_pct": 1.0, "train_pflop": 0.1, "device_s": 3.0}
    screen.evaluation(row | {"task_digits_top1_pct": 10.0}, "best")
    screen.sentence("said of a run")
    screen.row("key", "a value")
    shown = "".join(out.getvalue().split())
    assert all(word in shown for word in ("digits10.00%", "best", "saidofarun", "avalue"))


def test_a_sweeps_table_fits_60_columns() -> None:
    names = [f"model/router={name} model.router.num_experts=128 seed={i}" for i, name in enumerate(("soft", "dense"))]
    states = [["running or killed", "100%", "23 h 59 min", "100.00%", "07.log"], ["over the limit", "-", "-", "-", "-"]]
    rows = [
        ["run", "state", "progress", "eta", "val top-1", "log"],
        *([n, *s] for n, s in zip(names, states, strict=True)),
    ]
    lines = fitted(rows, 65).splitlines()
    assert max(map(len, lines)) <= 65
    calm = [[name, "running", "67%", "1 min 3 s", "97.90%", "00.log"] for name in names]
    lines = fitted([rows[0], *calm], 60).splitlines()
    assert max(map(len, lines)) <= 60 and [line.split("  ")[0][-6:] for line in lines[1:]] == ["seed=0", "seed=1"]


def test_wide_letters_take_two_columns() -> None:
    """A Chinese or Japanese name of a job, and an accent that takes none, stand in columns as others do."""
    rows = [["run", "state"], ["data.root=花の写真 seed=0", "running"], ["cafe\u0301", "done"]]
    for table in (aligned(rows, markdown=False), text.folded(rows, 60)):
        assert [cell_len(line) for line in table.splitlines()] == [34] * 3
    lines = fitted(rows, 20).splitlines()
    assert [cell_len(line) for line in lines] == [19] * 3 and lines[1] == "…真 seed=0  running"
    assert text.folded([["x", "花 花 花 花"]], 6).splitlines() == ["x   花", *["    花"] * 3]


LONG = re.compile(r"outputs/\S{20,}|softmoe: ")
"""A folder or a command is one word, to be copied whole; the terminal breaks it. So it does with errors."""


def wider(lines: list[str], columns: int) -> list[str]:
    return [line for line in lines if len(line) > columns and not LONG.search(line)]


@pytest.mark.thorough
@pytest.mark.parametrize("columns", [60, 200])
def test_a_run_fits_60_columns(columns: int, tmp_path: Path) -> None:
    """On a terminal so wide, and on a wider one where COLUMNS says so."""
    words = ["model/router=zero_computation", "train.steps=9", "train.eval_every=3", "study=a_study"]
    environment = {"COLUMNS": "60"} if columns > 60 else {}
    code, lines = on_pty(tmp_path, columns, ["train", *TINY, *words, "threads=1"], **environment)
    assert code == 0 and wider(lines, 60) == []
    shown = "\n".join(lines)
    for word in ("capacity_counts_choices=True", "a step:", "validation  step       9", "test top-1", "next", "━"):
        assert word in shown


@pytest.mark.thorough
def test_a_sweep_fits_60_columns(tmp_path: Path) -> None:
    """With long names of routers, a job that ends at NaN, and what it says of the jobs before them."""
    words = ["model/router=tokens_choice_dropless,zero_computation", "optim.lr=0.003,1e9", "train.steps=4"]
    command = ["train", "-m", *TINY, *words, "threads=1", "train.batch_size=8"]
    code, lines = on_pty(tmp_path, 60, [*command, "--plan"])
    assert code == 0 and wider(lines, 60) == [] and sum("waiting" in line for line in lines) == 4
    code, lines = on_pty(tmp_path, 60, command)
    assert code == 1, lines
    ends = next(place for place, line in enumerate(lines) if "jobs failed; type" in line)
    assert wider(lines[:ends], 60) == []  # what failed is told with its reasons, sentences that a terminal breaks
    assert any("running" in line for line in lines) and sum("failed " in line for line in lines[:ends]) >= 2
