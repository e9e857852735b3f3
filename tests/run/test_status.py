"""softmoe status: from files alone, whatever is in them."""

import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from softmoe_cli.run.status import quoted
from tests.conftest import TINY, Softmoe
from tests.runs import saved


def made(run: Path, rows: Sequence[dict[str, Any]], lock: str = "") -> None:
    """A run's folder as far as status reads it."""
    run.mkdir(parents=True)
    budgets = {"steps": 100, "epochs": None, "images": None, "minutes": None}
    (run / "config.yaml").write_text(yaml.safe_dump({"train": budgets}))
    lines = [json.dumps({"format": 1} | row) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 99, "spl')
    (run / ".lock").write_text(lock)


def test_status_from_files_alone(softmoe: Softmoe, tmp_path: Path) -> None:
    rows = [{"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}]
    rows += [{"step": step, "epoch": 1, "images": 8 * step, "device_s": 1.0, "split": "train"} for step in (51, 60)]
    study = tmp_path / "outputs" / "mine"
    for name, lock in {"a-stopped": "", "b-elsewhere": "another-machine 7", "c-killed": f"{platform.node()} 7"}.items():
        made(study / name, rows, lock)
    with (study / "a-stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "split": "trai\n')  # damage is compare's to name
    made(study / "d-held", rows)
    made(study / "e-done", rows)
    (study / "e-done" / "result.json").write_text('{"format": 1, "validation_top1_pct": 93.25}')
    sweep = study / "sweep-0123abcd"
    sweep.mkdir()
    jobs = [{"run": f"seed={i}", "folder": f"../{name}"} for i, name in enumerate(("e-done", "f-failed", "g-waiting"))]
    (sweep / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    (sweep / "01.json").write_text('{"reason": "out of memory at step 3"}')
    (sweep / "01.log").write_text("")
    with (study / "d-held" / ".lock").open() as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        told = {each["run"]: each for each in json.loads(softmoe("status", "outputs", "--json").out)}
        table = softmoe("status", "outputs/mine")
    assert {name: each["state"] for name, each in told.items()} == {
        "a-stopped": "stopped", "b-elsewhere": "running or killed", "c-killed": "stopped", "d-held": "running",
        "seed=0": "done", "seed=1": "failed", "seed=2": "waiting",
    }  # fmt: skip
    assert (told["a-stopped"]["progress"], told["a-stopped"]["top1_pct"]) == (0.6, 91.5)
    assert told["seed=0"]["top1_pct"] == 93.25 and told["seed=1"]["log"] == "outputs/mine/sweep-0123abcd/01.log"
    assert 0 <= told["b-elsewhere"]["age_s"] < 100
    assert "failed: seed=1: out of memory at step 3" in table.out and "1 running, 1 running or killed" in table.out
    assert "stopped" in softmoe("status", "outputs/mine/a-stopped").out
    config = study / "a-stopped" / "config.yaml"
    timed = yaml.safe_load(config.read_text())["train"] | {"steps": None, "minutes": 1 / 60}
    config.write_text(yaml.safe_dump({"train": timed, "devices": 4}))
    (state,) = json.loads(softmoe("status", "outputs/mine/a-stopped", "--json").out)
    assert state["progress"] == 0.25, "four devices have spent one second together, of one"
    config.write_text(yaml.safe_dump({"train": timed | {"steps": 100, "minutes": None}}))
    twice = softmoe("status", "outputs/mine", "outputs/mine/a-stopped").out
    assert sum(line.startswith("a-stopped ") for line in twice.splitlines()) == 1, "a run that is named twice"
    (tmp_path / "empty").mkdir()
    wrong = {
        ("nix",): "nix is no folder",
        ("n" * 300,): "is no folder",
        ("empty",): "holds neither",
        ("outputs", "--jsno"): "--json",
    }
    for arguments, words in wrong.items():
        answer = softmoe("status", *arguments)
        assert answer.code == 2 and words in answer.err
    answer = softmoe("status")
    assert (answer.code, answer.out.splitlines()[0]) == (0, "outputs/mine"), "outputs, where no folder is named"
    shutil.rmtree(tmp_path / "outputs")
    assert "there is no folder outputs here" in softmoe("status").err


BAD: dict[str, tuple[str, str | bytes | None, str]] = {
    "a-empty": ("config.yaml", "", "config.yaml is empty"),
    "a-list": ("config.yaml", "[1, 2]", "config.yaml does not say what train is"),
    "a-text": ("config.yaml", "train: 5", "config.yaml does not say what train is"),
    "a-none": ("config.yaml", "seed: 0", "config.yaml does not say what train is"),
    "a-no-yaml": ("config.yaml", "train: [", "config.yaml is no YAML"),
    "a-latin": ("config.yaml", b"train: {steps: 5} # caf\xe9", "config.yaml is no YAML"),
    "a-zero": ("config.yaml", "train: {steps: 0}", "config.yaml says train.steps is 0"),
    "a-huge": ("config.yaml", "train: {epochs: 1e999}", "config.yaml says train.epochs is 1e999"),
    "a-word": ("config.yaml", "train: {steps: many}", "config.yaml says train.steps is many"),
    "a-date": ("config.yaml", "train: {steps: 2020-99-99}", "config.yaml says train.steps is 2020-99-99"),
    "a-map": ("config.yaml", "train: {steps: {a: b}}", "config.yaml says train.steps is"),
    "a-free": ("config.yaml", "train: {steps: null}", "config.yaml has none of train.steps"),
    "a-devices": ("config.yaml", "train: {steps: 9}\ndevices: 0", "config.yaml says devices is 0"),
    "a-deep": ("config.yaml", "[" * 200_000, "config.yaml is no YAML"),
    "a-unhashable": ("config.yaml", "? [a]\n: 1", "config.yaml is no YAML"),
    "a-config-folder": ("config.yaml", None, "config.yaml is no file"),
    "b-folder": ("result.json", None, "result.json is no file"),
    "b-deep": ("result.json", "[" * 200_000, "result.json is truncated or damaged"),
    "b-cut": ("result.json", '{"validation_top1_p', "result.json is truncated or damaged"),
    "b-list": ("result.json", "[]", "result.json is no row"),
    "b-bytes": ("result.json", b"\xff\xfe\x00", "result.json is truncated or damaged"),
    "b-nan": ("result.json", '{"validation_top1_pct": NaN}', "result.json is truncated or damaged"),
    "b-word": ("result.json", '{"validation_top1_pct": "\x1b[2Jhigh"}', "result.json is truncated or damaged"),
    "b-kind": ("result.json", '{"format": 1, "validation_top1_pct": "\\u001b[2Jx"}', "says validation_top1_pct is"),
    "b-true": ("result.json", '{"format": 1, "validation_top1_pct": true}', "which is not a number"),
    "b-format": ("result.json", '{"format": 2}', "result.json has format 2, and this softmoe reads format 1"),
    "c-lock": (".lock", None, ".lock is no file"),
    "d-rows": ("metrics.jsonl", '{"step": "5", "split": "train"}\n', "metrics.jsonl has no row that tells how far"),
    "d-deep": ("metrics.jsonl", "[" * 200_000 + "\n", "metrics.jsonl has no row that tells how far"),
    "d-huge": ("metrics.jsonl", f'{{"step": 1{"0" * 400}, "epoch": 1, "images": 1, "device_s": 1}}\n', "has no row"),
    "d-folder": ("metrics.jsonl", None, "metrics.jsonl is no file"),
}  # fmt: skip


def test_a_bad_run_hides_no_other(softmoe: Softmoe, tmp_path: Path) -> None:
    """Each costs its own line, which names the file; what those lines show is nothing that a terminal obeys."""
    good = [{"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}]
    study = tmp_path / "outputs" / "mine"
    for name, (file, text, _) in BAD.items():
        made(study / name, good)
        (study / name / file).unlink(missing_ok=True)
        if text is None:
            (study / name / file).mkdir()
        else:
            (study / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    made(study / "e-good", [*good, {**good[0], "top1_pct": None}, {**good[0], "top1_pct": "high"}, {"step": [1]}])
    made(study / "e-\x1b[31mred", good)
    os.mkfifo(study / "e-good" / "result.json")
    broken = {
        "f": "{",
        "g": '{"jobs": 5}',
        "h": '{"jobs": [{"run": "x"}]}',
        "i": '{"jobs": [{"run": "x", "folder": 5}]}',
    }
    for name, text in broken.items():
        (study / f"sweep-{name}").mkdir()
        (study / f"sweep-{name}" / "jobs.json").write_text(text)
    (study / "sweep-j").mkdir()
    jobs = [
        {"run": "seed=\x1b]0;x\x07", "folder": "../" + "n" * 300},
        {"run": "seed=1", "folder": "../e-good/config.yaml"},
    ]
    (study / "sweep-j" / "jobs.json").write_text(json.dumps({"typed": ["a=b c", "seed=0"], "jobs": jobs}))
    answer = softmoe("status")
    assert (answer.code, answer.err) == (0, "")
    assert "\x1b" not in answer.out and "e-\\x1b[31mred" in answer.out
    lines = answer.out.splitlines()
    for name, (_, _, told) in BAD.items():
        (line,) = [line for line in lines if line.startswith(f"damaged: {name}: ")]
        assert told in line and len(line) < 300
    for name, told in {
        "f": "is truncated",
        "g": "no list of jobs",
        "h": "job 0 has no folder",
        "i": "folder is 5",
    }.items():
        assert any(f"damaged: sweep-{name}: jobs.json" in line and told in line for line in lines)
    assert any(line.startswith("damaged: seed=\\x1b]0;x\\x07: ") for line in lines)
    (pipe,) = [line for line in lines if line.startswith("damaged: e-good")]
    assert "result.json is no file" in pipe, "a pipe is not waited for"
    (study / "e-good" / "result.json").unlink()
    rows = {each["run"]: each for each in json.loads(softmoe("status", "outputs", "--json").out)}
    assert (rows["e-good"]["state"], rows["e-good"]["top1_pct"], rows["e-good"]["progress"]) == ("stopped", 91.5, 0.5)
    assert rows["e-good"]["resume"] == f"softmoe train -cp {study / 'e-good'} -cn config"


def test_what_to_type_to_go_on(softmoe: Softmoe, tmp_path: Path) -> None:
    """A stopped sweep's own words; a stopped run's configuration, with which it is the same run and goes on."""
    run = tmp_path / "outputs" / "mine" / "run"
    made(run, [])
    (run / "config.yaml").write_text("train: {steps: 9}\ncheckpoint: outputs/x\n")
    (tmp_path / "outputs" / "mine" / "sweep-1").mkdir()
    jobs = [{"run": f"seed={i}", "folder": f"../r{i}"} for i in range(3)]
    said = {"command": "train", "typed": ["seed=0,1", "name=a b"], "jobs": jobs}
    (tmp_path / "outputs" / "mine" / "sweep-1" / "jobs.json").write_text(json.dumps(said))
    lines = softmoe("status").out.splitlines()
    told = [line.removeprefix("to go on: ") for line in lines if line.startswith("to go on: ")]
    assert told == [
        "softmoe train -m seed=0,1 'name=a b'",
        f"softmoe finetune -cp {run} -cn config",
    ]
    trained = softmoe("train", *TINY, "threads=1", "train.steps=2", "study=own")
    assert trained.code == 0, trained
    (own,) = tmp_path.glob("outputs/own/*")
    (own / "result.json").unlink()
    (own / "failed.json").write_text('{"reason": "it broke"}')
    assert f"failed: {own.name}: it broke" in softmoe("status", "outputs/own").out
    (line,) = [line for line in softmoe("status", "outputs/own").out.splitlines() if line.startswith("to go on: ")]
    again = softmoe(*shlex.split(line.removeprefix("to go on: softmoe ")))
    assert again.code == 0 and "going on from step 2" in again.out, again
    assert list(tmp_path.glob("outputs/own/*")) == [own] and (own / "result.json").exists()
    assert not (own / "failed.json").exists(), "it went on"
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"mine", "own"}, "no files of Hydra's"


@pytest.mark.thorough
def test_what_to_type_goes_on_from_everywhere(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what was typed of the data, which a checkpoint would decide otherwise, and in a study that was moved."""
    checkpoint = saved(tmp_path / "weights.safetensors", 0)
    line = (f"checkpoint={checkpoint}", "tracking=off", "threads=1", "train.steps=2", "study=mine")
    assert softmoe("finetune", *line, "data.mean=[0.25]", "data.split_seed=7").code == 0
    study = tmp_path / "moved (a=b)" / "it's"
    study.parent.mkdir()
    (tmp_path / "outputs" / "mine").rename(study)
    (run,) = study.iterdir()
    for folder in (tmp_path, study):
        (run / "result.json").unlink()
        monkeypatch.chdir(folder)
        (told,) = [each for each in softmoe("status", str(study)).out.splitlines() if each.startswith("to go on: ")]
        words = shlex.split(told.removeprefix("to go on: softmoe "))
        again = softmoe(*words)
        assert again.code == 0 and "going on from step 2" in again.out, again
        assert (run / "result.json").exists()
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize("text", ["a b", "x\"y'", 'a\\b\\"', "end\\", "null", "007", "a=b,c(d)[e]{f}", "ä:#"])
def test_hydra_reads_a_quoted_text_as_it_is(text: str) -> None:
    assert OverridesParser.create().parse_override(f"study={quoted(text)}").value() == text


def test_status_of_many_runs_needs_no_torch(tmp_path: Path) -> None:
    row = {"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}
    for number in range(200):
        made(tmp_path / "outputs" / "mine" / f"run-{number}", [row] * 100)
    code = (
        "import sys; sys.argv = ['softmoe', 'status', 'outputs']\n"
        "from softmoe_cli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('TORCH', 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "200 stopped" in told.stdout
    assert told.stdout.split()[-1] == "False"
