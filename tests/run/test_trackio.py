"""Rows in Trackio's database, read back by Trackio's own reader in a process of its own, and what is refused."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import charted
from softmoe_cli.run.trackio import ELSEWHERE, check_trackio
from tests.oracles import compose
from tests.runs import finish, start, the_run

READ = """
import json, sys
import trackio
from trackio.sqlite_storage import SQLiteStorage
runs = list(trackio.Api().runs(sys.argv[1]))
logs = [SQLiteStorage.get_logs(sys.argv[1], run.name, run_id=run.id) for run in runs]
print(json.dumps([[run.name, run.config, rows] for run, rows in zip(runs, logs)]))
"""
WRITE = """
import json, sys
from softmoe_cli.run.trackio import Trackio
earlier, new, result = json.loads(sys.argv[1])
settings = {"project": "p", "group": (sys.argv[2:] or ["study"])[0], "config": {"seed": 3}}
mirror = Trackio(settings, "run-1", earlier, lambda sentence: print(sentence, file=sys.stderr))
for row in new:
    mirror.row(row)
mirror.close(result)
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Trackio keeps its database in this test."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    return tmp_path


def rows(*steps: int, run: float = 0) -> list[dict[str, Any]]:
    where = [{"step": step, "images": 8 * step, "loss": run + step, "lr": None, "format": 1} for step in steps]
    return [row | {"split": split} for row in where for split in ("train", "validation")]


def test_what_goes_on_is_written_anew_and_nothing_is_printed(place: Path) -> None:
    """A run that goes back to step 1 has step 2 once, and is one run."""
    assert python(WRITE, json.dumps([[], rows(1, 2), None])) == ""
    assert python(WRITE, json.dumps([rows(1), rows(2, run=0.5), {"top1_pct": 90.0, "name": "run", "x": None}])) == ""
    ((name, config, logs),) = json.loads(python(READ, "p"))
    assert name == "run-1" and config["seed"] == 3
    found = [{key: value for key, value in row.items() if key != "timestamp"} for row in logs]
    assert found == [
        {"step": 1, "images": 8, "train/loss": 1}, {"step": 1, "images": 8, "validation/loss": 1},
        {"step": 2, "images": 16, "train/loss": 2.5}, {"step": 2, "images": 16, "validation/loss": 2.5},
        {"step": 2, "result/top1_pct": 90},
    ]  # fmt: skip


def test_the_same_run_of_another_study_is_another_run(place: Path) -> None:
    for run, study in enumerate(("one", "other", "other")):
        assert python(WRITE, json.dumps([[], rows(1, run=run), None]), study) == ""
    found = {config["_Group"]: (name, logs[0]["train/loss"]) for name, config, logs in json.loads(python(READ, "p"))}
    assert found == {"one": ("run-1", 1), "other": ("run-1", 3)}


def test_a_run_mirrors_its_rows(place: Path) -> None:
    words = "tracking=[offline,tensorboard,trackio]"
    finish(start(place, "train.steps=4", words))
    run = the_run(place)
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ((name, config, logs),) = json.loads(python(READ, "softmoe"))
    assert name == run.name and config["data_name"] == "digits" and config["_Group"] == "default"
    assert [{key: value for key, value in row.items() if key != "timestamp"} for row in logs[:-1]] == list(
        map(charted, kept)
    )
    assert logs[-1]["result/top1_pct"] == json.loads((run / "result.json").read_text())["top1_pct"]
    assert list(run.glob("wandb/offline-run-*")) and list(run.glob("tensorboard/events.*"))


def test_a_folder_that_cannot_be_written_stops_nothing(place: Path) -> None:
    (place / "kept").write_text("")
    finish(start(place, "train.steps=2", "tracking=trackio"))
    assert (the_run(place) / "result.json").exists()


@pytest.mark.parametrize("name", ELSEWHERE)
def test_rows_are_not_sent_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    config = compose("tracking=[tensorboard,trackio]")
    check_trackio(config)
    monkeypatch.setenv(name, "https://there")
    with pytest.raises(UsageError, match=f"{name}=https://there.*unset it"):
        check_trackio(config)
    check_trackio(compose("tracking=tensorboard"))


def test_without_trackio_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'softmoe-cli\[trackio\]'"):
        check_trackio(compose("tracking=trackio"))
