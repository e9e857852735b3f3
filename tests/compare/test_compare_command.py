"""The files that `softmoe compare` writes, read back; the command itself, on runs made up and on runs trained."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import pytest

from softmoe_cli.compare import command as compare_command
from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.command import PAPER, _reference, _settings
from softmoe_cli.compare.figures import figure_files
from softmoe_cli.compare.groups import Comparison, Question
from softmoe_cli.compare.styles import reference_points, styles
from softmoe_cli.compare.tables import comma_separated, flat_rows, json_text, latex, markdown, tables, terminal
from softmoe_cli.errors import UsageError
from tests.conftest import TINY, Softmoe
from tests.processes import Started
from tests.synthetic import row, study, write
from tests.wandb_file import recorded

NASTY = "</script><b>&\"'|`*_x_* ~^#$%{}\\ é [l](u) $\\alpha$"


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    return compare([study(tmp_path / "made_up")], Question())


@pytest.fixture
def nasty(tmp_path: Path) -> Comparison:
    """Words that every format takes for its own, in every place that files can put words into."""
    for seed in range(3):
        for kind in ("", NASTY):
            write(
                tmp_path / "runs", row(seed=seed, top1_pct=90 + seed, study=NASTY, model__backbone__name=f"net{kind}")
            )
    (tmp_path / "runs" / "<i>empty").mkdir()
    return compare([tmp_path / "runs"], Question(columns=("study",)))


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
        cells = [line.replace("\\|", "").strip("| ").split("|") for line in lines]
        assert {len(each) for each in cells} == {len(table.head)}
        assert all(set(rule.strip()) <= set("-:") and "-" in rule for rule in cells[1])
        assert len(lines) == 2 + len(table.rows)
    assert "<b>" not in text.replace("\\<b\\>", "")


@pytest.mark.parametrize("which", ["compared", "nasty"])
def test_latex(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Compiles, where there is a TeX; nothing in it is left to TeX's own reading."""
    text = latex(request.getfixturevalue(which))
    bare = text.replace("\\&", "").replace("\\%", "").replace("\\#", "").replace("\\_", "").replace("\\$", "")
    rows = [line for line in bare.splitlines() if line.endswith(r" \\")]
    assert len({line.count("&") for line in rows}) == 2, "two tables"
    for line in rows:
        assert not set("%#_~^") & set(line)
    assert text.count("\\toprule") == text.count("\\bottomrule") == 2
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


def test_page_has_a_section_for_each_block(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    study(tmp_path)
    for hardware in ("AMD: one", "AMD: two"):
        write(tmp_path / hardware, row(seed=7, hardware=hardware, train__minutes=5))
        write(tmp_path / hardware, row(seed=len(hardware) + ord(hardware[-1]), hardware=hardware, train__minutes=5))
    comparison = compare([tmp_path], Question())
    sections = page(comparison, {"pareto.svg": b"", "curves.svg": b""}, tmp_path).split("<section>")[1:]
    assert [each.partition("</section>")[0].count("<table ") for each in sections] == [3, 3, 3]


def test_page_draws_seconds_of_one_machine_only(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    def axes() -> list[str]:
        text = page(compare([study_folder], Question()), {"pareto.svg": b"", "curves.svg": b""}, tmp_path)
        return list(json.loads(text.partition('id="data">')[2].partition("</script>")[0])["axes"][0])

    study_folder = study(tmp_path / "runs")
    assert axes() == ["train_pflop", "device_s", "images"]
    write(study_folder, row(seed=5, hardware="NVIDIA H100"))
    assert axes() == ["train_pflop", "images"]


class Reader(HTMLParser):
    """Checks that what opens closes, and gathers attributes, data and words."""

    VOID = ("meta", "img", "br", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.mark.parametrize("which", ["compared", "nasty"])
def test_page_stands_alone(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    comparison = request.getfixturevalue(which)
    text = page(comparison, {"pareto.svg": b"<svg/>", "curves.svg": b"<svg/>"}, tmp_path)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    links = [value or "" for name, value in reader.attributes if name == "href"]
    assert all((tmp_path / unquote(link)).is_dir() for link in links) and len(links) == sum(
        len(group.runs) for group in comparison.groups
    )
    assert all((value or "").startswith("data:") for name, value in reader.attributes if name == "src")
    data, _ = reader.words["script"]
    told = json.loads(data)
    labels = {each["label"] for each in told["blocks"][0]}
    assert labels == {group.label for group in comparison.groups}
    assert "routing_utilisation" in next(each for each in told["blocks"][0] if each["label"] != "dense")["names"]
    assert "b" not in reader.words, "no tag that a run's name brought along"
    assert any("utilisation" in word for word in reader.words["button"])
    assert labels <= set(reader.words["th"])


def test_the_same_bytes_again_and_without_torch(softmoe: Softmoe, tmp_path: Path) -> None:
    """All files, in another process and under other settings of matplotlib."""
    study(tmp_path / "runs")
    assert softmoe("compare", "runs", "--out", "a").code == 0
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.hashsalt: other\n")
    code = """
import sys
sys.argv = ["softmoe", "compare", "runs", "--out", "b"]
from softmoe_cli.cli import main
try:
    main()
finally:
    print("HEAVY", [name for name in ("torch", "timm", "wandb", "hydra") if name in sys.modules])"""
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "HEAVY []" in told.stdout
    forms = {"table": ("md", "tex", "csv", "json"), "pareto": ("svg", "pdf", "png"), "curves": ("svg", "pdf", "png")}
    files = sorted(["index.html", *(f"{name}.{form}" for name in forms for form in forms[name])])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    for name in ("pareto", "curves"):
        drawn = (tmp_path / "a" / f"{name}.svg").read_text()
        ET.fromstring(drawn)
        assert "<!-- soft (n=3) -->" in drawn
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "a" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_what_was_not_made_here_is_not_made_anew(
    tmp_path: Path, compared: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of ours is, file by file."""
    monkeypatch.setattr("softmoe_cli.compare.figures.figure_files", lambda _, name: {f"{name}.svg": b"drawn"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"--out=.*table\.csv exists"):
        compare_command.write_comparison(compared, tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "table.csv").rename(tmp_path / "out" / "mine.csv")
    names = compare_command.write_comparison(compared, tmp_path / "out")
    assert compare_command.write_comparison(compared, tmp_path / "out") == names
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "mine.csv"}


def test_folders_whose_names_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = study(tmp_path / "runs")
    one, two, *_ = sorted(runs.iterdir())
    os.rename(one, odd := runs / os.fsdecode(b"\xff\x1b[31m"))
    shutil.copytree(odd, runs / os.fsdecode(b"twin \xfe"))
    (runs / os.fsdecode(b"empty \xfd")).mkdir()
    (two / "metrics.jsonl").unlink()
    os.rename(two, runs / os.fsdecode(b"without curve \xfc"))
    assert compare_command.compare_folders([str(runs), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert all(rf"{name}" in told for name in (r"twin \xfe", r"empty \xfd", r"without curve \xfc")), told
    links = re.findall(r'href="([^"]+)/"', (tmp_path / "out" / "index.html").read_text())
    there = [tmp_path / "out" / os.fsdecode(unquote_to_bytes(link)) for link in links]
    assert len(there) == 9 and all(map(Path.is_dir, there))


def test_every_group_has_a_look_of_its_own(tmp_path: Path) -> None:
    for experts in range(1, 30):
        write(tmp_path, row(model__router__num_experts=experts, top1_pct=80 + experts / 10))
    write(tmp_path, row(router="dense"))
    look = styles(compare([tmp_path], Question()).groups)
    assert len(set(look.values())) == 30
    assert look["dense"] == (0, "o")


def test_names_that_figures_cannot_figure_files(nasty: Comparison) -> None:
    assert all(figure_files(nasty, "pareto").values()) and all(figure_files(nasty, "curves").values())


def test_the_papers_tables_beside_ours(softmoe: Softmoe, tmp_path: Path, compared: Comparison) -> None:
    with (PAPER / "pareto.csv").open() as file:
        rows = list(csv.DictReader(file))
    answer = softmoe("compare", "made_up", "--reference", "pareto")
    assert f"{len(rows)} rows of reference, not ours" in answer.out
    out = tmp_path / "made_up" / "compare"
    assert "Reference, not ours: Soft MoE (Puigcerver et al., 2023), Table 9" in (out / "index.html").read_text()
    assert json.loads((out / "table.json").read_text())["reference"] == rows
    assert "Reference, not ours" in (out / "pareto.svg").read_text()
    compared.reference_name, compared.reference = _reference("long_runs", Question())
    assert "Table 8" in markdown(compared) and "Soft H/14 256E" in markdown(compared)
    assert len(reference_points(compared)) == 17


def test_a_csv_of_ours_lies_behind_the_plot(softmoe: Softmoe, tmp_path: Path) -> None:
    study(tmp_path / "runs")
    (tmp_path / "old.csv").write_text("name,train_pflop,top1_pct\na,0.0001,88\nb,0.00012,\n")
    assert softmoe("compare", "runs", "--reference", "old.csv").code == 0
    data = (tmp_path / "runs" / "compare" / "index.html").read_text()
    assert '"reference":[[100.0,88.0,"Dense"]],"kinds"' in data and '"behind":true' in data
    for text, told in [("a,b\n1,2\n", "has neither the columns"), ("", "no rows"),
                       ("train_pflop,top1_pct\n1,x\n", "line 2: top1_pct 'x' is no number"),
                       ("train_pflop,top1_pct\n1,nan\n", "line 2: top1_pct 'nan' is no number"),
                       ("train_pflop,top1_pct\n1,\n", "has no row with both train_pflop and top1_pct"),
                       ("train_pflop,top1_pct,routing\n1,2,Hash\n", "routing Hash is not one of Dense")]:  # fmt: skip
        (tmp_path / "bad.csv").write_text(text)
        answer = softmoe("compare", "runs", "--reference", "bad.csv")
        assert answer.code == 2 and told in answer.err


def test_two_hundred_folders(softmoe: Softmoe, tmp_path: Path) -> None:
    """Whole, truncated, foreign, duplicate and empty ones: each that is left out is named, none is counted."""
    made = 0
    for experts in range(1, 31):
        for seed in range(6):
            result = row(seed=seed, model__router__num_experts=experts, top1_pct=90 + experts / 10 + seed / 7)
            run = write(tmp_path / "runs", result)
            made += 1
            if made % 45 == 0:
                (run / "result.json").write_text((run / "result.json").read_text()[:300])
            if made % 20 == 0 and made % 45:
                shutil.copytree(run, tmp_path / "runs" / f"x{made}")
    for i in range(6):
        (tmp_path / "runs" / f"empty{i}").mkdir()
        foreign = tmp_path / "runs" / f"foreign{i}"
        foreign.mkdir()
        (foreign / "result.json").write_text('{"accuracy": 1}')
    answer = softmoe("compare", "runs")
    assert answer.code == 0
    out = [line for line in answer.out.splitlines() if line.startswith("- left out: ")]
    assert len(list((tmp_path / "runs").iterdir())) - 1 == 200
    assert len(out) == 4 + 8 + 6 + 6
    for word, count in (("truncated", 4), ("the same run as", 8), ("empty", 6), ("has format none", 6)):
        assert sum(word in line.rpartition(": ")[2] or word in line.partition(": ")[2] for line in out) >= count
    told = json.loads((tmp_path / "runs" / "compare" / "table.json").read_text())
    assert sum(len(each["runs"]) for each in told["blocks"][0]["groups"]) == 176
    assert terminal(compare([Path("runs")], Question())) in answer.out, "its own files are no runs"


def test_wandb_offline_holds_group_table_and_artifact(tmp_path: Path) -> None:
    """In a process of its own: what W&B leaves in the environment would reach the processes of other tests."""
    study(tmp_path / "runs")
    code, out = Started(tmp_path, ["compare", "runs", "--wandb", "--project", "mine"], {}).wait()
    assert code == 0, out
    assert "W&B: run compare top1_pct by train_pflop of group made_up, offline" in out
    file, kept = recorded(tmp_path / "runs" / "compare")
    run = next(each.run for each in kept if each.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type, run.project) == ("made_up", "compare", "mine")
    artifact = next(each.artifact for each in kept if each.artifact.type == "comparison")
    assert {each.path for each in artifact.manifest.contents} >= {"table.csv", "table.tex", "index.html", "pareto.pdf"}
    media = {path.name.split("_0_")[0] for path in (file.parent / "files" / "media").rglob("*") if path.is_file()}
    assert media == {"table", "pareto", "curves", "page"}
    table = json.loads(next((file.parent / "files" / "media").rglob("*.table.json")).read_text())
    assert len(table["data"]) == 3
    assert table["data"][0][table["columns"].index("group")] == "soft"
    write(tmp_path / "runs", row(router="dense", seed=9))
    again = _settings(compare([tmp_path / "runs"], Question()), Question(), "mine")
    assert again["id"] == run.run_id, "asked again, with more seeds, it is the same run"


def test_wandb_switched_off_or_out_of_reach(softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path / "runs")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    answer = softmoe("compare", "runs", "--wandb")
    assert answer.code == 2 and "--wandb has no effect with WANDB_MODE=disabled" in answer.err
    assert softmoe("compare", "runs", "--project", "x").err == "softmoe: --project x has no effect without --wandb\n"


def test_command_line(softmoe: Softmoe, tmp_path: Path) -> None:
    study(tmp_path / "runs")
    answer = softmoe("compare", "--quality", "loss", "runs", "--sort=label", "--at", "images=3200", "--at", "device_s")
    assert answer.code == 0
    assert "validation loss at equal training images" in answer.out
    assert [line.split()[0] for line in answer.out.splitlines()[2:5]] == ["dense", "soft", "tokens_choice"]
    for arguments, told in [
        ((), "and there is none with finished runs in outputs"),
        (("runs", "--qualty", "loss"), "--qualty: there is no such option. Did you mean '--quality'?"),
        (("runs", "--cost"), "argument --cost: expected one argument"),
        (("runs", "--out", "runs/compare/table.md/x"), "--out runs/compare/table.md/x cannot be written"),
        (("runs", "--reference", "paretoo"), "Did you mean 'pareto'"),
    ]:
        answer = softmoe("compare", *arguments)
        assert (answer.code, told in answer.err, "Traceback" in answer.err) == (2, True, False), answer.err
    assert "--quality KEY" in softmoe("compare", "--help").out


def test_two_real_runs(softmoe: Softmoe, tmp_path: Path) -> None:
    """From training to a verdict: rows of the loop are all that compare needs."""
    for router in ("dense", "soft"):
        own = [each for each in TINY if router == "soft" or "num_experts" not in each]
        trained = softmoe("train", *own, "threads=1", "train.steps=30", "study=two", f"model/router={router}")
        assert trained.code == 0, trained.err
    answer = softmoe("compare", "outputs/two", "--at", "images")
    assert answer.code == 0, answer.err
    told = json.loads((tmp_path / "outputs" / "two" / "compare" / "table.json").read_text())
    (block,) = told["blocks"]
    assert {each["label"] for each in block["groups"]} == {"dense", "soft"}
    soft = next(each for each in block["groups"] if each["label"] == "soft")
    assert (soft["baseline"], soft["verdict"]) == ("dense", "too few seeds")
    assert soft["settings"]["model.router.num_experts"] == 4 and soft["settings"]["optim.lr"] == 0.003
    assert [each["budget"] for each in soft["budgets"]] == [240, 480, 960]
    assert "earlier version" not in answer.out
    assert terminal(compare([Path("outputs/two")], Question(at=("images",)))) in answer.out


def test_a_terminal_of_eighty_columns(compared: Comparison) -> None:
    """What decides fits; a file has a line for each group instead."""
    told = terminal(compared, 80)
    assert max(map(len, told.splitlines())) <= 80
    head = told.splitlines()[1:3]
    assert all(word in " ".join(head) for word in ("group", "minus dense", "verdict", "GFLOP"))
    assert "parameters" not in told.partition("On the front")[0], "the rest with --columns"
    (soft,) = [line for line in terminal(compared).splitlines() if re.match("soft  +3", line) and "better" in line]
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


@pytest.fixture
def odd(tmp_path: Path) -> Comparison:
    """A group at chance, one finetuned from what is known, one from what is not; names that spreadsheets compute."""
    for seed in range(3):
        write(tmp_path / "odd", row(router="dense", seed=seed, top1_pct=40 + 7 * seed, data__num_classes=3))
        write(tmp_path / "odd", row(seed=seed, top1_pct=33.3, data__num_classes=3, train_pflop=1e-4))
        for name, cost in (("=SUM(A1)", 0.002), ("@x", None)):
            tuned: dict[str, Any] = {"command": "finetune", "checkpoint": name, "checkpoint__origin": name}
            tuned |= {"checkpoint__train_pflop": cost, "data__num_classes": 3, "top1_pct": 70 + seed}
            write(tmp_path / "odd", row(seed=seed, model__backbone__name=name, **tuned))
    return compare([tmp_path / "odd"], Question())


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


def test_the_page_tells_what_was_run(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    runs = study(tmp_path / "out puts" / "a&b")
    folder = runs / "sweep-1"
    folder.mkdir()
    jobs = [{"run": run.name, "folder": f"../{run.name}"} for run in sorted(runs.iterdir()) if "sweep" not in run.name]
    (folder / "jobs.json").write_text(json.dumps({"command": "train", "typed": ["seed=0,1,2", "a=<b>"], "jobs": jobs}))
    (runs / "sweep-2").mkdir()
    (runs / "sweep-2" / "jobs.json").write_text("{")
    for run in runs.glob("*/result.json"):
        os.utime(run, (1_700_000_000, 1_700_000_000))
    text = page(compare([runs], Question()), {"pareto.svg": b"", "curves.svg": b""}, tmp_path / "elsewhere")
    reader = Reader()
    reader.feed(text)
    facts = reader.words["dd"][2:]  # after the routing table's words
    assert facts[0] == "softmoe train -m seed=0,1,2 'a=<b>'" and "2023-11-14 (UTC" in facts[1]
    assert "AMD EPYC, 1 threads, torch 2.15.0+cu132 (9 runs)" in facts
    assert "softmoe 0.1.0, commit 7d27ecc (9 runs)" in facts
    assert "digits: 1,295 training images, 359 test images (9 runs)" in facts
    assert "200 updates of 32 images (9 runs)" in facts
    links = [value or "" for name, value in reader.attributes if name == "href"]
    assert len(links) == 9 and all(link.startswith("../out%20puts/a%26b/vit_nano2_") for link in links)
    assert any("soft is better than dense" in word for word in reader.words["p"]), "the headline"
    assert {"utilisation", "load_max"} <= set(reader.words["dt"]), "the routing table's words"
    heads = [value for name, value in reader.attributes if name == "data-head"]
    assert "verdict" in heads, "which a card names on a narrow screen"


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


def test_what_to_open_and_what_to_name(softmoe: Softmoe, tmp_path: Path) -> None:
    study(tmp_path / "outputs" / "old")
    study(tmp_path / "outputs" / "new")
    os.utime(tmp_path / "outputs" / "old", (1, 1))
    answer = softmoe("compare")
    assert answer.code == 2
    assert "such as outputs/new (the newest of 2 in outputs): softmoe compare outputs/new" in answer.err
    answer = softmoe("compare", "outputs/new")
    assert answer.out.splitlines()[-2:] == [
        "open outputs/new/compare/index.html",
        "beside it: table.md|tex|csv|json, curves.svg|pdf|png, pareto.svg|pdf|png",
    ]
    assert (tmp_path / "outputs" / "new" / "compare" / "index.html").is_file()
    assert "is no folder" in softmoe("compare", "n" * 300).err
