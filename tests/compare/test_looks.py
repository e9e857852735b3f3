"""Looks are recorded, and seeds that come after one are judged by the any-time rule."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.anytime import p_zero
from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.command import compare_folders
from softmoe_cli.compare.flat import flat_rows
from softmoe_cli.compare.groups import Comparison, Group
from softmoe_cli.compare.intervals import anytime_difference
from softmoe_cli.compare.looks import LOOKS, read_looks, record_look
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.tables import terminal
from tests.synthetic import asked, group, row, study, write

WOBBLE = (0.1, 0.4, -0.3, 0.2, -0.1, 0.3, -0.2, 0.1, 0.05, -0.4)


def seeds(folder: Path, *which: int, soft: float = 1.0) -> Path:
    for seed in which:
        write(folder, row(router="dense", seed=seed, top1_pct=90 + seed / 5))
        write(folder, row(seed=seed, top1_pct=90 + seed / 5 + soft + WOBBLE[seed]))
    return folder


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds, and show no look."""
    monkeypatch.setattr("softmoe_cli.compare.figures.figure_files", lambda _, name: {f"{name}.svg": b"drawn"})


def looked(folder: Path, **question: float | str) -> Comparison:
    """Compares and records the look, as the command does."""
    comparison = asked(folder, **question)
    runs = [run for each in comparison.groups for run in each.runs]
    assert record_look(runs, comparison.quality, comparison.margin) == []
    return comparison


def seeded(of: Group) -> list[tuple[int, float]]:
    return [(seed, value) for (_, seed), value in of.values("top1_pct")]


def test_seeds_after_a_look_are_judged_by_the_any_time_rule(tmp_path: Path) -> None:
    """Looking again at the same runs is no reason; the verdict of the pairs is that of the rule, in their order."""
    assert group(looked(seeds(tmp_path, 0, 1, 2)), "soft").difference.method == "paired"  # type: ignore[union-attr]
    assert group(looked(tmp_path), "soft").difference.method == "paired"  # type: ignore[union-attr]
    assert len((tmp_path / LOOKS).read_text().splitlines()) == 1, "the same look"
    comparison = looked(seeds(tmp_path, 3, 4, 5, 6))
    soft = group(comparison, "soft")
    ours, theirs = seeded(soft), seeded(group(comparison, "dense"))
    assert soft.difference == anytime_difference(ours, theirs, range(7))
    assert soft.conditions[0] == "any-time" and soft.verdict == "better"
    assert any(
        "the any-time rule judges, because seeds were added after a look" in n for n in comparison.blocks[0].notes
    )
    told = terminal(comparison)
    assert "any-time 95%" in told and "by the any-time rule" in told and "e-values that hold at every look" in told
    assert flat_rows(comparison)[0]["method"] == "any-time"


def test_a_look_at_one_seed_does_not_count_and_one_at_two_does(tmp_path: Path) -> None:
    for first, method in ((1, "paired"), (2, "any-time")):
        folder = tmp_path / str(first)
        looked(seeds(folder, *range(first)))
        found = group(asked(seeds(folder, *range(first, 6))), "soft").difference
        assert found is not None and found.method == method


def test_seeds_keep_the_order_in_which_they_were_seen(tmp_path: Path) -> None:
    """Seeds of small numbers that come later come last, so that what an early look has said stays the beginning."""
    looked(seeds(tmp_path, 3, 7, 5))
    comparison = looked(seeds(tmp_path, 0, 4))
    ours, theirs = (seeded(group(comparison, label)) for label in ("soft", "dense"))
    assert group(comparison, "soft").difference == anytime_difference(ours, theirs, [3, 5, 7, 0, 4])
    comparison = looked(seeds(tmp_path, 1))
    ours, theirs = (seeded(group(comparison, label)) for label in ("soft", "dense"))
    assert group(comparison, "soft").difference == anytime_difference(ours, theirs, [3, 5, 7, 0, 4, 1])


def test_a_study_that_is_moved_keeps_its_verdicts(tmp_path: Path) -> None:
    looked(seeds(tmp_path / "a", 0, 1, 2))
    seeds(tmp_path / "a", 3, 4, 5)
    before = asked(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert [each.difference for each in asked(tmp_path / "b").groups] == [each.difference for each in before.groups]


def test_groups_that_no_seed_was_added_to_keep_their_rule(tmp_path: Path) -> None:
    looked(study(tmp_path))
    for seed in (3, 4):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(tmp_path, row(seed=seed, top1_pct=93 + seed))
    comparison = asked(tmp_path)
    rules = {each.label: each.difference.method for each in comparison.groups if each.difference}
    assert rules == {"soft": "any-time", "tokens_choice": "paired"}
    assert any("the any-time rule judges soft, because" in note for note in comparison.blocks[0].notes)


def test_the_rule_can_be_asked_for_and_leaves_out_what_is_not_paired(tmp_path: Path) -> None:
    write(seeds(tmp_path, *range(5)), row(seed=9, top1_pct=99))
    comparison = asked(tmp_path, any_time=True)
    soft = group(comparison, "soft").difference
    assert soft is not None and (soft.method, soft.interval.n, soft.unpaired_seeds) == ("any-time", 5, (9,))
    assert any("seeds 9 have no partner" in note for note in comparison.blocks[0].notes)
    assert any("because it was asked for" in note for note in comparison.blocks[0].notes)
    for seed in range(20, 24):
        write(tmp_path / "apart", row(router="dense", seed=seed))
        write(tmp_path / "apart", row(seed=seed - 10))
    apart = group(asked(tmp_path / "apart", any_time=True), "soft")
    assert apart.verdict == "too few seeds" and apart.difference is not None and apart.difference.interval.n == 0


def test_unpaired_seeds_that_were_added_give_no_verdict(tmp_path: Path) -> None:
    for seed in range(4):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed / 9))
        write(tmp_path, row(seed=10 + seed, top1_pct=95 + seed / 9))
    assert group(looked(tmp_path), "soft").verdict == "better"
    write(tmp_path, row(seed=14, top1_pct=95.3))
    assert group(asked(tmp_path), "soft").verdict == "too few seeds"


@pytest.mark.parametrize(
    "text", ["{", '{"format": 1}\n', '{"format": 1, "time": 1, "quality": "x", "margin": null, "runs": 3}']
)
def test_a_damaged_record_is_named_and_any_seed_may_be_late(tmp_path: Path, text: str) -> None:
    (seeds(tmp_path, *range(5)) / LOOKS).write_text(text)
    comparison = asked(tmp_path)
    assert group(comparison, "soft").conditions[0] == "any-time"
    assert any(LOOKS in note and "any seed may have come after a look" in note for note in comparison.notes)
    runs = [run for each in comparison.groups for run in each.runs]
    assert record_look(runs, "top1_pct", None) == [] and (tmp_path / LOOKS).read_text() == text, "and left as it is"


def test_what_cannot_be_recorded_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (seeds(tmp_path / "runs", 0, 1, 2) / LOOKS).symlink_to(tmp_path / "elsewhere")
    assert compare_folders([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert "this look is not recorded in" in capsys.readouterr().out
    assert not (tmp_path / "elsewhere").exists()


def test_the_command_records_what_it_has_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every study that it showed; another measure or margin later is told."""
    seeds(tmp_path / "one", 0, 1, 2)
    seeds(tmp_path / "two", 3, 4, 5)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    assert compare_folders([*folders, "--margin", "2"]) == 0
    for name in ("one", "two"):
        (line,) = (tmp_path / name / LOOKS).read_text().splitlines()
        told = json.loads(line)
        assert (told["quality"], told["margin"], len(told["runs"])) == ("top1_pct", 2.0, 12)
    both = compare([tmp_path / "one", tmp_path / "two"], Question())
    assert len(read_looks([run for each in both.groups for run in each.runs]).seen) == 1, "the same one in each study"
    capsys.readouterr()
    assert compare_folders([*folders, "--quality", "nll"]) == 0
    assert "had top1_pct as its main measure, and this one has nll" in capsys.readouterr().out
    assert compare_folders([*folders, "--margin", "3"]) == 0
    assert "had a margin of 2, and this one has 3" in capsys.readouterr().out


def test_a_first_look_has_a_chance_of_its_own() -> None:
    """Without a difference: Student's test at three seeds, and then the any-time rule to 30, as README says."""
    values = np.random.default_rng(1).normal(0, 1, (40_000, 30))
    later = (p_zero(values)[:, 2:] < 0.05).any(1)
    first = stats.ttest_1samp(values[:, :3], 0, axis=1).pvalue < 0.05
    assert [later.mean(), (first | later).mean()] == pytest.approx([0.021, 0.066], abs=0.004)
