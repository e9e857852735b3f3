"""Finished runs: what cannot be read is named, and no other run is lost."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from tests.synthetic import asked, looks, rewrite, row, study, write


def test_code_versions_are_named_or_kept_apart(tmp_path: Path) -> None:
    study(tmp_path)
    write(tmp_path, row(router="dense", seed=7, commit="abc1234-dirty"))
    comparison = asked(tmp_path)
    assert len(comparison.blocks) == 1
    assert any("9 of commit 7d27ecc" in note and "--strict" in note for note in comparison.notes)
    assert any("uncommitted" in note for note in comparison.notes)
    assert len(asked(tmp_path, strict=True).blocks) == 2


def test_rows_of_another_format_are_named(tmp_path: Path) -> None:
    study(tmp_path)
    for name, format in (("none", None), ("next", 2)):
        run = write(tmp_path / name, row(seed=7))
        whole = json.loads((run / "result.json").read_text()) | {"format": format}
        if format is None:
            del whole["format"]
        (run / "result.json").write_text(json.dumps(whole))
    run = write(tmp_path / "rows", row(seed=8))
    rewrite(run, (run / "metrics.jsonl").read_text().replace('"format": 1', '"format": "new"'))
    comparison = asked(tmp_path)
    told = {Path(folder).relative_to(tmp_path).parts[0]: reason for folder, reason in comparison.left_out}
    assert told == {
        "none": "result.json has format none, and this softmoe reads format 1",
        "next": "result.json has format 2, and this softmoe reads format 1",
    }
    (note,) = [note for note in comparison.notes if "it has no curve" in note]
    assert str(run) in note and "metrics.jsonl has format 'new', and this softmoe reads format 1, in line 2" in note


def test_rows_that_were_changed_after_the_run_are_no_curve(tmp_path: Path) -> None:
    """One digit is enough, and a row more or less."""
    for seed in range(3):
        run = write(tmp_path, row(seed=seed))
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [lines[:-1], [*lines, lines[-1]], [line.replace("99.0", "98.0") for line in lines]][seed]
        (run / "metrics.jsonl").write_text("".join(lines))
    comparison = asked(tmp_path)
    notes = [note for note in comparison.notes if "it has no curve" in note]
    told = (
        "it had 17 rows then and has 16 now",
        "17 rows then and has 18 now",
        "17 rows then and has 17 now, or other",
    )
    assert len(notes) == 3 and all(any(word in note for note in notes) for word in told)
    assert len(comparison.groups[0].runs) == 3 and not any(run.looks for run in comparison.groups[0].runs)


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    study(tmp_path / "runs")
    runs = sorted((tmp_path / "runs").iterdir())
    whole = (runs[0] / "result.json").read_text()
    shutil.copytree(runs[1], tmp_path / "zcopy" / runs[1].name)
    other = shutil.copytree(runs[2], tmp_path / "zcopy" / runs[2].name)
    (other / "result.json").write_text(json.dumps(json.loads((other / "result.json").read_text()) | {"top1_pct": 1.0}))
    spoilt = {
        "truncated": whole[:200], "foreign": '{"accuracy": 0.9}', "list": "[1]", "deep": "[" * 100_000, "blank": "",
        "nan": json.dumps(json.loads(whole) | {"top1_pct": float("nan"), "signature": "x"}),
        "lacking": json.dumps({k: v for k, v in json.loads(whole).items() if k != "top1_pct"} | {"signature": "y"}),
    }  # fmt: skip
    for name, text in spoilt.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "result.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    unfinished = shutil.copytree(runs[3], tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no run, and none begun")
    (runs[4] / "metrics.jsonl").write_text((runs[4] / "metrics.jsonl").read_text()[:-20])
    (runs[5] / "metrics.jsonl").unlink()

    comparison = asked(tmp_path)
    reasons = {Path(folder).relative_to(tmp_path).parts[0]: reason for folder, reason in comparison.left_out}
    assert sum(len(each.runs) for each in comparison.groups) == 9
    assert {name: reason[:18] for name, reason in reasons.items() if name != "zcopy"} == {
        "truncated": "result.json is tru", "foreign": "result.json has fo", "list": "result.json is no ",
        "deep": "result.json is tru", "blank": "result.json is emp", "nan": "result.json is tru",
        "lacking": "result.json has no", "bytes": "result.json is tru", "empty": "empty",
        "unfinished": "unfinished: no res",
    }  # fmt: skip
    assert "last look at step 200" in reasons["unfinished"]
    doubles = [reason for folder, reason in comparison.left_out if "zcopy" in folder]
    assert sorted(reason.rpartition(", ")[2] for reason in doubles) == ["equal in quality", "with OTHER quality"]
    assert sum("it has no curve" in note for note in comparison.notes) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rows: rows[:4] + rows[2:], "goes back in line 6"),
        (lambda rows: [{k: v for k, v in each.items() if k != "images"} for each in rows], "has no images, in line 2"),
        (lambda rows: rows[:1], "has no validation row"),
        (lambda rows: [*rows, 3], "is damaged in line 18"),
    ],
)
def test_a_damaged_curve_is_no_curve(tmp_path: Path, spoil: Callable[[list[Any]], list[Any]], reason: str) -> None:
    run = write(tmp_path, row())
    rewrite(run, "".join(json.dumps(each) + "\n" for each in spoil(looks(row()))))
    comparison = asked(tmp_path)
    assert any(reason in note for note in comparison.notes)
    assert comparison.groups[0].runs[0].looks == []


def test_an_update_that_compiles_between_two_looks_leaves_the_curve(tmp_path: Path) -> None:
    """After a resume the first update compiles: two looks, one step apart, have taken the same seconds of training."""
    run, rows = write(tmp_path, row()), looks(row())
    at = [place for place, each in enumerate(rows) if each["split"] == "validation"]
    rows[at[3]]["device_s"] = rows[at[2]]["device_s"]
    rewrite(run, "".join(json.dumps(each) + "\n" for each in rows))
    comparison = asked(tmp_path, cost="device_s", to_quality="85")
    (only,) = comparison.groups
    assert len(only.runs[0].looks) == len(at) and not only.runs[0].damage
    assert all(each.interval is not None for each in only.budgets)


def test_errors_of_folders(tmp_path: Path) -> None:
    study(tmp_path / "outputs")
    with pytest.raises(UsageError, match=r"outputz is no folder. Did you mean 'outputs'"):
        asked(tmp_path / "outputz")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no finished run below .*none; left out are 1, first .*none: empty"):
        asked(tmp_path / "none")


BAD: dict[str, Any] = {
    "router": 5, "name": None, "seed": 1.5, "seed ": True, "signature": ["x"], "study": {"a": 1}, "hardware": 7,
    "top1_pct": "high", "train_pflop": 10**400, "device_s": 1e200, "params_m": True, "moe_blocks": [1], "torch": 2,
    "test_images": "359", "train_gflop": 1e-300,
}  # fmt: skip


def test_a_bad_result_is_one_line(tmp_path: Path) -> None:
    """Of every key that is counted on; the others are compared."""
    study(tmp_path / "runs")
    for place, (key, value) in enumerate(BAD.items()):
        run = write(tmp_path / "bad" / str(place), row(seed=50 + place))
        whole = json.loads((run / "result.json").read_text()) | {key.strip(): value}
        (run / "result.json").write_text(json.dumps(whole))
    for place, kind in enumerate(("folder", "pipe")):
        run = write(tmp_path / "bad" / kind, row(seed=90 + place))
        (run / "result.json").unlink()
        (run / "result.json").mkdir() if kind == "folder" else os.mkfifo(run / "result.json")
    comparison = asked(tmp_path)
    assert sum(len(each.runs) for each in comparison.groups) == 9
    told = {Path(folder).relative_to(tmp_path / "bad").parts[0]: reason for folder, reason in comparison.left_out}
    assert told.keys() == {*map(str, range(len(BAD))), "folder", "pipe"}
    for place, key in enumerate(BAD):
        assert key.strip() in told[str(place)] and len(told[str(place)]) < 200
    assert told["folder"] == told["pipe"] == "result.json is no file"


@pytest.mark.parametrize("value", ['"5"', "NaN", "true", "1" + "0" * 400, "1e999", "[1]", "null"])
def test_a_bad_look_is_named(tmp_path: Path, value: str) -> None:
    run = write(tmp_path, row())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = re.sub(r'"images": [\d.]+', f'"images": {value}', lines[3])
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    comparison = asked(tmp_path)
    assert comparison.groups[0].runs[0].looks == []
    (note,) = [note for note in comparison.notes if "it has no curve" in note]
    assert "in line 4" in note
