"""Which seeds are still to be run, and what is settled: a function of the finished runs alone.

Looks are made at every number of seeds, from the first that can give a verdict. An arm that has its verdict gets no
further seeds and keeps its place in the contest, whose size is fixed before the first run. The looks are gone through
anew each time, from the first one on, so that a command that was killed, moved or typed again goes on as if nothing had
happened; seeds that were run ahead of a look are not seen by it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from softmoe_cli.compare.anytime import critical
from softmoe_cli.compare.intervals import LEVEL, OPEN, Difference, Verdict, anytime_difference, verdicts
from softmoe_cli.compare.looks import PastLooks, seed_order
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.run.rows import QUALITIES

FAILED = "failed"
"""The verdict of an arm that has no finished run at a look."""
Runs = Mapping[str, Mapping[int, FinishedRun]]
"""Finished runs by arm and seed."""


@dataclass(frozen=True)
class Contest:
    """What is settled, fixed before the first run: the arms that are compared, by label, and with what; the main
    measure and the margin; the first seed."""

    arms: tuple[str, ...]
    baseline: str
    quality: str
    margin: float | None
    first: int

    @property
    def least(self) -> int:
        """The seeds of the first look."""
        return fewest_seeds(len(self.arms))

    def seeds(self, n: int) -> range:
        return range(self.first, self.first + n)


def fewest_seeds(comparisons: int) -> int:
    """With fewer, no difference could be large enough for a verdict at the first step of Holm."""
    n = np.arange(2, 1000)
    return int(n[np.isfinite(critical(n, (1 - LEVEL) / comparisons))][0])


@dataclass
class Standing:
    """Where a contest stands after the looks that its runs allow.

    `n`: seeds of the last look, 0 before the first one. `found` and `told`: difference and verdict of each arm at the
    last look that it had. `decided`: the seeds of the look that gave an arm its verdict. `wanted`: the runs, as arm and
    seed, that the next look lacks; empty where all is decided or the most seeds are used up.
    """

    n: int = 0
    found: dict[str, Difference] = field(default_factory=dict)
    told: dict[str, Verdict] = field(default_factory=dict)
    decided: dict[str, int] = field(default_factory=dict)
    wanted: list[tuple[str, int]] = field(default_factory=list)

    def undecided(self, contest: Contest) -> list[str]:
        return [arm for arm in contest.arms if arm not in self.decided]


def stand(
    contest: Contest, runs: Runs, looks: PastLooks, most: int, failed: Collection[tuple[str, int]] = ()
) -> Standing:
    """Goes through all looks that the runs allow, at most at `most` seeds. Runs in `failed` are not waited for."""
    standing = Standing()
    for n in range(min(contest.least, most), most + 1):
        standing.wanted = lacking(contest, standing, runs, n, failed)
        if standing.wanted or not standing.undecided(contest):
            break
        standing.n = n
        _look(contest, standing, runs, looks)
    return standing


def lacking(
    contest: Contest, standing: Standing, runs: Runs, n: int, failed: Collection[tuple[str, int]] = ()
) -> list[tuple[str, int]]:
    """The runs that a look at n seeds of the undecided arms needs and that are neither finished nor failed."""
    undecided = standing.undecided(contest)
    there = {(arm, seed) for arm, of_arm in runs.items() for seed in of_arm}
    arms = [contest.baseline, *undecided] if undecided else []
    wanted = [(arm, seed) for seed in contest.seeds(n) for arm in arms]
    return [each for each in wanted if each not in there and each not in failed]


def _difference(contest: Contest, runs: Runs, arm: str, seeds: range, looks: PastLooks) -> Difference:
    """An arm's difference in a look at these seeds. All shared seeds have one order, and each look sees as many from
    its beginning as it has pairs: if a seed that comes late took its place among others, looks would go along several
    orders, and the chance of a false verdict at any of them has no bound."""
    ours, theirs = (list(runs.get(each, {}).values()) for each in (arm, contest.baseline))
    order = seed_order(ours, theirs, looks)
    order = order[: sum(seed in seeds for seed in order)]
    mine, its = (
        [(seed, run.row[contest.quality]) for run in side if (seed := run.row["seed"]) in order or seed in seeds]
        for side in (ours, theirs)
    )
    return anytime_difference(mine, its, order, contest.margin)


def seen(contest: Contest, standing: Standing, runs: Runs) -> list[FinishedRun]:
    """The runs that the looks so far have seen: none that ran ahead, and of a decided arm none after its verdict."""
    return [
        run
        for arm, of_arm in runs.items()
        for seed, run in of_arm.items()
        if seed in contest.seeds(standing.decided.get(arm, standing.n))
    ]


def _look(contest: Contest, standing: Standing, runs: Runs, looks: PastLooks) -> None:
    """One look at `standing.n` seeds of every undecided arm; the others keep the difference that decided them."""
    seeds = contest.seeds(standing.n)
    theirs = [run for seed, run in runs.get(contest.baseline, {}).items() if seed in seeds]
    for arm in standing.undecided(contest):
        ours = [run for seed, run in runs.get(arm, {}).items() if seed in seeds]
        if not ours:
            standing.told[arm], standing.decided[arm] = Verdict(FAILED), standing.n
        elif theirs:
            standing.found[arm] = _difference(contest, runs, arm, seeds, looks)
    higher = QUALITIES[contest.quality].better == "higher"
    for arm, told in verdicts(standing.found, higher_is_better=higher, family=len(contest.arms)).items():
        standing.told[arm] = told
        if told.p is not None and told.word != OPEN:
            standing.decided.setdefault(arm, standing.n)
