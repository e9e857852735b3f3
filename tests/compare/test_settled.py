"""Compare says of a settled study what settle says: the same rule, measure, margin, baseline and family."""

import json
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.checklist import checklist
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.intervals import verdicts
from softmoe_cli.compare.settled import RECORD
from softmoe_cli.run.rows import FORMAT
from tests.synthetic import asked, group, study


def settled(folder: Path, **changes: Any) -> Path:
    """Three arms, of which tokens_choice is the baseline, of a family of four comparisons."""
    study(folder, seeds=5)
    arms: list[dict[str, Any]] = [{"label": label, "words": []} for label in ("dense", "soft", "near", "c", "d")]
    question = {"arms": arms, "baseline": "near", "quality": "top1_pct", "margin": 5.0, "first_seed": 0}
    (folder / RECORD).write_text(json.dumps({"format": FORMAT, **question, "fairness": {}} | changes))
    sweep = folder / "sweep-settle"
    sweep.mkdir()
    runs = [run.name for run in folder.glob("*tokens_choice*")]
    jobs = [{"run": f"near seed={place}", "folder": f"../{name}", "overrides": []} for place, name in enumerate(runs)]
    (sweep / "jobs.json").write_text(json.dumps({"command": "train", "typed": [], "jobs": jobs}))
    return folder


@pytest.mark.parametrize(("routers", "judged"), [((), 2), (("router=dense,tokens_choice",), 1)])
def test_the_checklist_says_what_was_corrected(tmp_path: Path, routers: tuple[str, ...], judged: int) -> None:
    """Also where one comparison of a larger family is left: Holm counts those that were fixed before the first run."""
    comparison = asked(settled(tmp_path), where=routers)
    (block,) = comparison.blocks
    assert sum(each.difference is not None for each in block.groups) == judged
    told = checklist(comparison, block)
    budgets = max(4, 3 * judged)
    assert (
        "correction: Holm over 4 comparisons in test top-1, over 4 comparisons in test NLL, "
        f"over {budgets} comparisons in quality at budgets, each apart; " in told
    ), told
    assert "e-values that hold at every look" in told and "equality within 5: the same e-values" in told
    assert "none is needed" not in told
    assert any("(Holm over 4)" in note for note in block.notes)
    assert block.outlook is not None and block.outlook.comparisons == 4


def test_one_comparison_needs_no_correction(tmp_path: Path) -> None:
    labels: list[dict[str, Any]] = [{"label": label, "words": []} for label in ("near", "dense")]
    comparison = asked(settled(tmp_path, arms=labels), where=("router=dense,tokens_choice",))
    told = checklist(comparison, comparison.blocks[0])
    assert "none is needed in test top-1 and test NLL, one comparison each; " in told, told
    assert not any("Holm over" in note for note in comparison.blocks[0].notes)


def p_of(comparison: Comparison, label: str) -> float | None:
    return group(comparison, label).p_holm


def test_a_settled_study_keeps_its_question(tmp_path: Path) -> None:
    comparison = asked(settled(tmp_path))
    assert group(comparison, "tokens_choice").baseline is None and comparison.margin == 5.0
    judged = {each.label: each.difference for each in comparison.groups if each.difference}
    assert {found.method for found in judged.values()} == {"any-time"} and set(judged) == {"dense", "soft"}
    expected = verdicts(judged, higher_is_better=True, family=4)
    assert {label: p_of(comparison, label) for label in judged} == {label: told.p for label, told in expected.items()}
    assert p_of(comparison, "soft") != verdicts(judged, higher_is_better=True)["soft"].p
    (note,) = [note for note in comparison.notes if RECORD in note]
    assert "judges top1_pct, a margin of 5, against near, with Holm over 4 or more" in note
    assert any("settle decided when to stop" in note for note in comparison.blocks[0].notes)


def test_what_is_typed_goes_before(tmp_path: Path) -> None:
    settled(tmp_path, quality="nll", margin=0.3)
    assert (asked(tmp_path).quality, asked(tmp_path).margin) == ("nll", 0.3)
    typed = asked(tmp_path, quality="top1_pct", baseline="dense", typed=("quality",))
    assert (typed.quality, typed.margin) == ("top1_pct", None), "a margin in the unit of another measure is none"
    soft = group(typed, "soft")
    assert soft.baseline == "dense" and soft.difference is not None and soft.difference.method == "any-time"


@pytest.mark.parametrize("damage", ["{", json.dumps({"format": FORMAT})])
def test_a_damaged_record_asks_for_the_rule_all_the_same(tmp_path: Path, damage: str) -> None:
    (settled(tmp_path) / RECORD).write_text(damage)
    comparison = asked(tmp_path)
    assert "the any-time rule judges" in " ".join(comparison.notes)
    assert {each.difference.method for each in comparison.groups if each.difference} == {"any-time"}
