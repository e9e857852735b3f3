"""JSON from every command: standard output holds the answer and nothing else, of errors too."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli import programs
from softmoe_cli.cli import ACTIONS
from softmoe_cli.options.usage import COMMANDS
from tests.conftest import TINY, Answer, Softmoe
from tests.synthetic import study

AGENTS = (Path(__file__).resolve().parents[1] / "AGENTS.md").read_text()


def told(answer: Answer) -> Any:
    """The one line of standard output."""
    (line,) = answer.out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("command", [*COMMANDS, "no_such_command"])
def test_an_error_of_every_command(command: str, softmoe: Softmoe) -> None:
    """The sentence that people read, and the status, which is as it was."""
    answer = softmoe(command, "--json", "no_such_word")
    assert answer.code == 2
    error = told(answer)
    assert error["status"] == 2
    assert error["error"].removeprefix("softmoe ") == answer.err.removeprefix("softmoe: ").rstrip("\n")


def test_the_table_for_programs_has_every_command() -> None:
    lines = re.findall(r"^softmoe (.*?--json)(?:  .*)?$", AGENTS, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {*COMMANDS} == ACTIONS.keys() - {"help", "version"}


def test_answers_that_need_no_model(softmoe: Softmoe, tmp_path: Path) -> None:
    assert told(softmoe("--version", "--json")).keys() == {"version"}
    assert told(softmoe("train", "--help", "--json"))["help"].startswith("softmoe train")
    assert "complete -F" in told(softmoe("completion", "bash", "--json"))["script"]
    routers = told(softmoe("list", "routers", "--json", "--filter", "soft"))
    assert {"group": "model/router", "name": "soft"}.items() <= next(r for r in routers if r["name"] == "soft").items()
    (model,) = told(softmoe("list", "models", "--filter", "vit_nano2_soft", "--json"))
    assert model["group"] == "model" and model["tokens"] > 0 and model["params"] > 0
    study(tmp_path / "outputs" / "made_up")
    states = told(softmoe("status", "--json"))
    assert len(states) == 9 and states[0]["state"] == "done"


def test_two_formats_and_what_is_no_json(softmoe: Softmoe) -> None:
    assert "two formats" in told(softmoe("cost", "format=csv", "--json"))["error"]
    assert "leave out --json" in told(softmoe("train", "--cfg", "job", "--json"))["error"]
    (way,) = {tuple(programs.as_option(["cost", *words])) for words in (["--json"], ["format=json", "--json"])}
    assert way == ("cost", "format=json")


def test_all_else_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    """What this process prints, and what those print that it starts; afterwards all is as before."""
    with programs.for_programs():
        print("for people")
        subprocess.run(["echo", "by another"], check=True)
        programs.reply({"loss": float("nan"), "of": [1.5, float("inf")], "text": "é\n"})
    print("after")
    out, err = capfd.readouterr()
    line, after = out.splitlines()
    assert json.loads(line) == {"loss": None, "of": [1.5, None], "text": "é\n"} and after == "after"
    assert sorted(err.splitlines()) == ["by another", "for people"]


def test_compare_answers_with_its_table(softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softmoe_cli.compare.figures.figure_files", lambda _, name: {f"{name}.svg": b"drawn"})
    monkeypatch.setattr("softmoe_cli.compare.figures.rehearse", lambda: None)
    study(tmp_path / "runs")
    answer = told(softmoe("compare", "runs", "--json"))
    table = json.loads((tmp_path / "runs/compare/table.json").read_text())
    assert {key: answer[key] for key in table} == table
    assert all((tmp_path / answer["folder"] / file).exists() for file in answer["files"])


@pytest.mark.thorough
def test_a_run_a_sweep_and_a_check(softmoe: Softmoe, tmp_path: Path) -> None:
    run = told(softmoe("train", *TINY, "train.steps=1", "--json"))
    result = json.loads((tmp_path / run["folder"] / "result.json").read_text())
    assert {key: run[key] for key in result} == result
    assert told(softmoe("train", *TINY, "train.steps=1", "--json")) == run, "it is finished"
    jobs = told(softmoe("train", "-m", *TINY, "train.steps=1", "seed=0,1", "--plan", "--json"))["jobs"]
    assert [job["state"] for job in jobs] == ["waiting"] * 2 and jobs[0]["train_pflop"] > 0
    done = told(softmoe("train", "-m", *TINY, "train.steps=1", "seed=0,1", "--json"))
    assert [job["state"] for job in done] == ["done"] * 2
    checked = told(softmoe("check", "identity", "--json"))
    verdicts = [law["verdict"] for law in checked["laws"]]
    assert (checked["passed"], checked["failed"]) == (verdicts.count("pass"), verdicts.count("fail"))
    assert checked["router"] == "identity" and checked["passed"] > 3


@pytest.mark.thorough
def test_nobody_reads(tmp_path: Path) -> None:
    """Standard output that is closed, or whose reader has gone: the sentence, the status, and no traceback."""
    wrong = f"{sys.executable} -m softmoe_cli train modl=x --json"
    for line in (f"{wrong} >&-", f"{wrong} > >(exec 0<&-; sleep 3)"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "modl" in done.stderr
