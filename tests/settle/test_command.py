"""`softmoe settle` as it is typed: through real processes, killed and typed again."""

import itertools
import json
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Softmoe
from tests.launch.sweeps import LINE, until
from tests.processes import Started

SHORT = (*(word for word in LINE if not word.startswith("study=")), "train.steps=12", "study=settled")
LEARNS, CRIPPLED = {"optim": {"lr": 1e-2}}, {"optim": {"lr": 1e-4}}
RAISES = {"optim": {"warmup": 0, "lr": 1e38, "clip_norm": None}}
"""Ends a run with a loss that is no number."""


def experiments(folder: Path, **settings: dict[str, Any]) -> str:
    """Arms of a dense model with these settings, as files of one's own."""
    place = folder / "conf" / "experiment"
    place.mkdir(parents=True)
    for name, values in settings.items():
        body = {"defaults": [{"override /model/router": values.pop("router", "dense")}], **values}
        (place / f"{name}.yaml").write_text("# @package _global_\n" + yaml.safe_dump(body, sort_keys=False))
    return f"+experiment={','.join(settings)}"


def settle(folder: Path, *words: str) -> Started:
    return Started(folder, ["settle", *SHORT, *words], {}, out="out.txt")


def told(process: Started, code: int) -> dict[str, Any]:
    left, out = process.wait()
    assert left == code, out
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def verdicts(answer: dict[str, Any]) -> dict[str, Any]:
    """What must be the same however often a command was stopped: all but clocks."""
    return {key: value for key, value in answer.items() if key not in ("hours", "failed")}


def test_what_cannot_be_settled_is_refused(softmoe: Softmoe) -> None:
    for words, said in {
        ("model/router=dense",): "two arms or more",
        ("model/router=dense,soft", "seed=0,1"): "seed=N is the first one",
        ("model/router=dense,soft", "max_seeds=4"): "needs 5 seeds",
        ("model/router=dense,soft", "free=train.steps"): "has no effect without equal=",
        ("model/router=dense,soft", "tune=optim.lr"): "go together",
        ("model/router=dense,soft", "+search=quality"): "leave one out",
    }.items():
        answer = softmoe("settle", *SHORT, *words)
        assert answer.code == 2 and said in answer.err, words
    assert not (Path.cwd() / "outputs").exists()


@pytest.mark.thorough
def test_a_plan_starts_nothing(softmoe: Softmoe) -> None:
    answer = softmoe("settle", *SHORT, "model/router=dense,soft", "margin=2", "max_seeds=20", "format=json", "--plan")
    assert answer.code == 0, answer.err
    plan = json.loads(answer.out)
    assert [arm["arm"] for arm in plan["arms"]] == ["dense", "soft"] and plan["first_look_at"] == 5
    assert [each["effect"] for each in plan["expected"]] == [0.5, 1.0, 2.0, 0.0, 0.0, 0.0]
    seconds = sum(arm["seconds"] for arm in plan["arms"])
    assert plan["expected"][1]["hours"] == pytest.approx(plan["expected"][1]["seeds"] * seconds / 3600)
    assert not (Path.cwd() / "outputs").exists()


@pytest.mark.thorough
@pytest.mark.long
def test_killed_at_any_moment_it_ends_in_the_same_and_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    """Dense, dense under another noise, a crippled one: SIGKILL at five random moments, then the same command to its
    end, and with more seeds; each time all figures are those of a command that nobody stopped."""
    arms: dict[str, dict[str, Any]] = {
        "dense": LEARNS,
        "same": {"router": "identity", **LEARNS},
        "crippled": CRIPPLED,
    }
    for name in ("whole", "killed"):
        line = experiments(tmp_path / name, **{arm: dict(values) for arm, values in arms.items()})
    words = (line, "margin=30", "format=json", "train.steps=60", "train.batch_size=32")
    expected: dict[int, dict[str, Any]] = {}
    for most in (6, 9):
        process = settle(tmp_path / "whole", *words, f"max_seeds={most}")
        left, out = process.wait()
        assert left in (0, 3), out
        expected[most] = json.loads(out.splitlines()[-1])
    study = tmp_path / "killed" / "outputs" / "settled"
    moments = random.Random(0)
    for _ in range(5):
        _killed(settle(tmp_path / "killed", *words, "max_seeds=6"), study, moments.uniform(0, 2))
    for most in (6, 9):
        process = settle(tmp_path / "killed", *words, f"max_seeds={most}")
        left, out = process.wait()
        assert left == (0 if expected[most]["decided"] else 3), out
        assert verdicts(json.loads(out.splitlines()[-1])) == verdicts(expected[most])
    words_of = {arm["arm"]: arm["verdict"] for arm in expected[9]["arms"]}
    assert words_of["crippled"] == "worse" and words_of["same"] in ("equal within the margin", "not distinguishable")
    looks = [json.loads(line) for line in (study / "looks.jsonl").read_text().splitlines()]
    assert all(set(a["runs"]) < set(b["runs"]) for a, b in itertools.pairwise(looks)), "each look is recorded"


def _killed(process: Started, study: Path, later_s: float) -> None:
    """Kills a command some time after it has finished one more run."""
    before = len(list(study.glob("*/result.json")))
    until(lambda: process.ended or len(list(study.glob("*/result.json"))) > before)
    time.sleep(later_s)
    if not process.ended:
        process.send(signal.SIGKILL)
    process.wait()


@pytest.mark.thorough
@pytest.mark.long
def test_failures_budgets_and_a_second_command_at_once(tmp_path: Path) -> None:
    """An arm whose every seed fails has failed; a budget of FLOPs ends it, with what more would be needed; a second
    command at the same time is refused; other arms in the same study are refused."""
    line = experiments(tmp_path, dense={}, crippled=dict(CRIPPLED), raises=dict(RAISES))
    process = settle(tmp_path, line, "max_seeds=6", "format=json")
    study = tmp_path / "outputs" / "settled"
    until(lambda: list(study.glob("sweep-*/jobs.json")))
    other = Started(tmp_path, ["settle", *SHORT, line, "max_seeds=6"], {}, out="other.txt")
    code, out = other.wait()
    assert code == 2 and "the same sweep is running already" in out
    answer = told(process, 3)
    assert {arm["arm"]: arm["verdict"] for arm in answer["arms"]}["raises"] == "failed"
    assert answer["open"] == ["crippled"] and len(answer["failed"]) == 6 and "not finite" in answer["failed"][0]
    pflop = answer["train_pflop"]
    stopped = settle(tmp_path, line, "max_seeds=9", f"pflop={1.1 * pflop}")
    code, out = stopped.wait()
    assert code == 3 and f"the next look would pass pflop={1.1 * pflop:g}: it takes about" in out
    changed = settle(tmp_path, line, "max_seeds=9", "margin=3")
    code, out = changed.wait()
    assert code == 2 and "was begun with margin=null, not margin=3.0" in out


@pytest.mark.thorough
@pytest.mark.long
def test_tuned_arms_of_equal_cost(tmp_path: Path) -> None:
    """Each arm gets its own best value on seeds that no verdict uses, at equal training FLOPs that are booked apart."""
    words = ("model/router=dense,soft", "train.steps=60", "equal=train_pflop", "tune=optim.lr", "max_seeds=5",
             "tune_values=[3e-5,3e-3]", "tune_seeds=2", "format=json")  # fmt: skip
    process = settle(tmp_path, *words)
    left, out = process.wait()
    assert left in (0, 3), out
    answer = json.loads(out.splitlines()[-1])
    tuning = answer["tuning"]
    assert [arm["best"] for arm in tuning["arms"]] == [3e-3, 3e-3] and tuning["arms"][0]["at_end"] == "largest"
    settled, trials = (
        [json.loads(file.read_text()) for file in (tmp_path / "outputs" / study).glob("*/result.json")]
        for study in ("settled", "settled-tuning")
    )
    assert {row["seed"] for row in settled} == set(range(5)) and min(row["seed"] for row in trials) >= 1e9
    assert {row["optim.lr"] for row in settled} == {3e-3} and len(trials) == 8
    costs = [row["train_pflop"] for row in settled + trials]
    assert max(costs) < 1.02 * min(costs)
    for arm in tuning["arms"]:
        mine = [row["train_pflop"] for row in trials if row["router"] == arm["arm"]]
        assert arm["train_pflop"] == pytest.approx(sum(mine), rel=1e-12) and len(mine) == 4
    assert answer["train_pflop"] == pytest.approx(sum(row["train_pflop"] for row in settled), rel=1e-12)
    assert (tmp_path / "outputs" / "settled-tuning" / "tuning.svg").stat().st_size > 1000


@pytest.mark.thorough
@pytest.mark.long
def test_a_sweep_with_fair_arms(tmp_path: Path) -> None:
    """train -m takes the same words, and its jobs are the same runs each time."""
    words = ["train", "-m", *SHORT, "model/router=dense,soft", "seed=0,1", "train.steps=60", "equal=train_pflop"]
    code, out = Started(tmp_path, words, {}, out="out.txt").wait()
    assert code == 0 and re.search(r"soft +train\.steps +train\.steps=(?!60\b)\d+ ", out), out
    rows = [json.loads(file.read_text()) for file in (tmp_path / "outputs").glob("settled/*/result.json")]
    assert sorted((row["router"], row["seed"]) for row in rows) == [
        ("dense", 0),
        ("dense", 1),
        ("soft", 0),
        ("soft", 1),
    ]
    assert max(row["train_pflop"] for row in rows) < 1.02 * min(row["train_pflop"] for row in rows)
    code, out = Started(tmp_path, words, {}, out="out.txt").wait()
    assert code == 0 and "4 done before" in out


@pytest.mark.thorough
@pytest.mark.long
def test_rounds_run_where_sweeps_do(tmp_path: Path) -> None:
    """Slurm's own processes on this machine."""
    pytest.importorskip("submitit")
    words = ("model/router=dense,soft", "max_seeds=5", "hydra/launcher=slurm", "hydra.launcher.cluster=local",
             "hydra.launcher.gpus=0", "hydra.launcher.cpus=1", "format=json")  # fmt: skip
    process = settle(tmp_path, *words)
    left, out = process.wait()
    assert left in (0, 3), out
    assert json.loads(out.splitlines()[-1])["seeds"] == 5
