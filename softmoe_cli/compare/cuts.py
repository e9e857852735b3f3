"""Several cuts of the data: which numbers are independent of each other, and how much cuts and seeds vary, as pure
functions.

All runs of one cut have the same training and test images, so what is special about these images is in all of them and
no number of seeds averages it out. With several cuts the independent numbers are therefore the means over the seeds of
each cut, and n is the number of cuts: with C cuts of m seeds a mean has the variance (V_cut + V_seed / m) / C, which
the variance of the C means over C estimates without bias, and Student's t has C - 1 degrees of freedom. This is exact
for normal effects where every cut has as many seeds, and nearly so elsewhere.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from softmoe_cli.compare.intervals import Interval, mean_interval, mean_of

Draw = tuple[int, int]
"""The cut and the seed of a run: all that chance decides."""
Drawn = Sequence[tuple[Draw, float]]


def by_cut(values: Drawn) -> dict[int, list[float]]:
    """The values of each cut, cuts ascending."""
    cuts = defaultdict(list)
    for (cut, _), value in sorted(values):
        cuts[cut].append(value)
    return dict(cuts)


def independent(values: Drawn) -> list[float]:
    """The values themselves where there is one cut, else the mean of each cut."""
    cuts = by_cut(values)
    return [mean_of(each) for each in cuts.values()] if len(cuts) > 1 else [value for _, value in values]


def unit_of(ours: Iterable[Draw], theirs: Iterable[Draw]) -> tuple[str, set[int]]:
    """What is compared, `seed` or `cut`, and in which cuts: two groups that have one cut in common are compared by the
    seeds in it, others by cuts."""
    mine, its = ({cut for cut, _ in draws} for draws in (ours, theirs))
    shared = mine & its
    return ("seed", shared) if len(shared) == 1 else ("cut", mine | its)


def compared_by(ours: Drawn, theirs: Drawn) -> tuple[str, list[tuple[int, float]], list[tuple[int, float]]]:
    """The unit, and (seed, value) or (cut, mean) of each side. In a cut that both have, the means are over the seeds
    that both have there; over all where they share none."""
    unit, cuts = unit_of([draw for draw, _ in ours], [draw for draw, _ in theirs])
    if unit == "seed":
        mine, its = ([(seed, value) for (cut, seed), value in side if cut in cuts] for side in (ours, theirs))
        return unit, mine, its
    drawn = [{draw for draw, _ in side} for side in (ours, theirs)]
    paired = {cut for cut, _ in drawn[0] & drawn[1]}
    mine, its = (
        [
            (cut, mean_of(values))
            for cut, values in by_cut(
                [(d, value) for d, value in side if d[0] not in paired or d in drawn[0] & drawn[1]]
            ).items()
        ]
        for side in (ours, theirs)
    )
    return unit, mine, its


@dataclass(frozen=True)
class Spread:
    """How much `runs` runs in `cuts` cuts vary, as standard deviations: `between` cuts, with the seeds' part taken
    away, and `within` a cut, between its seeds; both None where no cut has two seeds, and `between` 0 where cuts vary
    no more than seeds explain. `mean` has the 95% interval of the mean over cuts of these images; `new_images_half` is
    its half width for images that are new as well."""

    cuts: int
    runs: int
    between: float | None
    within: float | None
    mean: Interval
    new_images_half: float | None


def spread(values: Drawn, test_share: float | None = None) -> Spread | None:
    """The one-way random effects analysis of variance (Searle, Casella and McCulloch, Variance Components, 1992,
    section 3.6). With the mean squares between and within cuts, and m_c values in cut c of N in all,

        V_seed = MS_within,  V_cut = (MS_between - MS_within) / m_0,  m_0 = (N - sum of m_c^2 / N) / (C - 1).

    `test_share`: test images over training images, where each cut draws both from the same images. Cuts share most of
    their images, so that their means are less sure for images that were in none of them: there the variance of the mean
    is s^2 (1/C + test_share) instead of s^2 / C, s being the deviation of the cuts' means (Nadeau and Bengio, Inference
    for the generalization error, 2003). None for a single cut.
    """
    cuts = by_cut(values)
    if len(cuts) < 2:
        return None
    count, total = len(cuts), len(values)
    mean = math.fsum(value for _, value in values) / total
    means = [mean_of(each) for each in cuts.values()]
    between = within = None
    if total > count:
        squares = math.fsum((value - mean_of(each)) ** 2 for each in cuts.values() for value in each)
        v_seed = squares / (total - count)
        among = math.fsum(len(each) * (mean_of(each) - mean) ** 2 for each in cuts.values()) / (count - 1)
        per_cut = (total - math.fsum(len(each) ** 2 for each in cuts.values()) / total) / (count - 1)
        between, within = math.sqrt(max(0.0, (among - v_seed) / per_cut)), math.sqrt(v_seed)
    interval = mean_interval(means)
    half = None
    if test_share is not None and interval.high is not None:
        half = (interval.high - interval.mean) * math.sqrt(1 + count * test_share)
    return Spread(count, total, between, within, interval, half)


def standing_together(groups: Mapping[int, set[str]]) -> list[set[int]]:
    """The cuts, each with the groups that have runs of it, in parts that one table shows: cuts stand together that have
    the same groups or at least two in common. A cut of one group alone would add nothing to a comparison, and change
    that group's mean."""
    found: list[set[int]] = []
    for cut, here in groups.items():
        near = [part for part in found if any(len(here & groups[other]) > 1 or here == groups[other] for other in part)]
        found = [*(part for part in found if part not in near), {cut}.union(*near)]
    return sorted(found, key=min)
