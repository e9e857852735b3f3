"""Names and cells that others wrote, made harmless for terminals and spreadsheets."""

import csv
import io
import os

import pytest

from softmoe_cli.text import printable, spreadsheet_cell


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
