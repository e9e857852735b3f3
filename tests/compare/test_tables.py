"""A comparison as CSV, JSON, Markdown, LaTeX and on a terminal."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from softmoe_cli.compare.flat import comma_separated, flat_rows, json_text
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.tables import latex, markdown, tables, terminal


def test_csv_reads_back_to_the_same_numbers(compared: Comparison) -> None:
    back = list(csv.DictReader(comma_separated(compared).splitlines()))
    assert len(back) == 3
    for read, wrote in zip(back, flat_rows(compared), strict=True):
        for key, value in wrote.items():
            kept = read[key]
            assert (
                (float(kept) == value) if isinstance(value, float) else (kept == ("" if value is None else str(value)))
            )
    dense = next(each for each in back if each["group"] == "dense")
    assert float(dense["top1_pct_mean"]) == 91
    assert dense["seeds"] == "0 1 2"
    assert float(dense["top1_pct_at_train_pflop_0.000128_mean"]) == pytest.approx(92)


def test_json_holds_everything(compared: Comparison) -> None:
    back = json.loads(json_text(compared))
    soft = back["blocks"][0]["groups"][0]
    assert (soft["label"], soft["verdict"], soft["baseline"]) == ("soft", "better", "dense")
    top1 = compared.groups[0].intervals["top1_pct"]
    assert top1 is not None and soft["figures"]["top1_pct"]["mean"] == top1.mean
    assert [run["top1_pct"] for run in soft["runs"]] == [run.row["top1_pct"] for run in compared.groups[0].runs]
    assert len(soft["budgets"][0]["values"]) == 3


@pytest.mark.parametrize("which", ["compared", "nasty"])
def test_markdown_tables_have_as_many_cells_as_heads(which: str, request: pytest.FixtureRequest) -> None:
    comparison = request.getfixturevalue(which)
    text = markdown(comparison)
    bodies = [part.split("\n\n")[1].splitlines() for part in text.split("## ")[1:] if "\n\n| " in part]
    assert len(bodies) == len(tables(comparison))
    for lines, table in zip(bodies, tables(comparison), strict=True):
        cells = [line.replace("\\|", "").strip()[1:-1].split("|") for line in lines]
        assert {len(each) for each in cells} == {len(table.head)}
        assert all(set(rule.strip()) <= set("-:") and "-" in rule for rule in cells[1])
        assert len(lines) == 2 + len(table.rows)
    assert "<b>" not in text.replace("\\<b\\>", "")


@pytest.mark.parametrize("which", ["compared", "nasty"])
def test_latex(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Compiles, where there is a TeX; nothing in it is left to TeX's own reading."""
    comparison = request.getfixturevalue(which)
    text, number = latex(comparison), len(tables(comparison))
    bare = text.replace("\\&", "").replace("\\%", "").replace("\\#", "").replace("\\_", "").replace("\\$", "")
    rows = [line for line in bare.splitlines() if line.endswith(r" \\")]
    assert len({line.count("&") for line in rows}) == 2, "wide tables and narrow ones"
    for line in rows:
        assert not set("%#_~^") & set(line)
    assert text.count("\\toprule") == text.count("\\bottomrule") == number
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here: escapes only")
    (tmp_path / "table.tex").write_text(text)
    (tmp_path / "doc.tex").write_text(
        r"\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs}\usepackage{graphicx}\begin{document}\input{table.tex}\end{document}"
    )
    told = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "doc.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout[-2000:]
    assert "undefined" not in told.stdout and "Overfull" not in told.stdout


def test_a_terminal_of_eighty_columns(compared: Comparison) -> None:
    """What decides fits; a file has a line for each group instead."""
    told = terminal(compared, 80)
    assert max(map(len, told.splitlines())) <= 80
    head = told.splitlines()[1:3]
    assert all(word in " ".join(head) for word in ("group", "minus dense", "verdict", "GFLOP"))
    assert "parameters" not in told.partition("On the front")[0], "the rest with --columns"
    soft, _ = [line for line in terminal(compared).splitlines() if re.match("soft  +3", line) and "better" in line]
    assert soft.split() == ["soft", "3", "94.01", "±", "2.40", "+3.01", "±", "0.22", "better,", "at", "16%", "more",
                            "training", "FLOPs", "148.5"]  # fmt: skip
    sentence = "soft is better than dense in test top-1: +3.01 ± 0.22 points (p = 0.00057, 3 seeds); at 16% more"
    assert sentence in told.replace("\n  ", " ")


def test_equal_cost_has_differences_and_verdicts(compared: Comparison) -> None:
    table = tables(compared)[1]
    assert table.head == ["group", "n", "at training GFLOP", "validation top-1, %", "minus dense", "verdict"]
    assert [row[2] for row in table.rows] == ["32"] * 3 + ["64"] * 3 + ["128"] * 3
    soft = compared.groups[0].budgets[2]
    assert soft.difference is not None
    (row,) = [row for row in table.rows if row[0] == "soft" and row[2] == "128"]
    assert row[4].startswith(f"{soft.difference.interval.mean:+.2f} ± ") and row[5] == soft.verdict == "worse"
    told = flat_rows(compared)[0]
    assert told["top1_pct_at_train_pflop_0.000128_difference_mean"] == soft.difference.interval.mean
    assert told["top1_pct_at_train_pflop_0.000128_verdict"] == "worse"
    dense = [row for row in table.rows if row[0] == "dense"]
    assert all(row[4:] == ["", "baseline"] for row in dense)


def test_words_stand_in_the_row(odd: Comparison) -> None:
    rows = {row[0]: dict(zip(tables(odd)[0].head, row, strict=True)) for row in tables(odd)[0].rows}
    chance = next(row for label, row in rows.items() if label.startswith("vit_nano2, soft"))
    assert chance["test top-1, %"] == "33.30\nat chance" and chance["front"] == "yes,\nat chance"
    known = next(row for label, row in rows.items() if "SUM" in label)
    unknown = next(row for label, row in rows.items() if "@x" in label)
    assert known["training GFLOP"] == "148.5\n+ 2,000 of its checkpoint"
    assert unknown["training GFLOP"] == "148.5\n+ pretraining, not counted"
    assert known["front"] == unknown["front"] == "yes,\npretraining not counted" or not unknown["front"]
    assert "pretraining counted" in known["verdict"] and "pretraining not counted" in unknown["verdict"]
    back = {each["group"]: each for each in csv.DictReader(comma_separated(odd).splitlines())}
    cells = next(each for label, each in back.items() if "SUM" in label)
    assert cells["group"].startswith("'=SUM(A1)"), "no spreadsheet computes it"
    assert (cells["pretrained"], float(cells["checkpoint_train_pflop"])) == ("True", 0.002)
    assert cells["conditions"].endswith("; pretraining counted") and cells["at_chance"] == "False"
    told = {each["label"]: each for each in json.loads(json_text(odd))["blocks"][0]["groups"]}
    assert next(each for label, each in told.items() if "@x" in label)["checkpoint_train_pflop"] is None
    assert any(each["at_chance"] for each in told.values())


def test_a_minus_is_no_hyphen_in_latex(compared: Comparison, odd: Comparison) -> None:
    for comparison in (compared, odd):
        text = latex(comparison)
        assert re.search(r"& \$-\$\d", text) and not re.search(r"& -\d", text)
