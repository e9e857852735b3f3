"""Cost to equal quality, on planted curves whose ratio is known."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.cuts import compared_by
from softmoe_cli.compare.flat import comma_separated, json_text
from softmoe_cli.compare.intervals import Difference, difference
from softmoe_cli.compare.reach import Reached, first_reach, reached
from softmoe_cli.compare.tables import tables, terminal
from softmoe_cli.errors import UsageError
from tests.synthetic import LOOKS, asked, group, looks, rewrite, row, write

COSTS = np.geomspace(0.5, 40, 30)


def planted(speed: float, ceiling: float = 95.0, until: float = 40.0) -> list[tuple[float, float]]:
    """a - b (speed c)^(-k): a curve that reaches everything at 1/speed of the cost."""
    return [(float(c), ceiling - 30 * float(speed * c) ** -0.5) for c in COSTS if c <= until]


def asked_of(ours: list[Any], theirs: list[Any], target: float | None = None) -> Reached | None:
    return reached(drawn(ours), drawn(theirs), target, "images", by_seed, higher_is_better=True)


def drawn(curves: list[Any], first: int = 0) -> list[tuple[tuple[int, int], Any]]:
    """Curves of one cut."""
    return [((0, first + seed), curve) for seed, curve in enumerate(curves)]


def by_seed(ours: list[tuple[tuple[int, int], float]], theirs: list[tuple[tuple[int, int], float]]) -> Difference:
    _, mine, its = compared_by(ours, theirs)
    return difference(mine, its)


def test_the_first_time_is_found_word_for_word() -> None:
    """Against a walk along the best so far in small steps."""
    random = np.random.default_rng(0)
    for _ in range(20):
        costs, values = np.cumsum(random.uniform(0.5, 2, 9)), random.uniform(0, 10, 9)
        curve = list(zip(costs.tolist(), values.tolist(), strict=True))
        best = np.maximum.accumulate(values)
        fine = np.linspace(costs[0], costs[-1], 20_001)
        walked = np.interp(fine, costs, best)
        for target in random.uniform(values[0], 11, 3):
            found = first_reach(curve, target, higher_is_better=True)
            there = np.flatnonzero(walked >= target)
            assert (found is None) == (len(there) == 0)
            assert found is None or found == pytest.approx(fine[there[0]], abs=2 * (fine[1] - fine[0]))
            turned = [(cost, -value) for cost, value in curve]
            assert first_reach(turned, -target, higher_is_better=False) == found
    assert first_reach([(1.0, 5.0), (2.0, 3.0), (3.0, 7.0)], 6.0, higher_is_better=True) == 2.5, "from the best so far"
    assert (
        first_reach([(1.0, 5.0)], 5.0, higher_is_better=True) == 1.0
        and first_reach([], 1, higher_is_better=True) is None
    )


def test_the_ratio_is_the_planted_one() -> None:
    """Paired by seed, and of unpaired seeds; units of cost do not matter; turned round it is the inverse."""
    speeds = (1.8, 2.0, 2.2)
    ours, theirs = [planted(s, 95 + i) for i, s in enumerate(speeds)], [planted(1.0, 95 + i) for i in range(3)]
    found = asked_of(ours, theirs)
    assert found is not None and found.ratio is not None and found.ratio.low and found.ratio.high
    assert found.ratio.mean == pytest.approx(math.exp(np.mean(np.log(speeds))), rel=0.01)
    low, high = stats.t.interval(0.95, 2, np.mean(np.log(speeds)), stats.sem(np.log(speeds)))
    assert [found.ratio.low, found.ratio.high] == pytest.approx([math.exp(low), math.exp(high)], rel=0.03)
    assert (found.reached, found.n, found.below, found.above) == (3, 3, None, None)
    dear = [[[(7 * c, v) for c, v in curve] for curve in side] for side in (ours, theirs)]
    scaled = asked_of(dear[0], dear[1])
    assert scaled is not None and scaled.ratio is not None and scaled.ratio.mean == pytest.approx(found.ratio.mean)
    value = asked_of(ours, theirs, target=80.0)
    back = asked_of(theirs, ours, target=80.0)
    assert value is not None and back is not None and value.ratio is not None and back.ratio is not None
    assert value.ratio.mean == pytest.approx(1 / back.ratio.mean)
    apart = reached(drawn(ours, 10), drawn(theirs), 80.0, "images", by_seed, higher_is_better=True)
    assert apart is not None and apart.ratio is not None and apart.ratio.mean == pytest.approx(value.ratio.mean)


def test_a_seed_that_never_gets_there_gives_a_bound_alone() -> None:
    slow = [planted(2.0), planted(2.0), planted(0.5)]
    found = asked_of(slow, [planted(1.0)] * 3)
    assert found is not None and (found.reached, found.n, found.ratio, found.cost) == (2, 3, None, None)
    assert found.below is not None, "the third seed's own ratio is below 1, 40 over 40"
    assert found.below == pytest.approx((2 * 2 * 1) ** (1 / 3), rel=0.01)
    turned = asked_of([planted(1.0)] * 3, slow, target=planted(1.0)[-1][1])
    assert turned is not None and turned.above == pytest.approx(1 / found.below, rel=0.01)
    neither = asked_of(slow, slow, target=94.9)
    assert neither is not None and (neither.ratio, neither.below, neither.above) == (None, None, None)
    assert asked_of([planted(1.0)] * 3, [planted(1.0)] * 3, target=40.0) is None, "there at the first look"
    assert asked_of([[]], [planted(1.0)]) is None
    assert asked_of([[(0.0, 50.0)]] * 3, [planted(1.0)] * 3) is None, "looked at before training alone"


@pytest.mark.parametrize("studies", [150, pytest.param(2000, marks=pytest.mark.thorough)])
def test_the_interval_holds_the_planted_ratio(studies: int) -> None:
    """Five seeds, whose ceilings are paired and whose speeds differ: 95% of the intervals hold the ratio."""
    random, held = np.random.default_rng(7), 0
    for _ in range(studies):
        ceilings, speeds = random.normal(95, 1, 5), 1.5 * np.exp(random.normal(0, 0.08, 5))
        found = asked_of(
            [planted(s, a) for s, a in zip(speeds, ceilings, strict=True)], [planted(1, a) for a in ceilings]
        )
        assert found is not None and found.ratio is not None
        assert found.ratio.low is not None and found.ratio.high is not None
        held += found.ratio.low <= 1.5 <= found.ratio.high
    assert held / studies == pytest.approx(0.95, abs=max(0.01, 4 * math.sqrt(0.05 * 0.95 / studies)))


def curved(folder: Path, router: str, seed: int, speed: float) -> None:
    """A run whose validation curve is planted, in the unit of its images."""
    result = row(router=router, seed=seed, top1_pct=90 + seed)
    run = write(folder, result)
    kept = looks(result)
    for place, look in enumerate(each for each in kept if each["split"] == "validation"):
        look["top1_pct"] = 95 + seed - 60 * (speed * (place + 1)) ** -0.5
    rewrite(run, "".join(json.dumps(each) + "\n" for each in kept), result)


def test_in_a_comparison(tmp_path: Path) -> None:
    for seed in range(4):
        curved(tmp_path, "dense", seed, 1.0)
        curved(tmp_path, "soft", seed, 1.5 + seed / 20)
        curved(tmp_path, "tokens_choice", seed, 0.9 if seed else 1.2)
    comparison = asked(tmp_path, cost="images", to_quality="baseline")
    soft, slow = group(comparison, "soft").reached, group(comparison, "tokens_choice").reached
    assert soft is not None and soft.ratio is not None and slow is not None
    assert soft.ratio.mean == pytest.approx(1.57, rel=0.03) and soft.axis == "images"
    assert (slow.reached, slow.n) == (1, 4) and slow.below is not None and slow.below < 1.2
    (table,) = [each for each in tables(comparison) if "to reach" in each.title]
    assert table.title == "digits, 359 test images: training images to reach the baseline's validation top-1, %"
    rows = {line[0]: line[1:] for line in table.rows}
    assert rows["soft"][:2] == ["4 of 4", "4 of 4"] and rows["soft"][3].startswith(f"{soft.ratio.mean:.3g} (")
    assert rows["tokens_choice"] == ["1 of 4", "4 of 4", "", f"below {slow.below:.3g}"]
    assert "times cheaper than dense" in terminal(comparison)
    told = next(each for each in csv.DictReader(comma_separated(comparison).splitlines()) if each["group"] == "soft")
    assert float(told["times_cheaper"]) == soft.ratio.mean and float(told["reached_at_images"]) == soft.cost
    assert json.loads(json_text(comparison))["to_quality"] == "baseline"
    value = group(asked(tmp_path, cost="images", to_quality="70"), "soft").reached
    assert value is not None and value.ratio is not None and value.ratio.mean == pytest.approx(1.57, rel=0.05)
    early = asked(tmp_path, cost="images", to_quality="1")
    assert group(early, "soft").reached is None
    assert any("was there at its first look" in note for note in early.blocks[0].notes)
    assert group(asked(tmp_path), "soft").reached is None and LOOKS == 8
    with pytest.raises(UsageError, match="--to-quality best: write baseline, or a number"):
        asked(tmp_path, to_quality="best")
