"""Several cuts of the data: what is independent, how much cuts and seeds vary, and verdicts that count cuts."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from softmoe_cli.compare.cuts import compared_by, independent, spread, standing_together
from softmoe_cli.compare.flat import flat_rows
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.intervals import difference, mean_interval
from softmoe_cli.compare.looks import record_look
from softmoe_cli.compare.tables import terminal
from tests.synthetic import asked, group, row, write

Table = dict[int, dict[int, float]]
"""cut -> seed -> value"""


def drawn(table: Table) -> list[tuple[tuple[int, int], float]]:
    return [((cut, seed), value) for cut, seeds in table.items() for seed, value in seeds.items()]


UNEQUAL: Table = {3: {0: 90.0, 1: 92.0, 2: 91.0}, 5: {0: 95.0, 1: 94.0}, 8: {0: 89.0}, 9: {0: 93.0, 4: 90.5}}


def slow_anova(table: Table) -> tuple[float, float]:
    """The two variances by loops: what a textbook prints for one-way random effects, cuts of unequal size."""
    every = [value for seeds in table.values() for value in seeds.values()]
    total, groups = len(every), len(table)
    grand = sum(every) / total
    within = between = sum_of_squares = 0.0
    for seeds in table.values():
        mean = sum(seeds.values()) / len(seeds)
        sum_of_squares += len(seeds) ** 2
        for value in seeds.values():
            within += (value - mean) * (value - mean)
            between += (mean - grand) * (mean - grand)
    within /= total - groups
    between /= groups - 1
    return (between - within) / ((total - sum_of_squares / total) / (groups - 1)), within


def test_the_two_variances_are_those_of_slow_loops() -> None:
    found = spread(drawn(UNEQUAL))
    assert found is not None and found.between is not None and found.within is not None
    v_cut, v_seed = slow_anova(UNEQUAL)
    assert found.between**2 == pytest.approx(v_cut, rel=1e-12)
    assert found.within**2 == pytest.approx(v_seed, rel=1e-12)
    assert (found.cuts, found.runs) == (4, 8)
    assert found.mean == mean_interval([91.0, 94.5, 89.0, 91.75])


def test_seeds_explain_all_or_nothing_of_it() -> None:
    """Equal cuts: no variance between them, and never one below 0; equal seeds: none within."""
    same = spread(drawn({cut: {seed: 90.0 + seed for seed in range(3)} for cut in range(4)}))
    assert same is not None and (same.between, same.within) == (0.0, 1.0)
    steady = spread(drawn({cut: dict.fromkeys(range(3), 90.0 + cut) for cut in range(4)}))
    assert steady is not None and steady.within == 0.0
    assert steady.between == pytest.approx(statistics.stdev([0, 1, 2, 3]))
    alone = spread(drawn({cut: {0: 90.0 + cut} for cut in range(4)}))
    assert alone is not None and (alone.between, alone.within) == (None, None), "one seed each: not to be told apart"
    assert spread(drawn({0: {0: 1.0, 1: 2.0}})) is None


def test_new_images_ask_for_more() -> None:
    """Nadeau and Bengio: of J cuts with n2 test and n1 training images the variance is s^2 (1/J + n2/n1)."""
    found = spread(drawn(UNEQUAL), 0.25)
    assert found is not None
    s = statistics.stdev([91.0, 94.5, 89.0, 91.75])
    assert found.new_images_half == pytest.approx(stats.t.ppf(0.975, 3) * s * math.sqrt(1 / 4 + 0.25))


def test_units_are_seeds_in_one_cut_and_cuts_in_several() -> None:
    one = drawn({7: {0: 1.0, 1: 2.0}})
    assert compared_by(one, one) == ("seed", [(0, 1.0), (1, 2.0)], [(0, 1.0), (1, 2.0)])
    more = drawn({7: {0: 5.0, 1: 6.0}, 8: {0: 9.0}})
    assert compared_by(more, one) == ("seed", [(0, 5.0), (1, 6.0)], [(0, 1.0), (1, 2.0)]), "of the cut that both have"
    other = drawn({7: {1: 1.0, 2: 4.0}, 8: {3: 2.0, 4: 4.0}})
    unit, ours, theirs = compared_by(more, other)
    assert unit == "cut"
    assert ours == [(7, 6.0), (8, 9.0)], "over the seed that both have in cut 7"
    assert theirs == [(7, 1.0), (8, 3.0)], "over all seeds of cut 8, where none is shared"
    assert independent(more) == [5.5, 9.0] and independent(one) == [1.0, 2.0]


def test_which_cuts_one_table_shows() -> None:
    arms = {"dense", "soft", "tokens"}
    assert standing_together({0: arms, 1: arms, 5: {"soft"}}) == [{0, 1}, {5}], "a stray run changes no mean"
    assert standing_together({0: arms, 1: {"dense", "soft"}, 2: {"dense", "tokens"}}) == [{0, 1, 2}]
    assert standing_together({0: {"soft"}, 1: {"soft"}}) == [{0, 1}], "one model's cuts are a study of their own"
    assert standing_together({0: {"soft"}, 1: {"dense"}}) == [{0}, {1}]
    assert standing_together({1: {"a", "b"}, 2: {"c", "d"}, 3: {"a", "b", "c", "d"}}) == [{1, 2, 3}]


def misses(cuts: int, seeds: int, v_cut: float, studies: int) -> tuple[float, float]:
    """How often the 95% interval of the difference misses the truth: of cuts' means, and of all runs as if they were
    independent. Paired differences with a part for each cut, drawn anew for each study."""
    random = np.random.default_rng(20261129)
    by_cut = by_run = 0
    for _ in range(studies):
        table = random.normal(0, math.sqrt(v_cut), (cuts, 1)) + random.normal(0, 1, (cuts, seeds))
        ours = [((c, s), float(table[c, s])) for c in range(cuts) for s in range(seeds)]
        theirs = [(draw, 0.0) for draw, _ in ours]
        _, mine, its = compared_by(ours, theirs)
        interval = difference(mine, its).interval
        assert interval.low is not None and interval.high is not None and interval.n == cuts
        by_cut += not interval.low < 0 < interval.high
        naive = mean_interval([value for _, value in ours])
        assert naive.low is not None and naive.high is not None
        by_run += not naive.low < 0 < naive.high
    return by_cut / studies, by_run / studies


def test_intervals_cover_by_cut_and_not_by_run() -> None:
    """With as much variance between cuts as between seeds, counting runs would miss far more often than 5%."""
    by_cut, by_run = misses(5, 4, 1.0, 400)
    assert by_cut == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 400))
    assert by_run > 0.2


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("cuts", "seeds", "v_cut"), [(3, 3, 0.5), (5, 4, 0.0), (5, 4, 1.0), (10, 2, 4.0), (4, 10, 1.0)]
)
def test_intervals_cover_in_many_studies(cuts: int, seeds: int, v_cut: float) -> None:
    by_cut, by_run = misses(cuts, seeds, v_cut, 4000)
    assert by_cut == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 4000))
    assert (by_run > 0.07) == (v_cut > 0)


def cut_study(folder: Path, cuts: range, seeds: int = 2) -> Path:
    """dense and soft in each cut; cuts are easier or harder for both, and soft gains 3 points or so."""
    for cut in cuts:
        for seed in range(seeds):
            hard: dict[str, Any] = {"data__split_seed": cut, "test_is_cut": True}
            write(folder, row(router="dense", seed=seed, top1_pct=85 + 2 * (cut % 4) + 0.3 * seed, **hard))
            gain = 3 + 0.2 * (cut % 3) + 0.1 * seed
            write(folder, row(seed=seed, top1_pct=85 + 2 * (cut % 4) + 0.3 * seed + gain, **hard))
    return folder


def test_runs_of_several_cuts_stand_in_one_table_and_n_counts_cuts(tmp_path: Path) -> None:
    comparison = asked(cut_study(tmp_path, range(5)))
    assert len(comparison.blocks) == 1
    soft, dense = group(comparison, "soft"), group(comparison, "dense")
    assert soft.difference is not None
    assert (soft.difference.unit, soft.difference.interval.n, soft.verdict) == ("cut", 5, "better")
    gains = [3.05 + 0.2 * (cut % 3) for cut in range(5)]
    told = stats.ttest_1samp(gains, 0)
    assert soft.difference.p == pytest.approx(told.pvalue)
    assert soft.difference.interval.low == pytest.approx(told.confidence_interval(0.95).low)
    mean = dense.intervals["top1_pct"]
    assert mean is not None
    assert mean == mean_interval([85.15 + 2 * (cut % 4) for cut in range(5)])
    assert soft.difference_spread is not None and soft.difference_spread.within == pytest.approx(0.1 / math.sqrt(2))
    assert soft.difference_spread.new_images_half is not None
    said = terminal(comparison)
    for words in (
        "digits, 359 test images in each of 5 cuts", "5 cuts", "10 runs", "paired by cut", "cuts and seeds apart",
        "of which there are 5", "5 cuts this table sees", "of cuts",
    ):  # fmt: skip
        assert words in said, words
    cells = next(each for each in flat_rows(comparison) if each["group"] == "soft")
    assert cells["difference_seed_deviation"] == pytest.approx(0.1 / math.sqrt(2))
    assert cells["cuts"] == "0 0 1 1 2 2 3 3 4 4"


def test_every_run_counts_where_a_draw_is_in_a_group_twice(tmp_path: Path) -> None:
    """--by puts two learning rates together: both runs of a seed in a cut are in its mean."""
    for cut, seed, lr, router in itertools.product(range(3), range(2), (0.001, 0.01), ("dense", "soft")):
        quality = 80 + 2 * cut + 0.3 * seed + 500 * lr + (2.1 + 0.1 * cut) * (router == "soft")
        hard: dict[str, Any] = {"data__split_seed": cut, "test_is_cut": True, "optim__lr": lr}
        write(tmp_path, row(router=router, seed=seed, top1_pct=quality, **hard))
    for each in asked(tmp_path, by=("router",)).groups:
        assert each.spread is not None and (each.spread.cuts, each.spread.runs) == (3, 12)
        assert each.spread.mean == each.intervals["top1_pct"]
        assert each.difference_spread is None, "which runs of a seed are a pair cannot be told"


def test_a_stray_cut_is_kept_apart_and_one_cut_can_be_asked_for(tmp_path: Path) -> None:
    cut_study(tmp_path, range(3))
    write(tmp_path, row(seed=0, data__split_seed=9))
    comparison = asked(tmp_path)
    assert [sum(len(each.runs) for each in block.groups) for block in comparison.blocks] == [12, 1]
    one = asked(tmp_path, where=("data.split_seed=1",))
    assert [each.difference.unit for each in one.groups if each.difference] == ["seed"]
    apart = asked(tmp_path, by=("router", "data.split_seed"))
    assert len(apart.blocks) == 4, "who groups by cuts keeps them apart"


def test_cuts_of_other_groups_are_another_table(tmp_path: Path) -> None:
    """Two groups in cuts 0 and 1 and two others in cuts 2 and 3 have no images in common."""
    for cut, routers in enumerate((("dense", "soft"),) * 2 + (("dense", "tokens_choice"),) * 2):
        for router in routers:
            lr = 0.001 if cut < 2 else 0.002
            write(tmp_path, row(router=router, optim__lr=lr, data__split_seed=cut, test_is_cut=True))
    comparison = asked(tmp_path)
    assert [len(block.groups) for block in comparison.blocks] == [2, 2]
    assert [sorted({run.draw[0] for each in block.groups for run in each.runs}) for block in comparison.blocks] == [
        [0, 1],
        [2, 3],
    ]
    assert [block.title for block in comparison.blocks] == [
        f"digits, 359 test images in each of 2 cuts; data.split_seed {cuts}" for cuts in ("0,1", "2,3")
    ]


def looked(folder: Path) -> Comparison:
    comparison = asked(folder)
    runs = [run for each in comparison.groups for run in each.runs]
    assert record_look(runs, comparison.quality, comparison.margin) == []
    return comparison


def test_cuts_after_a_look_are_judged_by_the_any_time_rule_and_later_seeds_of_seen_cuts_do_not_count(
    tmp_path: Path,
) -> None:
    looked(cut_study(tmp_path, range(3)))
    cut_study(tmp_path, range(3, 8))
    before = group(looked(tmp_path), "soft")
    assert before.difference is not None
    assert (before.difference.method, before.difference.unit, before.difference.interval.n) == ("any-time", "cut", 8)
    for cut in range(3):
        late: dict[str, Any] = {"seed": 7, "data__split_seed": cut, "test_is_cut": True}
        write(tmp_path, row(router="dense", top1_pct=50, **late))
        write(tmp_path, row(top1_pct=99, **late))
    comparison = asked(tmp_path)
    after = group(comparison, "soft")
    assert after.difference == before.difference, "what a look has seen of a cut stays what it was"
    assert any("seeds that came into a cut after the look" in note for note in comparison.blocks[0].notes)


def test_chance_is_that_of_all_cuts(tmp_path: Path) -> None:
    """A model that always gives the commonest class, which is more common in some cuts, is at chance."""
    shares = (10.3, 11.4, 11.4, 11.4, 11.7)
    for cut, share in enumerate(shares):
        write(tmp_path, row(seed=0, data__split_seed=cut, test_is_cut=True, chance_pct=share, top1_pct=share))
    (only,) = asked(tmp_path).groups
    assert only.chance_pct == pytest.approx(statistics.fmean(shares)) and only.at_chance
