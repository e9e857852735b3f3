"""What is fixed before the first run: the question, the arms' cost and their tuned values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import conf_folder, load_yaml
from softmoe_cli.settle.alike import require_comparable
from softmoe_cli.settle.arms import Arm, science
from softmoe_cli.settle.command import own_words
from softmoe_cli.settle.fair import Arms
from softmoe_cli.settle.record import fix_question, give, given_before
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


def tree(**data: Any) -> dict[str, Any]:
    fields = ("name", "format", "root", "label", "num_classes", "split_seed", "validation_fraction", "test_fraction")
    loss, batch = data.pop("loss", "softmax"), data.pop("batch_size", 32)
    return {"data": dict.fromkeys(fields, 0) | data, "train": {"loss": loss, "batch_size": batch}}


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"split_seed": 1}, (), "write 'data.split_seed=${seed}': then each seed has its own cut"),
        ({"name": "b"}, (), "data.name=0,b: arms must be tested on the same images"),
        ({"loss": "sigmoid"}, ("quality=loss",), "another measure in each"),
        ({"batch_size": "auto"}, (), "settle needs a number"),
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


@dataclass
class Launcher:
    """Answers for arms that are called by their first word, and writes a result for every trial whose seed works."""

    folder: Path
    best: dict[str, str]
    fails: set[tuple[str, str]] = field(default_factory=set)
    ran: int = 0
    failures: dict[Path, str] = field(default_factory=dict)

    def composed(self, many: Sequence[list[str]]) -> list[tuple[str, list[str], dict[str, Any]]]:
        return [("", words, {"study": "s", "optim": {"lr": 1}}) for words in many]

    def ask(self, many: Sequence[list[str]], seeds: Sequence[int]) -> tuple[list[Job], list[str]]:
        jobs = []
        for words in many:
            of = dict(word.split("=") for word in words)
            names = {seed: self.result(of["arm"], of["optim.lr"], seed)["name"] for seed in seeds}
            folders = {seed: self.folder / of.get("study", "s") / name for seed, name in names.items()}
            cost = {"train_pflop": 0.000128}
            jobs.append(Job(" ".join(words), words, folders[seeds[0]], None, cost, folders=folders))
        return jobs, [""]

    def result(self, arm: str, value: str, seed: int) -> dict[str, Any]:
        good = 95 if self.best[arm] == value else 80
        told = row(router="dense", seed=seed, top1_pct=good, optim__betas=[arm], optim__lr=value)
        return told | {"name": f"{arm}-{value}-{seed}", "study": "s-tuning"}

    def carry_out(self, jobs: Sequence[Job], slots: Sequence[str]) -> None:
        for job in jobs:
            self.ran += 1
            of = dict(word.split("=") for word in job.overrides)
            if (of["arm"], of["optim.lr"]) not in self.fails:
                write(job.folder.parent, self.result(of["arm"], of["optim.lr"], int(of["seed"])))

    def tell(self, text: str) -> None:
        """Said to nobody."""


def tuned(launcher: Launcher, *words: str, values: str = "1,2") -> dict[str, list[str]]:
    names = [["arm=a", "optim.lr=9"], ["arm=b", "optim.lr=9"]]
    cost = {"train_pflop": 0.000128}
    arms = Arms([Arm(each[0], each, Job("", each, Path(), None, cost)) for each in names], 0, names, [""])
    own = asked("tune=optim.lr", f"tune_values=[{values}]", "tune_seeds=2", *words)
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


def test_no_value_is_written_as_null(tmp_path: Path) -> None:
    assert tuned(Launcher(tmp_path, {"a": "null", "b": "1"}), values="null,1")["arm=a"] == ["arm=a", "optim.lr=null"]


def test_tuning_keeps_to_the_budgets(tmp_path: Path) -> None:
    """By FLOPs nothing starts; by time the first trial of each arm tells what the others take."""
    with pytest.raises(RunError, match=r"pflop=0\.001: tuning has taken"):
        tuned(dear := Launcher(tmp_path / "a", {"a": "1", "b": "2"}), "pflop=0.001")
    assert dear.ran == 0
    with pytest.raises(RunError, match=r"hours=0\.02: tuning has taken"):
        tuned(slow := Launcher(tmp_path / "b", {"a": "1", "b": "2"}), "hours=0.02")
    assert slow.ran == 2
    assert load_yaml(conf_folder() / "settle.yaml")["hours"] is None
