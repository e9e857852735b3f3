"""What is said of two groups beside their difference."""

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from tests.synthetic import asked, group, row, study, write


def test_groups_means_differences_and_verdicts(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path))
    assert [each.label for each in comparison.groups] == ["soft", "tokens_choice", "dense"], "best first"
    soft, near, dense = comparison.groups
    assert (soft.verdict, near.verdict, dense.verdict) == ("better", "not distinguishable", None)
    assert soft.baseline == near.baseline == "dense"
    x, y = [93, 94.1, 94.925], [90, 91, 92]
    assert soft.difference is not None
    told = stats.ttest_rel(x, y)
    assert soft.difference.p == pytest.approx(told.pvalue)
    assert soft.difference.interval.low == pytest.approx(told.confidence_interval(0.95).low)
    assert soft.p_holm == pytest.approx(2 * told.pvalue)
    quality = soft.intervals["top1_pct"]
    assert quality is not None
    assert quality.n == 3
    assert quality.mean == pytest.approx(sum(x) / 3)
    assert quality.low == pytest.approx(stats.t.interval(0.95, 2, sum(x) / 3, stats.sem(x))[0])
    assert [each.front for each in comparison.groups] == [True, False, True]


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path), quality="loss")
    assert comparison.groups[0].label == "soft"
    assert group(comparison, "soft").verdict == "better"
    assert group(comparison, "soft").front
    worse = asked(tmp_path, quality="loss", baseline="soft")
    assert group(worse, "dense").verdict == "worse"


def test_one_seed_says_so(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path, seeds=1))
    soft = group(comparison, "soft")
    assert (soft.verdict, soft.front_probability) == ("too few seeds", None)
    assert any("one seed only" in note for note in comparison.blocks[0].notes)


def test_a_verdict_says_what_else_was_unequal(tmp_path: Path) -> None:
    """Cost, length of training and pretraining, each in a word; none where they are equal."""
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(tmp_path, row(seed=seed, top1_pct=93 + 1.1 * seed))
    (soft,) = [each for each in asked(tmp_path).groups if each.label == "soft"]
    assert soft.cost_ratio == pytest.approx(1.16)
    assert soft.conditions == ["at 16% more training FLOPs"]
    assert group(asked(tmp_path, cost="images"), "soft").conditions == []
    assert group(asked(tmp_path, cost="params_m"), "soft").conditions == ["at 6 times the parameters"]
    longer = {"train__steps": 270, "steps": 270, "images": 8640, "train_pflop": 0.000128 * 1.35}
    for seed in range(3):
        write(tmp_path / "long", row(router="dense", seed=seed, **longer))
    told = group(asked(tmp_path, baseline="steps=270"), "soft, 200 updates").conditions
    assert told == ["at 14% fewer training FLOPs", "200 updates against 270"]
    halves = {"train__batch_size": 16, "batch_size": 16, "steps": 400, "train__steps": 400}
    for seed in range(3):
        write(tmp_path / "halves", row(router="dense", seed=seed, **halves))
    told = group(asked(tmp_path / "halves", tmp_path, where=("train_pflop=0.000128,0.00014848",), baseline="steps=400"),
                 "soft, 200 updates, 32 images/update").conditions  # fmt: skip
    assert told == ["at 16% more training FLOPs"], "updates of other sizes on as many images are no other length"


def test_what_a_checkpoint_had_cost(tmp_path: Path) -> None:
    """Counted beside a verdict where it is known; said where it is not."""
    known: dict[str, Any] = {"command": "finetune", "checkpoint__origin": "1f", "checkpoint": "a/b.safetensors"}
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(
            tmp_path, row(seed=seed, top1_pct=93 + 1.1 * seed, **known, checkpoint__train_pflop=0.000128 * (1 + seed))
        )
    soft = next(each for each in asked(tmp_path).groups if each.pretrained)
    assert soft.checkpoint_pflop == pytest.approx(0.000128 * 2), "costs of checkpoints make no groups"
    assert soft.cost_ratio == pytest.approx(1.16 + 2)
    assert soft.conditions == ["at 3.16 times the training FLOPs", "pretraining counted"]
    (note,) = [note for note in asked(tmp_path).blocks[0].notes if "began with a checkpoint" in note]
    assert "had cost 256 GFLOP" in note
    seconds = next(each for each in asked(tmp_path, cost="device_s").groups if each.pretrained)
    assert seconds.conditions == ["at 16% more training time", "pretraining not counted"]
    assert next(e for e in asked(tmp_path, cost="params_m").groups if e.pretrained).conditions == [
        "at 6 times the parameters"
    ]
    write(tmp_path, row(seed=7, top1_pct=93, **known))
    soft = next(each for each in asked(tmp_path).groups if each.pretrained)
    assert (soft.checkpoint_pflop, soft.conditions[-1]) == (None, "pretraining not counted"), "one does not say"
    assert any("cost is not known" in note for note in asked(tmp_path).blocks[0].notes)


def test_of_two_checkpoints_both_costs_are_counted_or_none(tmp_path: Path) -> None:
    begun: dict[str, Any] = {"command": "finetune", "checkpoint__origin": "1f", "checkpoint": "a/b.safetensors"}
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, **begun))
        write(tmp_path, row(seed=seed, **begun, checkpoint__train_pflop=1.0))
    soft = group(asked(tmp_path), "soft")
    assert soft.cost_ratio == pytest.approx(1.16)
    assert soft.conditions == ["at 16% more training FLOPs", "pretraining not counted"]


def test_at_chance_is_said(tmp_path: Path) -> None:
    """By the number of classes, or by the commonest class where the rows know it; of accuracies only."""
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=42 + 5 * seed, data__num_classes=3))
        write(tmp_path, row(seed=seed, top1_pct=100 / 3, data__num_classes=3))
    dense, soft = group(asked(tmp_path), "dense"), group(asked(tmp_path), "soft")
    assert soft.chance_pct == pytest.approx(100 / 3)
    assert soft.at_chance and not dense.at_chance
    assert group(asked(tmp_path, quality="validation_top1_pct"), "soft").at_chance is False, "a point above"
    assert group(asked(tmp_path, quality="top5_pct"), "soft").chance_pct == 100
    assert group(asked(tmp_path, quality="loss"), "soft").chance_pct is None
    for seed in range(3):
        write(tmp_path / "skewed", row(router="dense", seed=seed, top1_pct=79.7 + seed / 2, chance_pct=80.0, classes=3))
    (skewed,) = asked(tmp_path / "skewed").groups
    assert (skewed.chance_pct, skewed.at_chance) == (80.0, True)
