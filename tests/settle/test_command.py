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
import torch
import yaml
from safetensors.torch import load_file, save_file

from softmoe_cli.launch import sweep
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.model.pretrained import read_checkpoint
from softmoe_cli.run.rows import jobs
from softmoe_cli.settle import fair
from tests.conftest import TINY, Softmoe, thinned
from tests.launch.sweeps import LINE, rows_of
from tests.processes import Started, until
from tests.runs import saved
from tests.stack.alike import require_alike
from tests.wandb_file import records

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


REFUSED = {
    ("model/router=dense",): "two arms or more",
    ("model/router=dense,soft", "seed=0,1"): "seed=N is the first one",
    ("model/router=dense,soft", "max_seeds=4"): "needs 5 seeds",
    ("model/router=dense,soft", "free=train.steps"): "has no effect without equal=",
    ("model/router=dense,soft", "tune=optim.lr"): "goes together",
    ("model/router=dense,soft", "+search=quality"): "leave one out",
}


@pytest.mark.parametrize(("words", "said"), thinned(REFUSED.items(), 2))
def test_what_cannot_be_settled_is_refused(words: tuple[str, ...], said: str, softmoe: Softmoe) -> None:
    answer = softmoe("settle", *SHORT, *words)
    assert answer.code == 2 and said in answer.err
    assert not (Path.cwd() / "outputs").exists()


@pytest.mark.thorough
def test_a_value_that_no_run_takes_is_named(softmoe: Softmoe) -> None:
    """Not the one that was typed for all arms."""
    words = ("model/router=dense,soft", "tune=train.steps", "tune_values=[3.5,4.5]")
    answer = softmoe("settle", *SHORT, *words)
    assert answer.code == 2
    assert "4 of 4 jobs cannot work" in answer.err and "train.steps=4.5: expected whole number" in answer.err


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
def test_several_at_once_take_turns(tmp_path: Path) -> None:
    """Three commands, as from three machines: one works, is killed, and the next goes on with its runs; both that are
    left end with the same verdicts, and each run was made once. Another question does not wait to be refused."""
    line = experiments(tmp_path, dense=dict(LEARNS), same={"router": "identity", **LEARNS}, crippled=dict(CRIPPLED))
    words = (line, "margin=30", "format=json", "max_seeds=6", "train.batch_size=32")
    study = tmp_path / "outputs" / "settled"

    def begin(name: str, *more: str) -> Started:
        return Started(tmp_path, ["settle", *SHORT, *words, *more], {}, out=name)

    first = begin("first.txt")
    until(lambda: list(study.glob("sweep-settle/jobs.json")), first)
    others = [begin(f"{name}.txt") for name in ("second", "third")]
    until(
        lambda: all(
            "another command works on" in (tmp_path / f"{name}.txt").read_text() for name in ("second", "third")
        ),
        *others,
    )
    refused, out = begin("other.txt", "margin=3").wait()
    assert refused == 2 and "was begun with margin=30.0, not margin=3.0" in out
    until(lambda: len(list(study.glob("*/result.json"))) > 2, first)
    assert not first.ended, "it ended before it could be killed"
    first.send(signal.SIGKILL)
    first.wait()
    left = [process.wait() for process in others]
    assert {code for code, _ in left} <= {0, 3}, left
    one, two = (json.loads(out.splitlines()[-1]) for _, out in left)
    assert verdicts(one) == verdicts(two) and one["seeds"] == 6
    done = [line for _, out in left for line in out.splitlines() if re.search(r"\] done +", line)]
    assert len(done) < 18 == len(list(study.glob("*/result.json"))), "what the first had finished was not made again"


@pytest.mark.thorough
@pytest.mark.long
def test_seeds_at_once(tmp_path: Path) -> None:
    """Each round's seeds of an arm are one process; the runs and verdicts are those of runs alone."""
    words = ("model/router=dense,soft", "margin=30", "format=json", "max_seeds=5", "train.log_every=1")
    answers = {
        name: settle(tmp_path / name, *words, *more).wait()
        for name, more in {"alone": (), "stack": ("seeds_at_once=3",)}.items()
    }
    assert {code for code, _ in answers.values()} <= {0, 3}, answers
    alone, stack = (json.loads(answers[name][1].splitlines()[-1]) for name in ("alone", "stack"))
    assert [arm["verdict"] for arm in stack["arms"]] == [arm["verdict"] for arm in alone["arms"]]
    for key in ("decided", "seeds", "train_pflop", "failed"):
        assert stack[key] == alone[key]
    runs = sorted(file.parent for file in (tmp_path / "alone/outputs/settled").glob("*/result.json"))
    assert len(runs) == 10
    for run in runs:
        require_alike(tmp_path / "stack/outputs/settled" / run.name, run)
    hardware = [row["hardware"] for row in rows_of(tmp_path / "stack/outputs/settled")]
    assert sum(each.endswith("3 seeds at once") for each in hardware) == 6, "of each arm the first is tried alone"


@pytest.mark.thorough
@pytest.mark.long
def test_failures_and_budgets(tmp_path: Path) -> None:
    """An arm whose every seed fails has failed; a budget of FLOPs ends it, with what more would be needed; other
    questions in the same study are refused."""
    line = experiments(tmp_path, dense={}, crippled=dict(CRIPPLED), raises=dict(RAISES))
    answer = told(settle(tmp_path, line, "max_seeds=6", "format=json"), 3)
    assert {arm["arm"]: arm["verdict"] for arm in answer["arms"]}["raises"] == "failed"
    typed, _ = jobs(tmp_path / "outputs" / "settled" / "sweep-settle" / "jobs.json")
    assert typed == ["softmoe", "settle", *SHORT, line, "max_seeds=6", "format=json"], "what softmoe status repeats"
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
def test_equal_cost_is_that_of_the_file_of_cn(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images beside a checkpoint's cut are those that the run will have, and what arms were given with another file
    and the same words is not theirs."""
    given: list[list[str]] = []

    def launch(_sweep: Sweep, found: list[list[str]], _first: int) -> list[Any]:
        given[:] = found
        return []

    monkeypatch.setattr(Sweep, "launch", launch)
    monkeypatch.setattr(sweep, "start_server", lambda _modules: None)
    for module in (sweep, fair):
        monkeypatch.setattr(module, "answered", lambda work, *asked: work(*asked))

    def steps(*words: str) -> int:
        told = softmoe(words[0], "-m", "tracking=off", "train.batch_size=8", "equal=train_pflop", *words[1:])
        assert told.code == 0, told
        return next(int(word.rpartition("=")[2]) for word in given[1] if word.startswith("train.steps="))

    start = saved(tmp_path / "start.safetensors", 0)
    (tmp_path / "half.yaml").write_text("defaults: [finetune, _self_]\ndata: {validation_fraction: 0.5}\n")
    line = ("finetune", f"checkpoint={start}", "data=digits", "model.image_size=8,16", "slots=proportional",
            "train.steps=null", "train.epochs=4")  # fmt: skip
    typed = steps(*line, "study=typed", "data.validation_fraction=0.5")
    assert steps(*line, "study=file", "-cn=half", "-cd=.") == typed
    for name, number in (("some", 100), ("more", 900)):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [train, _self_]\ntrain: {{steps: {number}}}\n")
    line = ("train", *TINY[:3], "model.backbone.heads=2", "model.backbone.mlp_width=32,64", "baseline=mlp_width=32")
    some, more = (steps(*line, "study=same", f"-cn={name}", "-cd=.") for name in ("some", "more"))
    assert more / 9 == pytest.approx(some, abs=1)


@pytest.mark.thorough
@pytest.mark.parametrize("gone", [1, 0])
def test_equal_cost_is_not_of_experts_that_went(softmoe: Softmoe, tmp_path: Path, gone: int) -> None:
    """A checkpoint whose weights say that all are left is as any other."""
    start = saved(tmp_path / "start.safetensors", 0)
    card = {"softmoe": json.dumps(read_checkpoint(str(start)).card)}
    alive = torch.arange(4) >= gone
    save_file(load_file(start) | {"blocks.1.mlp.alive": alive}, start, metadata=card)
    words = (f"checkpoint={start}", "data=digits", "tracking=off", "train.batch_size=8,16", "train.steps=100")
    answer = softmoe("settle", *words, "equal=train_pflop", "baseline=batch_size=8", "--plan")
    assert answer.code == (2 if gone else 0), answer
    assert ("counts all experts" in answer.err and "softmoe prune checkpoint=" in answer.err) == bool(gone)


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.parametrize(
    ("needs", "where"),
    [
        ("submitit", ("slurm", "cluster=local", "gpus=0", "cpus=1")),
        ("ray", ("ray", "cpus=1", "jobs=2")),
    ],
)
def test_rounds_run_where_sweeps_do(tmp_path: Path, needs: str, where: tuple[str, ...]) -> None:
    """Slurm's own processes on this machine, and a Ray of its own."""
    pytest.importorskip(needs)
    place, *options = where
    launcher = [f"hydra/launcher={place}", *(f"hydra.launcher.{option}" for option in options)]
    process = settle(tmp_path, "model/router=dense,soft", "max_seeds=5", *launcher, "format=json")
    left, out = process.wait()
    assert left in (0, 3), out
    assert json.loads(out.splitlines()[-1])["seeds"] == 5


@pytest.mark.thorough
@pytest.mark.long
def test_wandb_has_the_verdicts_of_each_look(tmp_path: Path) -> None:
    """Read back from its offline files: each round has a seed more, and the last look is what the command ends with."""
    untracked = [word for word in SHORT if not word.startswith("tracking=")]
    words = (*untracked, "model/router=dense,soft", "tracking=offline", "wandb.project=mine", "max_seeds=7",
             "margin=0.5", "hydra.launcher.jobs=2", "format=json")  # fmt: skip
    code, out = Started(tmp_path, ["settle", *words], {}, out="out.txt").wait()
    assert code in (0, 3), out
    answer = json.loads(out.splitlines()[-1])
    soft = next(arm for arm in answer["arms"] if arm["arm"] == "soft")
    study = tmp_path / "outputs" / "settled"
    files = sorted((study / "compare").glob("wandb/offline-run-*/run-*.wandb"))
    told, ids = [], set()
    for file in files:
        kept = records(file)
        ids.add(next(each.run.run_id for each in kept if each.WhichOneof("record_type") == "run"))
        (history,) = [each.history for each in kept if each.WhichOneof("record_type") == "history"]
        numbers = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        table = json.loads(next((file.parent / "files" / "media").rglob("verdicts_*.table.json")).read_text())
        rows = [dict(zip(table["columns"], each, strict=True)) for each in table["data"]]
        told.append((history.step.num, numbers, {row["group"]: row for row in rows}))
    assert len(ids) == 1 and [step for step, *_ in told] == list(range(5, answer["seeds"] + 1))
    assert all(numbers["compare/n/soft"] == step == by["soft"]["seeds"] for step, numbers, by in told)
    _, numbers, last = told[-1]
    assert last["soft"]["verdict"] == soft["verdict"] and last["dense"]["verdict"] == "baseline"
    for theirs, ours in (("difference", "difference"), ("low", "difference_low"), ("high", "difference_high")):
        assert last["soft"][theirs] == pytest.approx(soft[ours], rel=1e-12)
    assert last["soft"]["p"] == pytest.approx(soft["p_holm"]) and numbers["compare/open"] == len(answer["open"])
    page = next((files[-1].parent / "files" / "media").rglob("page_*.html")).read_text()
    assert page == (study / "compare" / "index.html").read_text() and soft["verdict"] in page
    assert len(list(study.glob("vit_*/wandb/offline-run-*"))) == 2 * answer["seeds"], "each run has its own"


@pytest.mark.thorough
@pytest.mark.long
def test_finetunings_are_settled(tmp_path: Path) -> None:
    """With a checkpoint the arms are finetunings, whose pretraining is stated."""
    code, out = Started(tmp_path, ["train", *SHORT, "train.steps=30", "study=base"], {}, out="base.txt").wait()
    assert code == 0, out
    (base,) = (tmp_path / "outputs" / "base").glob("*/result.json")
    size = ("threads=1", "train.batch_size=8", "train.steps=12", "tracking=off")
    words = ("settle", f"checkpoint={base.parent}", *size, "adapter=lora,none", "max_seeds=5", "study=tuned")
    code, out = Started(tmp_path, [*words, "format=json"], {}, out="out.txt").wait()
    assert code in (0, 3), out
    answer = json.loads(out.splitlines()[-1])
    cost = json.loads(base.read_text())["train_pflop"]
    assert {arm["arm"]: arm["baseline"] for arm in answer["arms"]} == {"lora": False, "none": True}
    assert [arm["checkpoint_pflop"] for arm in answer["arms"]] == [pytest.approx(cost)] * 2
    rows = rows_of(tmp_path / "outputs" / "tuned")
    assert {(row["command"], row["seed"]) for row in rows} == {("finetune", seed) for seed in range(5)}
    assert answer["train_pflop"] == pytest.approx(sum(row["train_pflop"] for row in rows), rel=1e-12)
    code, out = Started(tmp_path, [*words], {}, out="out.txt").wait()
    assert "checkpoints had cost" in out and "not counted here; softmoe compare --with-source counts it" in out
    assert "softmoe compare outputs/tuned" in out


@pytest.mark.thorough
@pytest.mark.long
def test_a_search_for_the_best_value(tmp_path: Path) -> None:
    """Killed and typed again, it ends in the same values as a search that nobody stopped."""
    pytest.importorskip("optuna")
    words = ["train", "-m", *SHORT, "model/router=dense,soft", "seed=0", "train.steps=20", "tune=optim.lr",
             "tune_trials=4", "tune_range=[1e-4,1e-2]", "tune_seeds=1"]  # fmt: skip

    def begin(folder: Path) -> Started:
        return Started(folder, words, {}, out="out.txt")

    whole, killed = (tmp_path / name / "outputs" / "settled-tuning" for name in ("whole", "killed"))
    code, out = begin(tmp_path / "whole").wait()
    assert code == 0, out
    for _ in range(2):
        _killed(begin(tmp_path / "killed"), killed, 0.3)
    code, out = begin(tmp_path / "killed").wait()
    assert code == 0, out
    expected, found = (json.loads((trials / "tuning.json").read_text()) for trials in (whole, killed))
    assert [(arm["best"], arm["trials"]) for arm in found["arms"]] == [
        (arm["best"], arm["trials"]) for arm in expected["arms"]
    ]
    assert [len(arm["trials"]) for arm in found["arms"]] == [4, 4] and found["order_changed"] is not None
    assert len(list(killed.glob("*/result.json"))) == 8, "none was tried twice"
    chosen = {row["router"]: row["optim.lr"] for row in rows_of(tmp_path / "killed" / "outputs" / "settled")}
    assert chosen == {arm["arm"]: arm["best"] for arm in found["arms"]}
