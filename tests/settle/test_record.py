"""What is fixed before the first run: the question, the arms' cost and their tuned values."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from softmoe_cli.config.data import Data
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import conf_folder, load_yaml
from softmoe_cli.settle.alike import require_comparable, require_same_images
from softmoe_cli.settle.arms import Arm, science
from softmoe_cli.settle.command import own_words
from softmoe_cli.settle.fair import Arms
from softmoe_cli.settle.record import fix_question, give, given_before
from softmoe_cli.settle.search import first_values
from softmoe_cli.settle.trials import TUNED, require_below, tune_arms
from tests.synthetic import row, write


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softmoe_cli.settle.trials.write_tuning", lambda *_: None)  # a second each


def asked(*words: str) -> SettleConfig:
    return own_words(words, SettleConfig)[0]


def question(*arms: list[str], **changes: Any) -> dict[str, Any]:
    told = [{"label": ", ".join(words), "words": science(words)} for words in arms]
    fixed = {"arms": told, "baseline": told[0]["label"], "quality": "top1_pct", "margin": None, "first_seed": 0}
    return fixed | {"fairness": {}} | changes


def test_the_question_is_what_was_meant_and_not_how_it_was_typed(tmp_path: Path) -> None:
    fix_question(tmp_path, question(["a=1", "b=2"], ["a=2", "b=2"]), lambda: False)
    again = question(["b=2", "device=cpu", "a=1", "output_root=/x", "wandb.tags=[x]"], ["b=2", "a=2"])
    fix_question(tmp_path, again, lambda: True)
    fix_question(tmp_path, question(["a=1", "b=2"], ["a=2", "b=2"], fairness={"tune": None, "tune_range": []}), bool)
    fair = question(["a=1", "b=2"], ["a=2", "b=2"], fairness={"equal": "params_m", "tune_range": []})
    with pytest.raises(UsageError, match=r"was begun with equal=null, not equal=.params_m.: the"):
        fix_question(tmp_path, fair, lambda: True)
    for other in (question(["a=1", "b=3"], ["a=2", "b=3"]), question(["a=2", "b=2"], ["a=1", "b=2"])):
        with pytest.raises(UsageError, match="was begun with"):
            fix_question(tmp_path, other, lambda: False)
    assert science(["slots=4", "threads=2", "data.root=x", "data.name=y"]) == ["data.name=y", "slots=4"]


def test_a_question_after_the_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has results of these arms already"):
        fix_question(tmp_path, question(["a=1"], ["a=2"]), lambda: True)
    assert not list(tmp_path.iterdir())


def test_what_is_given_first_stays(tmp_path: Path) -> None:
    path, asked_for = tmp_path / "study" / "equal.jsonl", {"equal": "latency_ms", "arms": [["a=1"]]}
    assert given_before(path, asked_for) is None
    assert give(path, asked_for, [1]) == give(path, asked_for, [2]) == given_before(path, asked_for) == [1]
    assert give(path, asked_for | {"arms": []}, [3]) == [3]


def tree(split_seed: int | str = 0, **train: Any) -> dict[str, Any]:
    return {
        "data": {"split_seed": split_seed},
        "train": {"loss": "softmax", "batch_size": 32, "precision": "fp32"} | train,
    }


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"loss": "sigmoid"}, ("quality=loss",), "another measure in each"),
        ({"batch_size": "auto"}, (), "settle needs a number"),
        ({"precision": "auto"}, (), "settle needs fp32, bf16 or fp16"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused_before_anything_starts(
    changes: dict[str, Any], words: Sequence[str], said: str
) -> None:
    typed = [["a=1"], ["a=2"]]
    require_comparable(typed, [tree(), tree()], asked(*words))
    with pytest.raises(UsageError) as error:
        require_comparable(typed, [tree(), tree(**changes)], asked(*words))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split_seed": 1}, "write 'data.split_seed=${seed}': then each seed has its own cut"),
        ({"name": "b"}, "data.name=a,b: arms must be tested on the same images"),
        ({"sets": ["digits"]}, "arms must be tested on the same images"),
    ],
)
def test_arms_on_other_images_are_refused(changes: dict[str, Any], said: str) -> None:
    data = replace(Data(), name="a", split_seed=0)
    require_same_images([data, replace(data, workers=7)])
    with pytest.raises(UsageError) as error:
        require_same_images([data, replace(data, **changes)])
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("key", "words", "said"),
    [
        ("train.minutes", (), "changes what a run costs"),
        ("prune.until", (), "changes what a run costs"),
        ("prune.keep", (), "changes what a run costs"),
        ("data.split_seed", (), "compared on other images each"),
        ("data.sets.digits.test_fraction", (), "compared on other images each"),
        ("data", (), "compared on other images each"),
        ("train.loss", ("quality=nll",), "another measure in each"),
    ],
)
def test_values_that_cannot_be_compared_are_refused(key: str, words: Sequence[str], said: str) -> None:
    """Costs that no formula says beforehand, images, and losses."""
    typed, trees = [["a=1"], ["a=2"]], [tree(), tree()]
    for good in ("data.hflip", "prune.by", "train.label_smoothing", "train.loss"):
        require_comparable(typed, trees, asked(f"tune={good}", "tune_values=[1,2]"))
    with pytest.raises(UsageError, match=f"tune={key}: .*{said}"):
        require_comparable(typed, trees, asked(f"tune={key}", "tune_values=[1,2]", *words))


def test_tuning_what_arms_differ_in_or_over_cuts_is_refused() -> None:
    tuned = asked("tune=optim.lr", "tune_values=[1,2]")
    with pytest.raises(UsageError, match="arms differ in it already"):
        require_comparable([["optim.lr=1"], ["optim.lr=2"]], [tree(), tree()], tuned)
    with pytest.raises(UsageError, match="tune with one cut"):
        require_comparable([["a=1"], ["a=2"]], [tree(split_seed="${seed}")] * 2, tuned)
    with pytest.raises(UsageError, match="seed=1000000002: seeds from 1000000000 on are for tuning"):
        require_below([3, 1_000_000_002])


@pytest.mark.parametrize("word", ["tolerance=0.1", "tune_seeds=2"])
def test_idle_words_are_refused(word: str) -> None:
    with pytest.raises(UsageError, match=f"{word} has no effect without"):
        asked(word)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune=optim.lr", "goes together with tune_values"),
        ("tune_values=[1,2]", "goes together with tune_values"),
        ("tune=optim.lr tune_values=[1,2] tune_trials=4 tune_range=[1,2]", "goes together with tune_values"),
        ("tune=optim.lr tune_trials=4", "tune_trials=N and tune_range=.LOW,HIGH. go together"),
        ("tune=optim.lr tune_range=[1,2]", "tune_trials=N and tune_range=.LOW,HIGH. go together"),
        ("tune=optim.lr tune_trials=4 tune_range=[2,1]", "tune_range=.2.0, 1.0.: give the smallest"),
        ("tune=optim.lr tune_trials=4 tune_range=[0,1]", "tune_range=.0.0, 1.0.: every|tune_range"),
        ("tune=optim.lr tune_trials=1 tune_range=[1,2]", "tune_trials=1"),
        ("tune=optim.lr tune_trials=4 tune_range=1", "tune_range=1: write a list"),
    ],
)
def test_tuning_that_cannot_be_is_refused(words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        asked(*words.split())


def test_a_search_needs_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tune_trials=4 needs Optuna: pip install 'softmoe-cli\[optuna\]'"):
        asked("tune=optim.lr", "tune_trials=4", "tune_range=[1,2]")


PFLOP = 0.000128


@dataclass
class Launcher:
    """Answers for arms that are called by their first word, and writes a result for every trial whose seed works."""

    folder: Path
    best: dict[str, str]
    fails: set[tuple[str, str]] = field(default_factory=set)
    notes: dict[Path, str] = field(default_factory=dict)
    ran: int = 0
    most: int = 1000
    """It is interrupted after so many runs."""
    failures: dict[Path, str] = field(default_factory=dict)

    def composed(self, many: Sequence[list[str]]) -> list[tuple[str, list[str], dict[str, Any]]]:
        return [("", words, {"study": "s", "optim": {"lr": 1}}) for words in many]

    def noted(self) -> dict[Path, str]:
        return self.notes

    def ask(self, many: Sequence[list[str]], seeds: Sequence[int]) -> tuple[list[Job], list[str]]:
        jobs = []
        for words in many:
            of = dict(word.split("=") for word in words)
            names = {seed: self.result(of["arm"], of["optim.lr"], seed)["name"] for seed in seeds}
            folders = {seed: self.folder / of.get("study", "s") / name for seed, name in names.items()}
            cost = {"train_pflop": PFLOP}
            jobs.append(Job(" ".join(words), words, folders[seeds[0]], None, cost, folders=folders))
        return jobs, [""]

    def result(self, arm: str, value: str, seed: int) -> dict[str, Any]:
        good = 95 if self.best[arm] == value else 80
        told = row(router="dense", seed=seed, top1_pct=good, optim__betas=[arm], optim__lr=value)
        return told | {"name": f"{arm}-{value}-{seed}", "study": "s-tuning"}

    def carry_out(self, jobs: Sequence[Job], slots: Sequence[str]) -> None:
        for job in jobs:
            if self.ran == self.most:
                raise KeyboardInterrupt
            self.ran += 1
            of = dict(word.split("=") for word in job.overrides)
            if (of["arm"], of["optim.lr"]) in self.fails:
                self.failures[job.folder] = self.notes[job.folder.absolute()] = f"{job.run}: not finite"
            else:
                write(job.folder.parent, self.result(of["arm"], of["optim.lr"], int(of["seed"])))

    def tell(self, text: str) -> None:
        """Said to nobody."""


def tuned(launcher: Launcher, *words: str, values: str = "tune_values=[1,2]") -> dict[str, list[str]]:
    names = [["arm=a", "optim.lr=9"], ["arm=b", "optim.lr=9"]]
    study, cost = launcher.folder / "s" / "run", {"train_pflop": PFLOP}
    arms = Arms([Arm(each[0], each, Job("", each, study, None, cost)) for each in names], 0, names, [""])
    own = asked("tune=optim.lr", *values.split(), "tune_seeds=2", *words)
    found, _ = tune_arms(cast(Sweep, launcher), arms, own, "top1_pct", range(5))
    return {arm.label: arm.words for arm in found.arms}


def test_a_tuned_value_is_fixed_once(tmp_path: Path) -> None:
    """A trial that failed and would work later changes no arm."""
    launcher = Launcher(tmp_path, {"a": "1", "b": "2"}, {("b", "2")})
    first = tuned(launcher)
    assert first == {"arm=a": ["arm=a", "optim.lr=1"], "arm=b": ["arm=b", "optim.lr=1"]} and launcher.ran == 8
    launcher.fails.clear()
    assert tuned(launcher) == first and launcher.ran == 8
    assert len((tmp_path / "s-tuning" / TUNED).read_text().splitlines()) == 1


def test_a_failed_trial_of_a_list_is_tried_again_until_values_are_given(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {"a": "1", "b": "2"}, {("b", "2")}, most=7)
    with pytest.raises(KeyboardInterrupt):
        tuned(launcher)
    launcher.fails, launcher.most = set(), 1000
    assert tuned(launcher)["arm=b"] == ["arm=b", "optim.lr=2"]


def test_what_was_given_stays_where_runs_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the files that say what tuning found are left as they are."""
    written: list[int] = []
    monkeypatch.setattr("softmoe_cli.settle.trials.write_tuning", lambda found, *_: written.append(len(found)))
    launcher = Launcher(tmp_path, {"a": "1", "b": "2"})
    first = tuned(launcher)
    for result in (tmp_path / "s-tuning").glob("*/result.json"):
        result.unlink()
    assert tuned(launcher) == first and written == [2] and launcher.ran == 8


def test_no_value_is_written_as_null(tmp_path: Path) -> None:
    assert tuned(Launcher(tmp_path, {"a": "null", "b": "1"}), values="tune_values=[null,1]")["arm=a"] == [
        "arm=a",
        "optim.lr=null",
    ]


def test_tuning_keeps_to_the_budgets(tmp_path: Path) -> None:
    """By FLOPs nothing starts; by time the first trial of each arm tells what the others take."""
    with pytest.raises(RunError, match=r"pflop=0\.001: tuning has taken"):
        tuned(dear := Launcher(tmp_path / "a", {"a": "1", "b": "2"}), "pflop=0.001")
    assert dear.ran == 0
    with pytest.raises(RunError, match=r"hours=0\.02: tuning has taken"):
        tuned(slow := Launcher(tmp_path / "b", {"a": "1", "b": "2"}), "hours=0.02")
    assert slow.ran == 2
    assert load_yaml(conf_folder() / "settle.yaml")["hours"] is None


SEARCH = "tune_trials=8 tune_range=[1e-4,1e-1]"
TRIALS = 2 * 8 * 2  # arms, values, seeds


class Surface(Launcher):
    """Quality is a parabola in the logarithm of the value, whose top is at `best`."""

    def result(self, arm: str, value: str, seed: int) -> dict[str, Any]:
        good = 90 - 8 * math.log10(float(value) / float(self.best[arm])) ** 2 + seed % 2
        return super().result(arm, value, seed) | {"validation_top1_pct": good}


def given(folder: Path) -> list[dict[str, Any]]:
    (line,) = (folder / "s-tuning" / TUNED).read_text().splitlines()
    found: list[dict[str, Any]] = json.loads(line)["given"]
    return found


@pytest.mark.thorough
def test_a_search_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Each arm tries as many values, first its own without tuning, and comes near its own optimum; stopped anywhere and
    typed again, the same values are tried, and none twice."""
    pytest.importorskip("optuna")
    best = {"a": "0.002", "b": "0.03"}
    whole = Surface(tmp_path / "whole", best)
    chosen = tuned(whole, values=SEARCH)
    assert whole.ran == TRIALS and [len(each["tried"]) for each in given(whole.folder)] == [8, 8]
    for arm, optimum in best.items():
        value = float(chosen[f"arm={arm}"][-1].partition("=")[2])
        assert abs(math.log10(value / float(optimum))) < 0.2, (arm, value)
    stopped = Surface(tmp_path / "stopped", best)
    for most in (3, 17, 18, 30):
        stopped.most = most
        with pytest.raises(KeyboardInterrupt):
            tuned(stopped, values=SEARCH)
    stopped.most = TRIALS
    assert tuned(stopped, values=SEARCH) == chosen and given(stopped.folder) == given(whole.folder)
    assert stopped.ran == TRIALS


@pytest.mark.thorough
def test_a_failed_trial_of_a_search_stays_failed(tmp_path: Path) -> None:
    """What came after it was chosen with it; but where nothing has worked yet, all is tried again."""
    pytest.importorskip("optuna")
    first = [str(value) for value in first_values(8, 1e-4, 1e-1, 1)]
    launcher = Surface(tmp_path, {"a": "0.002", "b": "0.03"}, {("b", first[0])}, most=20)
    with pytest.raises(KeyboardInterrupt):
        tuned(launcher, values=SEARCH)
    launcher.fails, launcher.most = set(), 1000
    tuned(launcher, values=SEARCH)
    assert launcher.ran == TRIALS and not list((tmp_path / "s-tuning").glob(f"b-{first[0]}-*"))
    never = Surface(tmp_path / "never", launcher.best, {("b", value) for value in first})
    with pytest.raises(RunError, match=r"every value fails with some seed for arm=b\n.*not finite"):
        tuned(never, values=SEARCH)
    assert never.ran == 2 * len(first) * 2, "the search does not go on from nothing"
    never.fails = set()
    tuned(never, values=SEARCH)
    assert len(list((tmp_path / "never" / "s-tuning").glob("b-*"))) == 16


def test_a_search_counts_all_its_trials_before_it_starts(tmp_path: Path) -> None:
    launcher = Surface(tmp_path, {"a": "0.002", "b": "0.03"})
    with pytest.raises(RunError, match=f"pflop={31 * PFLOP:g}: tuning has taken"):
        tuned(launcher, f"pflop={31 * PFLOP}", values=SEARCH)
    assert launcher.ran == 0
