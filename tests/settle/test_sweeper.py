"""The rounds of a settling over real run folders, with a launcher that only writes results."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from softmoe_cli.compare.anytime import p_zero
from softmoe_cli.compare.looks import PastLook, PastLooks
from softmoe_cli.compare.question import Question
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.errors import RunError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import conf_folder, load_yaml
from softmoe_cli.settle.arms import Arm
from softmoe_cli.settle.fair import Arms
from softmoe_cli.settle.report import as_text, told_rows
from softmoe_cli.settle.rounds import Contest, stand
from softmoe_cli.settle.sweeper import Rounds
from tests.settle.made_up import contest, finished
from tests.synthetic import row, write

ROUTERS = ("dense", "soft")


@dataclass
class Entry:
    finished: bool
    job: Job


@dataclass
class Launcher:
    """Writes a result for each job, unless `fails` says that it has none; its notes stay for the next command."""

    folder: Path
    fails: Callable[[str, int], bool]
    notes: dict[Path, str] = field(default_factory=dict)
    failures: dict[Path, str] = field(default_factory=dict)
    ran: list[tuple[str, int]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    seeds_at_once: int = 1
    changes: Callable[[str, int], dict[str, Any]] = lambda router, seed: {}

    def noted(self) -> dict[Path, str]:
        return dict(self.notes)

    def tell(self, text: str) -> None:
        self.said.append(text)

    def carry_out(self, jobs: Sequence[Job], slots: Sequence[str]) -> list[Entry]:
        found = []
        for job in jobs:
            router, _, seed = job.run.partition(" seed=")
            self.ran.append((router, int(seed)))
            self.notes.pop(job.folder, None)
            if self.fails(router, int(seed)):
                self.failures[job.folder] = self.notes[job.folder] = f"{job.run}: out of memory"
            else:
                write(self.folder, result(router, int(seed)) | self.changes(router, int(seed)))
            found.append(Entry(not self.fails(router, int(seed)), job))
        return found


def result(router: str, seed: int) -> dict[str, Any]:
    better = {"dense": 0, "soft": 2, "tokens_choice": 0}[router]
    value = 90 + math.sin(5 * seed) + better + 0.3 * math.sin(31 * seed + len(router))
    return row(router=router, seed=seed, top1_pct=value, study="settled")


def rounds(
    launcher: Launcher,
    routers: Sequence[str] = ROUTERS,
    tracking: str = "off",
    project: str | None = None,
    **asked: Any,
) -> Rounds:
    settings = SettleConfig(**(load_yaml(conf_folder() / "settle.yaml") | asked))
    arms = []
    for router in routers:
        folders = {seed: launcher.folder / result(router, seed)["name"] for seed in range(settings.max_seeds)}
        cost = {"train_pflop": 0.00013, "seconds": 1.0}
        arms.append(Arm(router, [], Job(router, ["seed=0"], folders[0], None, cost, folders=folders)))
    contest = Contest(tuple(routers[1:]), routers[0], settings.quality, settings.margin, 0)
    return Rounds(cast(Sweep, launcher), contest, Arms(arms, 0, [], [""] * 8, tracking, project), settings)


def test_a_command_that_is_typed_again_knows_what_failed(tmp_path: Path) -> None:
    """Verdicts stay, and decided arms get no further try."""
    launcher = Launcher(tmp_path, lambda router, seed: (router, seed) == ("soft", 1))
    before = rounds(launcher, max_seeds=20).go()
    assert before.standing.decided and not before.open
    again = Launcher(tmp_path, lambda router, seed: True, notes=launcher.notes)
    after = rounds(again, max_seeds=20).go()
    assert (after.standing, again.ran) == (before.standing, [])
    assert "1 of " in as_text(after) and "out of memory" in told_rows(after)["failed"][0]


def test_what_failed_is_tried_once_more_for_open_arms_only_within_the_budget(tmp_path: Path) -> None:
    routers = ("dense", "soft", "tokens_choice")
    launcher = Launcher(tmp_path, lambda router, seed: router != "dense" and seed == 1)
    before = rounds(launcher, routers, max_seeds=12).go()
    assert before.open == ["tokens_choice"]
    poor = Launcher(tmp_path, launcher.fails, notes=dict(launcher.notes))
    kept = rounds(poor, routers, max_seeds=12, pflop=before.spent.pflop).go()
    assert (kept.standing, poor.ran, bool(kept.over)) == (before.standing, [], True)
    assert f"the next look would pass {kept.over}" in as_text(kept)
    rich = Launcher(tmp_path, lambda router, seed: False, notes=dict(launcher.notes))
    mended = rounds(rich, routers, max_seeds=12).go()
    assert rich.ran == [("tokens_choice", 1)] and mended.standing.decided == before.standing.decided
    assert mended.standing.found["tokens_choice"].interval.n == 12


def test_what_fails_under_a_command_is_tried_again_by_the_next_one_only(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, lambda router, seed: router != "dense" and seed in (0, 3))
    same = ("dense", "tokens_choice")
    assert rounds(launcher, same, max_seeds=7).go().open
    assert len(launcher.ran) == len(set(launcher.ran)) == 14
    again = Launcher(tmp_path, lambda router, seed: True, notes=dict(launcher.notes))
    rounds(again, same, max_seeds=7).go()
    assert again.ran == [("tokens_choice", 0), ("tokens_choice", 3)]


def test_tries_that_the_budget_does_not_allow_keep_no_look_from_being_made(tmp_path: Path) -> None:
    """Five runs that failed cost more than the budget has left, and the next look does not."""
    same = ("dense", "tokens_choice")
    launcher = Launcher(tmp_path, lambda router, seed: router != "dense" and 0 < seed < 6)
    before = rounds(launcher, same, max_seeds=8).go()
    assert before.open
    one = sum(result(router, 0)["train_pflop"] for router in same)
    again = Launcher(tmp_path, lambda router, seed: False, notes=dict(launcher.notes))
    after = rounds(again, same, max_seeds=20, pflop=before.spent.pflop + 1.5 * one).go()
    assert again.ran == [("dense", 8), ("tokens_choice", 8)]
    assert after.standing.n == 9 and after.over and after.next_round.pflop == pytest.approx(one, rel=0.01)


def test_runs_ahead_use_up_no_budget(tmp_path: Path) -> None:
    """A round with runs ahead that passes the budget is made without them."""
    launcher = Launcher(tmp_path, lambda router, seed: False)
    one = sum(result(router, 0)["train_pflop"] for router in ROUTERS)
    same = ("dense", "tokens_choice")
    ended = rounds(launcher, same, max_seeds=30, pflop=9.5 * one).go()
    assert ended.standing.n == 9 and ended.over == f"pflop={9.5 * one:g}"


def test_each_look_is_sent_once_where_runs_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the question of the study's own settle.json; what W&B or the disk refuses ends no settling."""
    sent: list[Any] = []

    def send(folders: list[Path], question: Question, out: Path, mode: str, say: Any, **told: Any) -> None:
        sent.append((folders, question, out, mode, told))
        raise RunError("the disk is full")

    monkeypatch.setattr("softmoe_cli.settle.sweeper.send_look", send)
    launcher = Launcher(tmp_path, lambda router, seed: False)
    same = ("dense", "tokens_choice")
    rounds(launcher, same, tracking="auto", max_seeds=5).go()
    assert sent == [], "auto without a key"
    account = rounds(launcher, same, tracking="offline", project="mine", max_seeds=8).go()
    assert [told["look"] for *_, told in sent] == sorted({told["look"] for *_, told in sent})
    told = {"project": "mine", "look": account.standing.n}
    assert sent[-1][1:] == (Question(), tmp_path / "compare", "offline", told)
    assert "W&B has not got this look: the disk is full" in launcher.said


def test_what_is_sent_is_what_the_look_has_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds that ran ahead of the look that decided are not among it; a run that failed is, for its cost."""
    sent: list[list[Path]] = []
    monkeypatch.setattr("softmoe_cli.settle.sweeper.send_look", lambda folders, *_, **__: sent.append(folders))
    for router, seed in itertools.product(ROUTERS, range(12)):
        write(tmp_path, result(router, seed))
    (tmp_path / result("soft", 1)["name"] / "result.json").unlink()
    account = rounds(Launcher(tmp_path, lambda router, seed: True), tracking="offline", max_seeds=12).go()
    n = account.standing.n
    assert n < 12 and not account.open
    assert {folder.name for folder in sent[-1]} == {
        result(router, seed)["name"] for router, seed in itertools.product(ROUTERS, range(n))
    }


def test_damaged_looks_are_told(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, lambda router, seed: False)
    (tmp_path / "looks.jsonl").write_text("{\n")
    rounds(launcher, max_seeds=6).go()
    assert sum("any seed may have come after a look" in said for said in launcher.said) == 1


@pytest.mark.parametrize("late", range(1, 5))
def test_a_late_seed_leaves_every_look_a_beginning_of_one_order(tmp_path: Path, late: int) -> None:
    """A run that was killed ends behind those that were looked at; n pairs are the first n of one order, so that
    p never grows from look to look."""
    values = {arm: {s: result(arm, s)["top1_pct"] for s in range(10)} for arm in ROUTERS}
    runs = {arm: {s: finished(arm, s, top1_pct=v) for s, v in of.items()} for arm, of in values.items()}
    shown = frozenset(f"{arm}-{s}" for arm in ROUTERS for s in range(7) if s != late)
    looks = PastLooks([PastLook(0, "top1_pct", None, shown)], [])
    order = [s for s in range(7) if s != late] + sorted({late, 7, 8, 9})
    differences = [values["soft"][s] - values["dense"][s] for s in order]
    expected = p_zero(differences)
    for most in range(5, 11):
        standing = stand(contest("soft"), runs, looks, most)
        n = standing.decided.get("soft", most)
        assert standing.found["soft"].p == pytest.approx(float(expected[n - 2])), "the first n of one order"


def test_pairs_on_two_kinds_of_hardware_are_left_out(tmp_path: Path) -> None:
    """Minutes buy other training there; the study goes on without that pair, and says what its figures rest on."""
    launcher = Launcher(tmp_path, lambda router, seed: False)
    launcher.changes = lambda router, seed: (
        {"train.minutes": 1.0} | ({"hardware": "another"} if (router, seed) == ("soft", 2) else {})
    )
    account = rounds(launcher, max_seeds=9).go()
    assert account.standing.found["soft"].interval.n == account.standing.decided["soft"] - 1
    told = "soft with seed 2 is left out: it had other hardware than dense"
    assert account.notes == [told] and sum("train.minutes buys" in said for said in launcher.said) == 1
    assert "359 test images of one cut; " in as_text(account)
    assert account.spent.pflop == pytest.approx(sum(result(*each)["train_pflop"] for each in launcher.ran))


def test_each_seed_may_have_its_own_cut(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, lambda router, seed: False, changes=lambda router, seed: {"data.split_seed": seed})
    assert "359 test images in each of 5 cuts" in as_text(rounds(launcher, max_seeds=5).go())


def test_equal_arms_show_the_p_of_equality(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, lambda router, seed: False)
    account = rounds(launcher, ("dense", "tokens_choice"), max_seeds=30, margin=3.0).go()
    told = account.standing.told["tokens_choice"]
    assert told.word == "equal within the margin" and told.p_equal is not None and told.p_equal < 0.05
    assert f"  {told.p_equal:.2g}  " in as_text(account)


@pytest.mark.parametrize(
    ("costs", "told"),
    [
        ({"dense": 0.002, "soft": 0.002}, "checkpoints had cost 2 TFLOP of training, not counted here"),
        ({"dense": 0.002, "soft": None}, "had cost 2 TFLOP (dense), what is not known (soft) of training"),
        ({"soft": 0.002}, "had cost 2 TFLOP of training"),
        ({}, ""),
    ],
)
def test_what_checkpoints_had_cost_is_told(tmp_path: Path, costs: dict[str, float | None], told: str) -> None:
    def changes(router: str, _seed: int) -> dict[str, Any]:
        return {"checkpoint": "x", "checkpoint.train_pflop": costs[router]} if router in costs else {}

    account = rounds(Launcher(tmp_path, lambda router, seed: False, changes=changes), max_seeds=5).go()
    assert told in as_text(account) and ("had cost" in as_text(account)) == bool(told)
    assert {arm["arm"]: arm["checkpoint_pflop"] for arm in told_rows(account)["arms"]} == {
        router: costs.get(router) for router in ROUTERS
    }
