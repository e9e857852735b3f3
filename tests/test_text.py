"""Numbers with their units; names and cells that others wrote, made harmless for terminals and spreadsheets."""

import csv
import io
import os

import pytest

from softmoe_cli.text import flop, gibibytes, in_words, printable, spreadsheet_cell


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"), (0.0234, "23.4 ms"), (0.9996, "1.0 s"), (1.58, "1.6 s"), (9.96, "10 s"), (59.6, "1 min"),
        (63, "1 min 3 s"), (3599.7, "1 h"), (3900, "1 h 5 min"), (54_000, "15 h"), (47.999 * 3600, "48 h"),
        (300_000, "3.5 days"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_units_are_chosen() -> None:
    assert [flop(n) for n in (24.25e6, 1.5e9, 3.924e11, 2.2e15, 9e20, 12, 0)] == [
        "24.25 MFLOP", "1.5 GFLOP", "392.4 GFLOP", "2.2 PFLOP", "900 EFLOP", "12 FLOP", "0 FLOP"
    ]  # fmt: skip
    assert [gibibytes(n * 2**20) for n in (0.5, 12.34, 200, 3000)] == ["0.5 MiB", "12.3 MiB", "0.20 GiB", "2.93 GiB"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x9b31m", "\\x9b31m"),
        ("line\u2028break", "line\\u2028break"),
        ("file\u202egpj.exe", "file\\u202egpj.exe"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_an_escape(name: str, shown: str) -> None:
    assert printable(name) == shown
    printable(name).encode()  # everything that is left can be written


@pytest.mark.parametrize(
    "name", ["vit_s16", "Löwe", "猫 と 犬", "نیم\u200cفاصله", "a\u00a0b", "👩\u200d🔬", ":dog:", "C:\\x", ""]
)
def test_other_names_stay_as_they_are(name: str) -> None:
    assert printable(name) == name


def test_cells_that_a_spreadsheet_would_compute() -> None:
    for text in ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1+1", "-"):
        assert spreadsheet_cell(text) == f"'{text}"
    for value in ("soft", "-1", "+1.5e3", "-inf", "a=b", "", -0.5, 3, None, True):
        assert spreadsheet_cell(value) is value
    out = io.StringIO()
    csv.writer(out).writerow([spreadsheet_cell("=1,2"), spreadsheet_cell(-1.5)])
    assert out.getvalue() == '"\'=1,2",-1.5\r\n'
