"""Where a settling stands, as a table with sentences and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from softmoe_cli.compare.intervals import EQUAL, FEW, OPEN, Interval, effect_interval, mean_interval
from softmoe_cli.compare.power import seeds_to_equal, seeds_to_see
from softmoe_cli.compare.units import cell, difference_cell, figure, points
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.run.rows import QUALITIES
from softmoe_cli.settle.rounds import Contest, Runs, Standing
from softmoe_cli.settle.spent import Spent, total
from softmoe_cli.settle.tune import Tuned
from softmoe_cli.settle.tuning import tuning_rows
from softmoe_cli.text import aligned, flop, in_words, several


@dataclass(frozen=True)
class Account:
    """A standing with what it rests on. `reasons` say why runs failed, by arm and seed; `over` names the
    budget that the next round would pass, and `next_round` what that would cost."""

    contest: Contest
    standing: Standing
    runs: Runs
    spent: Spent
    reasons: Mapping[tuple[str, int], str]
    asked: SettleConfig
    tuned: list[Tuned] = field(default_factory=list)
    over: str = ""
    next_round: Spent = field(default_factory=Spent)
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> str:
        """What every difference rests on: `359 test images of one cut`; empty before the first run."""
        runs = [run for of_arm in self.runs.values() for run in of_arm.values()]
        if not runs:
            return ""
        cuts, count = {run.draw[0] for run in runs}, runs[0].row.get("test_images", "?")
        return f"{count} test images {'of one cut' if len(cuts) == 1 else f'in each of {len(cuts)} cuts'}"

    @property
    def open(self) -> list[str]:
        return self.standing.undecided(self.contest)

    def values(self, arm: str) -> list[float]:
        """The main measure of an arm's runs that were looked at."""
        seeds = self.contest.seeds(self.standing.decided.get(arm, self.standing.n))
        return [run.row[self.contest.quality] for seed, run in self.runs[arm].items() if seed in seeds]

    def failed(self, arm: str) -> str:
        """How many of an arm's seeds failed, of those that were tried; empty for none."""
        failed = sum(label == arm for label, _ in self.reasons)
        return f"{failed} of {failed + len(self.runs[arm])}" if failed else ""

    def mean(self, arm: str) -> Interval | None:
        values = self.values(arm)
        return mean_interval(values) if values else None

    def sources(self) -> dict[str, float | None]:
        """What the checkpoint had cost that an arm's runs began with, in PFLOP of training; None where that is not
        known. Arms that began afresh are not there."""
        told = {}
        for arm, of_arm in self.runs.items():
            costs = [
                run.row["checkpoint.train_pflop"] for run in of_arm.values() if run.row.get("checkpoint") is not None
            ]
            if costs:
                told[arm] = None if None in costs else mean_interval(costs).mean
        return told

    def needed(self, arm: str) -> tuple[int | None, int | None]:
        """How many seeds would see the difference that an open arm has now, and how many would find it equal within the
        margin if it has none: estimates by compare's power, None where there is no number."""
        found, count = self.standing.found.get(arm), len(self.contest.arms)
        effect = effect_interval(found) if found else None
        if found is None or effect is None or not found.deviation:
            return None, None
        margin = self.contest.margin
        equal = None if margin is None else seeds_to_equal(margin / found.deviation, count, anytime=True)
        return seeds_to_see(effect.mean, count, anytime=True), equal

    @property
    def why(self) -> str:
        """Why it ended."""
        if not self.open:
            return "every arm has its verdict"
        return self.over or f"max_seeds={self.asked.max_seeds}"


def as_text(report: Account) -> str:
    """The verdict table, and what would be needed for what is open."""
    contest, standing = report.contest, report.standing
    key = contest.quality
    title = QUALITIES[key].title
    rows = [["arm", "seeds", title, f"against {contest.baseline}", "p (Holm)", "verdict"]]
    rows.append([contest.baseline, str(len(report.values(contest.baseline))), cell(key, report.mean(contest.baseline)),
                 "", "", "baseline"])  # fmt: skip
    for arm in contest.arms:
        told, found = standing.told.get(arm), standing.found.get(arm)
        word = told.word if told else FEW
        p = None if told is None else told.p_equal if word == EQUAL else told.p
        rows.append(
            [
                arm,
                str(len(report.values(arm))),
                cell(key, report.mean(arm)),
                difference_cell(key, found),
                "" if p is None else f"{p:.2g}",
                "open" if word in (OPEN, FEW) else word,
            ]
        )
    if report.reasons:
        for row, told_failed in zip(
            rows, ["failed", *(report.failed(arm) for arm in (contest.baseline, *contest.arms))], strict=True
        ):
            row.insert(2, told_failed)
    margin = "" if contest.margin is None else f", margin {figure(key, contest.margin)}{points(key)}"
    lines = [aligned(rows, markdown=False), ""]
    lines.append(
        f"{len(standing.decided)} of {several(len(contest.arms), 'arm')} decided after {several(standing.n, 'seed')}; "
        f"any-time 95%, Holm over {len(contest.arms)}{margin}"
        f"{'; ' if report.images else ''}{report.images}; {in_words(report.spent.seconds)} and "
        f"{flop(1e15 * report.spent.pflop)} so far"
    )
    if report.tuned:
        apart = total(each.spent for each in report.tuned)
        lines.append(
            f"tuning {report.asked.tune}, booked apart: {in_words(apart.seconds)} and {flop(1e15 * apart.pflop)}"
        )
    lines += _pretraining(report)
    lines += report.notes
    lines += [f"open: {each}" for each in needs(report)]
    if report.over:
        more = f"{in_words(report.next_round.seconds)} and {flop(1e15 * report.next_round.pflop)}"
        lines.append(f"the next look would pass {report.over}: it takes about {more} more")
    return "\n".join(lines)


def _pretraining(report: Account) -> list[str]:
    """A line about what checkpoints had cost before finetuning, which no budget counts."""
    costs = {
        arm: "what is not known" if pflop is None else flop(1e15 * pflop) for arm, pflop in report.sources().items()
    }
    if not costs:
        return []
    amounts = set(costs.values())
    each = amounts.pop() if len(amounts) == 1 else ", ".join(f"{cost} ({arm})" for arm, cost in costs.items())
    return [f"checkpoints had cost {each} of training, not counted here; softmoe compare --with-source counts it"]


def needs(report: Account) -> list[str]:
    """For each open arm, how many seeds would decide it, by estimate."""
    told = []
    for arm in report.open:
        different, equal = report.needed(arm)
        ways = []
        if different is not None:
            ways.append(f"about {several(different, 'seed')} at the difference found")
        if equal is not None:
            ways.append(f"about {several(equal, 'seed')} to be equal within the margin, if it has no difference")
        told.append(f"{arm}: {' or '.join(ways) or 'how many more seeds it needs cannot be said yet'}")
    return told


def as_json(report: Account) -> str:
    return json.dumps(told_rows(report))


def told_rows(report: Account) -> dict[str, Any]:
    """The report for programs."""
    contest, standing, sources = report.contest, report.standing, report.sources()
    arms: list[Mapping[str, Any]] = []
    for arm in (contest.baseline, *contest.arms):
        told, found, mean = standing.told.get(arm), standing.found.get(arm), report.mean(arm)
        different, equal = report.needed(arm) if arm in report.open else (None, None)
        interval = found.interval if found else None
        arms.append(
            {
                "arm": arm,
                "baseline": arm == contest.baseline,
                "verdict": told.word if told else None,
                "decided_at": standing.decided.get(arm),
                "seeds": len(report.values(arm)),
                "failed": sum(label == arm for label, _ in report.reasons),
                "mean": mean.mean if mean else None,
                "difference": interval.mean if interval else None,
                "difference_low": interval.low if interval else None,
                "difference_high": interval.high if interval else None,
                "p_holm": told.p if told else None,
                "p_equal_holm": told.p_equal if told else None,
                "seeds_needed": different,
                "equal_seeds_needed": equal,
                "checkpoint_pflop": sources.get(arm),
            }
        )
    return {
        "quality": contest.quality,
        "margin": contest.margin,
        "baseline": contest.baseline,
        "decided": not report.open,
        "open": report.open,
        "ended": report.why,
        "seeds": standing.n,
        "images": report.images,
        "notes": report.notes,
        "hours": report.spent.seconds / 3600,
        "train_pflop": report.spent.pflop,
        "tuning": tuning_rows(report.tuned, str(report.asked.tune)) if report.tuned else None,
        "failed": list(report.reasons.values()),
        "arms": arms,
    }
