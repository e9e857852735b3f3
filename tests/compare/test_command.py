"""`softmoe compare`: the files that it writes, read back, of runs made up and of runs trained."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from softmoe_cli.compare import command as compare_command
from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.command import PAPER, _reference, listed, parsed_options
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.send import wandb_run
from softmoe_cli.compare.styles import reference_points
from softmoe_cli.compare.tables import markdown, terminal
from softmoe_cli.compare.written import write_comparison
from softmoe_cli.errors import UsageError
from tests.conftest import TINY, Softmoe
from tests.processes import Started
from tests.synthetic import row, study, write
from tests.wandb_file import recorded


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
        write_comparison(compared, tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "table.csv").rename(tmp_path / "out" / "mine.csv")
    names = write_comparison(compared, tmp_path / "out")
    assert write_comparison(compared, tmp_path / "out") == names
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
    assert len(list((tmp_path / "runs").iterdir())) - len(["compare", "looks.jsonl"]) == 200
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
    assert {each.path for each in artifact.manifest.contents} >= {
        "table.csv", "table.tex", "index.html", "pareto.pdf", "table.table.json", "verdicts.table.json",
    }  # fmt: skip
    media = {path.name.split("_0_")[0] for path in (file.parent / "files" / "media").rglob("*") if path.is_file()}
    assert media == {"table", "verdicts", "pareto", "curves", "page"}
    table = json.loads(next((file.parent / "files" / "media").rglob("table_0_*.table.json")).read_text())
    assert len(table["data"]) == 3
    verdicts = json.loads(next((file.parent / "files" / "media").rglob("verdicts_0_*.table.json")).read_text())
    told = [dict(zip(verdicts["columns"], each, strict=True)) for each in verdicts["data"]]
    assert [(each["group"], each["verdict"], each["seeds"]) for each in told] == [
        ("soft", "better", 3), ("tokens_choice", "not distinguishable", 3), ("dense", "baseline", None)
    ]  # fmt: skip
    assert told[0]["beside it"] == "at 16% more training FLOPs" and told[0]["cost ratio"] == pytest.approx(1.16)
    assert "soft is better than dense in test top-1" in run.notes
    page = next((file.parent / "files" / "media").rglob("page_0_*.html")).read_text()
    assert page == (tmp_path / "runs/compare/index.html").read_text(), "the page of the group, whole"
    assert table["data"][0][table["columns"].index("group")] == "soft"
    write(tmp_path / "runs", row(router="dense", seed=9))
    again = wandb_run(compare([tmp_path / "runs"], Question()), Question(), "mine")
    assert again["id"] == run.run_id, "asked again, with more seeds, it is the same run"


def test_wandb_switched_off_or_out_of_reach(softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path / "runs")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    answer = softmoe("compare", "runs", "--wandb")
    assert answer.code == 2 and "--wandb has no effect with WANDB_MODE=disabled" in answer.err
    assert softmoe("compare", "runs", "--project", "x").err == "softmoe: --project x has no effect without --wandb\n"


def test_a_list_given_twice_goes_on() -> None:
    chosen = parsed_options("compare", {"by": ("KEY,KEY", "")}, {"by": listed}, (), ["runs", "--by", "a", "--by=b,c"])
    assert (chosen.by, chosen.folders) == (("a", "b", "c"), [Path("runs")])
    with pytest.raises(UsageError, match="--by names nothing"):
        parsed_options("compare", {"by": ("KEY,KEY", "")}, {"by": listed}, (), ["runs", "--by", ","])


def test_command_line(softmoe: Softmoe, tmp_path: Path) -> None:
    study(tmp_path / "runs")
    answer = softmoe("compare", "--quality", "loss", "runs", "--sort=label", "--at", "images=3200", "--at", "device_s")
    assert answer.code == 0
    assert "validation loss at equal training images" in answer.out
    assert [line.split()[0] for line in answer.out.splitlines()[2:5]] == ["dense", "soft", "tokens_choice"]
    for arguments, told in [
        ((), "and there is none with finished runs in outputs"),
        (("runs", "--qualty", "loss"), "--qualty: there is no such option. Did you mean '--quality'?"),
        (("runs", "--sort", "loss", "--sort", "label"), "--sort loss and --sort label: it takes one value; keep one"),
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
        trained = softmoe("train", *own, "threads=1", "train.steps=8", "study=two", f"model/router={router}")
        assert trained.code == 0, trained.err
    answer = softmoe("compare", "outputs/two", "--at", "images")
    assert answer.code == 0, answer.err
    told = json.loads((tmp_path / "outputs" / "two" / "compare" / "table.json").read_text())
    (block,) = told["blocks"]
    assert {each["label"] for each in block["groups"]} == {"dense", "soft"}
    soft = next(each for each in block["groups"] if each["label"] == "soft")
    assert (soft["baseline"], soft["verdict"]) == ("dense", "too few seeds")
    assert soft["settings"]["model.router.num_experts"] == 4 and soft["settings"]["optim.lr"] == 0.003
    assert [each["budget"] for each in soft["budgets"]] == [64, 128, 256]
    assert "earlier version" not in answer.out
    assert terminal(compare([Path("outputs/two")], Question(at=("images",)))) in answer.out


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
