"""What checkpoints had cost, counted into the cost of the runs that began with them."""

from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.groups import Comparison, Group
from softmoe_cli.errors import UsageError
from tests.synthetic import asked, row, write

BEFORE = 0.000128
TUNED: dict[str, Any] = {"command": "finetune", "checkpoint__origin": "1f", "checkpoint": "a/b.safetensors"}


def group(comparison: Comparison, router: str) -> Group:
    (found,) = [each for each in comparison.groups if each.runs[0].row["router"] == router]
    return found


def tuned(folder: Path, **changes: Any) -> Path:
    """Three runs of dense from scratch, and three of soft, each from a checkpoint that had cost a little more."""
    for seed in range(3):
        write(folder, row(router="dense", seed=seed, top1_pct=90 + seed))
        before = {"checkpoint__train_pflop": BEFORE * (1 + seed)}
        write(folder, row(seed=seed, top1_pct=93 + 1.1 * seed, train_pflop=BEFORE, **(TUNED | before | changes)))
    return folder


def test_axis_front_curves_and_budgets_hold_it(tmp_path: Path) -> None:
    """Every cost of a run is its own and its checkpoint's: 1 + 1, 1 + 2 and 1 + 3 times BEFORE."""
    beside = group(asked(tuned(tmp_path)), "soft")
    assert beside.intervals["train_pflop"] is not None
    assert beside.intervals["train_pflop"].mean == pytest.approx(BEFORE)
    comparison = asked(tmp_path, with_source=True, at=(f"train_pflop={0.8 * BEFORE},{2.5 * BEFORE}",))
    soft, dense = group(comparison, "soft"), group(comparison, "dense")
    assert soft.intervals["train_pflop"] is not None
    assert soft.intervals["train_pflop"].mean == pytest.approx(3 * BEFORE)
    assert soft.cost_ratio == beside.cost_ratio == pytest.approx(3.0), "and not twice"
    assert soft.conditions[-1] == "pretraining counted"
    assert sorted(run.looks[-1]["train_pflop"] / BEFORE for run in soft.runs) == pytest.approx([2, 3, 4])
    assert [run.looks[-1]["images"] for run in soft.runs] == [6400] * 3, "of training alone"
    early, late = soft.budgets
    assert early.interval is None
    assert "first look at" in early.reason, "the checkpoint had cost more than the budget"
    assert late.reason.startswith("1 of 3 end before")
    assert dense.budgets[0].interval is not None
    assert [run.row["train_pflop"] for run in dense.runs] == pytest.approx([BEFORE] * 3)


def test_the_front_is_another_one(tmp_path: Path) -> None:
    """At its own cost the finetuned group beats a dearer one; with its checkpoint's it does not."""
    tuned(tmp_path)
    for seed in range(3):
        write(tmp_path, row(router="tokens_choice", seed=seed, top1_pct=91.5 + seed, train_pflop=1.5 * BEFORE))
    assert not group(asked(tmp_path), "tokens_choice").front
    assert group(asked(tmp_path, with_source=True), "tokens_choice").front


def test_a_checkpoint_that_does_not_say_it_is_named(tmp_path: Path) -> None:
    tuned(tmp_path)
    run = write(tmp_path, row(seed=9, train_pflop=BEFORE, **TUNED))
    comparison = asked(tmp_path, with_source=True)
    reason = "what its checkpoint had cost is not known, and --with-source counts it"
    assert (str(run), reason) in comparison.left_out
    assert len(group(comparison, "soft").runs) == 3


@pytest.mark.parametrize("question", [{"cost": "device_s"}, {"at": ("images",)}, {"cost": "landed_pflop"}])
def test_costs_that_checkpoints_do_not_tell_are_refused(tmp_path: Path, question: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--with-source counts training FLOPs, and checkpoints say nothing of"):
        asked(tuned(tmp_path), with_source=True, **question)


def test_without_a_checkpoint_it_has_no_effect_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, row())
    with pytest.raises(UsageError, match="no effect: none of the runs began with a checkpoint"):
        asked(tmp_path, with_source=True)
