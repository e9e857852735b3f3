"""Compares every group with its baseline: finds the baseline, gives verdicts, and says what else was unequal."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softmoe_cli.compare.cuts import Draw, compared_by, independent, spread, unit_of
from softmoe_cli.compare.groups import Block, Group, Second, key_named, said
from softmoe_cli.compare.intervals import (
    FEW,
    MIN_SEEDS,
    OPEN,
    Difference,
    anytime_difference,
    beats,
    best_set,
    difference,
    mean_interval,
    tested,
    verdicts,
)
from softmoe_cli.compare.looks import PastLooks, draw_order, seeds_were_added
from softmoe_cli.compare.power import outlook
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.reach import reached
from softmoe_cli.compare.settled import Settled
from softmoe_cli.compare.units import apart
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import COSTS, QUALITIES, TASK_QUALITY, number, of_tasks

UNSETTLED = Settled()
ROUTED = ("model.moe_blocks", "model.expert_init", "model.expert_width")
"""Settings that, like model.router.*, come with a router: they do not help to find the dense control of a group."""


TASK_MEASURE = "top1_pct"
"""What the tasks of a mix are compared by."""


def judge(blocks: list[Block], question: Question, looks: PastLooks, settled: Settled = UNSETTLED) -> None:
    """Every group against its baseline, at the end, in the second measure, at the budgets and in each task of a mix: a
    family of each per table, Holm's correction in each. The any-time rule judges where seeds were added after a look,
    and settled studies."""
    matched = 0
    keys = list(
        dict.fromkeys(key for block in blocks for group in block.groups for run in group.runs for key in run.row)
    )
    for block in blocks:
        candidates = settled.candidates(block.groups) or _candidates(block.groups, question.baseline, keys)
        matched += len(candidates)
        _second_means(block, question)
        _task_means(block)
        _judge_block(block, candidates, question, looks, settled.family)
        _judge_notes(block, candidates)
        _look_notes(block, question, looks, settled)
    if question.baseline is not None and not matched:
        labels = [group.label for block in blocks for group in block.groups]
        raise UsageError(
            f"--baseline {question.baseline}: no group is called or has that.{nearest(question.baseline, labels)} "
            f"Groups: {'; '.join(labels)}"
        )


def _judge_block(block: Block, candidates: list[Group], question: Question, looks: PastLooks, family: int) -> None:
    higher = QUALITIES[question.quality].better == "higher"
    ends: dict[str, Difference] = {}
    common: dict[tuple[str, int], Difference] = {}
    for group in block.groups:
        baseline = None if group in candidates else _nearest_group(group, candidates)
        if baseline is None:
            continue
        rule = _Rule(group, baseline, question, looks)
        group.baseline = baseline.label
        group.difference = ends[group.label] = rule.difference(
            group.values(question.quality), baseline.values(question.quality), question.margin
        )
        group.p_better = beats(group.difference, higher_is_better=higher)
        group.conditions += ["any-time"] if rule.anytime else []
        if rule.late:
            block.notes.append(
                f"{group.label} against {baseline.label}: seeds that came into a cut after the look that first showed "
                "it do not count; the any-time rule needs further cuts"
            )
        _conditions(group, baseline, question.cost)
        _to_quality(group, baseline, rule, question, block.notes)
        if group.second and baseline.second:
            group.second.difference = rule.difference(group.values(question.second), baseline.values(question.second))
        for name, own in group.tasks.items():
            key = TASK_QUALITY.format(name, TASK_MEASURE)
            own.difference = rule.difference(group.values(key), baseline.values(key))
        for place, (ours, theirs) in enumerate(zip(group.budgets, baseline.budgets, strict=True)):
            if ours.interval and theirs.interval:
                ours.difference = common[group.label, place] = rule.difference(
                    ours.values, theirs.values, question.margin
                )
    of = {group.label: group for group in block.groups}
    _spreads(block, question.quality)
    for label, told in verdicts(ends, higher_is_better=higher, family=family).items():
        of[label].verdict, of[label].p_holm, of[label].p_equal_holm = told
    beside = {group.label: group.second for group in block.groups if group.second}
    second = _judge_beside(beside, QUALITIES[question.second].better == "higher", family)
    names = block.groups[0].tasks
    by_task = {(group.label, name): own for group in block.groups for name, own in group.tasks.items()}
    told_of_tasks = _judge_beside(by_task, QUALITIES[TASK_MEASURE].better == "higher", family * len(names))
    for (label, place), told in verdicts(common, higher_is_better=higher, family=family).items():
        of[label].budgets[place].verdict = told.word
    undecided = [label for label in ends if of[label].verdict in (OPEN, FEW)]
    block.outlook = outlook(ends, undecided, question.margin, family)
    families: dict[str, Mapping[Any, Difference]] = {"main": ends, "second": second, "budgets": common}
    block.corrected = {name: max(family, len(tested(each))) for name, each in families.items() if each}
    if told_of_tasks:
        block.corrected["tasks"] = max(family * len(names), len(tested(told_of_tasks)))
    _best(block, question, looks)


def _judge_beside(beside: Mapping[Any, Second], higher_is_better: bool, family: int) -> dict[Any, Difference]:
    """Verdicts of one family beside the main one, written into it; returns the differences that they are of."""
    found = {key: own.difference for key, own in beside.items() if own.difference}
    for key, told in verdicts(found, higher_is_better=higher_is_better, family=family).items():
        own = beside[key]
        own.verdict, own.p_holm = told.word, told.p
        own.p_better = beats(found[key], higher_is_better=higher_is_better)
    return found


class _Rule:
    """How two groups are compared, in every measure: by which rule, with which seeds in which order."""

    def __init__(self, ours: Group, theirs: Group, question: Question, looks: PastLooks) -> None:
        self.anytime = question.any_time or seeds_were_added(ours.runs, theirs.runs, looks)
        self._order = draw_order(ours.runs, theirs.runs, looks) if self.anytime else []
        draws = [{run.draw for run in group.runs} for group in (ours, theirs)]
        shown = {draw for _, shown in self._order for draw in shown}
        several = unit_of(*draws)[0] == "cut"
        begun = {cut for cut, _ in shown} if several else set()
        self.late = {draw for draw in draws[0] | draws[1] if draw[0] in begun and draw not in shown}

    def difference(
        self, ours: list[tuple[Draw, float]], theirs: list[tuple[Draw, float]], margin: float | None = None
    ) -> Difference:
        unit, mine, its = compared_by(*(self._seen(each) for each in (ours, theirs)))
        if self.anytime:
            found = anytime_difference(mine, its, [key for key, _ in self._order], margin)
        else:
            found = difference(mine, its, margin)
        return replace(found, unit=unit)

    def _seen(self, values: list[tuple[Draw, float]]) -> list[tuple[Draw, float]]:
        """Without the seeds that came into a cut after the look that first showed it."""
        return [(draw, value) for draw, value in values if draw not in self.late]


def _to_quality(group: Group, baseline: Group, rule: _Rule, question: Question, notes: list[str]) -> None:
    """How much cheaper the group reaches the quality that --to-quality names."""
    if question.to_quality is None:
        return
    key, axis = QUALITIES[question.quality].curve, question.axis
    ours, theirs = ([(run.draw, run.curve(axis, key)) for run in each.runs] for each in (group, baseline))
    higher = QUALITIES[question.quality].better == "higher"
    group.reached = reached(ours, theirs, question.target, axis, rule.difference, higher_is_better=higher)
    if group.reached is None:
        notes.append(
            f"{group.label} against {group.baseline}: when that quality was reached cannot be told, because a run has "
            "no curve or was there at its first look; look earlier (train.eval_every), or ask for a higher quality"
        )


def _best(block: Block, question: Question, looks: PastLooks) -> None:
    """Which groups may be the best, where at least two could be told apart."""
    many = [group for group in block.groups if len(group.runs) >= MIN_SEEDS]
    if len(many) < 2:
        return
    pairs = {
        (ours.label, theirs.label): _Rule(ours, theirs, question, looks).difference(
            ours.values(question.quality), theirs.values(question.quality)
        )
        for place, ours in enumerate(block.groups)
        for theirs in block.groups[place + 1 :]
    }
    higher = QUALITIES[question.quality].better == "higher"
    kept = best_set(pairs, [group.label for group in block.groups], higher_is_better=higher)
    for group in block.groups:
        group.may_be_best = group.label in kept


def _spreads(block: Block, quality: str) -> None:
    """How much cuts and seeds vary, in every group of several cuts and in its differences from its baseline."""
    of = {group.label: group for group in block.groups}
    for group in block.groups:
        values = group.values(quality)
        row = group.runs[0].row
        share = row["test_images"] / row["train_images"] if row.get("test_is_cut") else None
        group.spread = spread(values, share)
        if group.baseline is not None:
            sides = values, of[group.baseline].values(quality)
            ours, theirs = map(dict, sides)
            if [len(ours), len(theirs)] == [len(side) for side in sides]:  # --by may put a draw into a group twice
                paired = [(draw, ours[draw] - theirs[draw]) for draw in sorted(ours.keys() & theirs.keys())]
                group.difference_spread = spread(paired, share)


def _second_means(block: Block, question: Question) -> None:
    """The second measure of every group, where all runs have it and mean the same by it."""
    key = question.second
    runs = [run for group in block.groups for run in group.runs]
    losses = {said(run.row.get("train.loss")) for run in runs}
    if not all(number(run.row.get(key)) for run in runs):
        block.notes.append(f"not every run has {key}, and so there is no second measure")
    elif QUALITIES[key].curve == "loss" and len(losses) > 1:
        block.notes.append(f"{key} is another loss in some runs ({', '.join(sorted(losses))}): no second measure")
    else:
        for group in block.groups:
            group.second = Second(mean_interval(independent(group.values(key))))


def _task_means(block: Block) -> None:
    """The test top-1 of each task in every group, where all runs are of a mix and say it."""
    runs = [run for group in block.groups for run in group.runs]
    for name in of_tasks(runs[0].row, TASK_MEASURE):
        key = TASK_QUALITY.format(name, TASK_MEASURE)
        if all(number(run.row.get(key)) for run in runs):
            for group in block.groups:
                group.tasks[name] = Second(mean_interval(independent(group.values(key))))
        else:
            block.notes.append(f"not every run has {key}, and so that task has no verdicts")


def _conditions(group: Group, baseline: Group, cost: str) -> None:
    """Says what else was unequal between the two: cost, length of training, pretraining."""
    pair = (group, baseline)
    known = cost == "train_pflop" and all(not g.pretrained or g.checkpoint_pflop is not None for g in pair)
    ours, theirs = (_total(each, cost, pretraining=known) for each in pair)
    if ours is None or theirs is None:
        group.conditions.append(f"{COSTS[cost].amount} not known of {'both' if ours is theirs else 'one'}")
    if ours is not None and theirs is not None and theirs > 0:
        group.cost_ratio = ours / theirs
        told = apart(group.cost_ratio, COSTS[cost].amount)
        group.conditions += [f"at {told}"] if told else []
    group.conditions += ["its baseline is at chance"] if baseline.at_chance else []
    means = {key: [_mean(each, key) for each in pair] for key in ("steps", "images")}
    if all(value > 0 for both in means.values() for value in both):
        ratios = {key: ours / theirs for key, (ours, theirs) in means.items()}
        key = "images" if apart(ratios["steps"] / ratios["images"], "") else "steps"  # batch sizes may differ
        if apart(ratios["images"], "") and cost not in ratios:
            group.conditions.append(f"{means[key][0]:,.0f} {COSTS[key].amount} against {means[key][1]:,.0f}")
    if COSTS[cost].trained and (group.pretrained or baseline.pretrained):
        group.conditions.append(f"pretraining {'' if known else 'not '}counted")


def _mean(group: Group, key: str) -> float:
    """The mean of a figure of every run; 0 if a run lacks it."""
    values = [run.row.get(key) or 0.0 for run in group.runs]
    return math.fsum(values) / len(values) if all(values) else 0.0


def _total(group: Group, cost: str, *, pretraining: bool) -> float | None:
    """Mean cost; with `pretraining` what the checkpoints had cost is added to training PFLOPs that lack it."""
    interval = group.intervals.get(cost)
    if interval is None:
        return None
    pretraining = pretraining and not group.source_counted
    return interval.mean + ((group.checkpoint_pflop or 0.0) if pretraining else 0.0)


def _candidates(groups: list[Group], baseline: str | None, keys: list[str]) -> list[Group]:
    """The groups that others may be measured against: by label, by KEY=VALUE, else the dense ones."""
    if baseline is None:
        return [group for group in groups if all(run.row.get("router") == "dense" for run in group.runs)]
    named = [group for group in groups if group.label == baseline]
    key, equals, value = baseline.partition("=")
    if named or not equals:
        return named
    full = key_named("baseline", key, keys)
    return [group for group in groups if all(said(run.row.get(full)) == said(value) for run in group.runs)]


def _nearest_group(group: Group, candidates: list[Group]) -> Group | None:
    """The one candidate that differs from the group in the fewest settings other than the router's; None in a tie."""

    def apart(other: Group) -> int:
        mine, its = group.runs[0].settings(), other.runs[0].settings()
        routers = ("model.router.", "model.blocks.")
        keys = {key for key in {*mine, *its} if not key.startswith(routers) and key not in ROUTED}
        return sum(mine.get(key) != its.get(key) for key in keys)

    ranked = sorted(candidates, key=apart)
    if not ranked or (len(ranked) > 1 and apart(ranked[0]) == apart(ranked[1])):
        return None
    return ranked[0]


def _judge_notes(block: Block, candidates: list[Group]) -> None:
    judged = [group for group in block.groups if group.difference]
    if not candidates and len(block.groups) > 1:
        block.notes.append("no dense control here, and so no differences; --baseline KEY=VALUE or LABEL names another")
    unmatched = [g.label for g in block.groups if candidates and g not in candidates and g.baseline is None]
    if unmatched:
        block.notes.append(f"several baselines are equally near to {'; '.join(unmatched)}: --baseline chooses")
    baselines = list(dict.fromkeys(group.baseline for group in judged))
    if len(baselines) > 1:
        for baseline in baselines:
            block.notes.append(f"against {baseline}: {'; '.join(g.label for g in judged if g.baseline == baseline)}")
    methods = sorted({group.difference.method for group in judged if group.difference})
    counted = block.corrected.get("main", 0)
    if methods:
        tests = {"paired": "paired by {} (Student's t)", "Welch": "of unpaired {}s (Welch's t)",
                 "any-time": "paired by {} (any-time)"}  # fmt: skip
        kinds = sorted({(each.method, each.unit) for group in judged if (each := group.difference)})
        told = " and ".join(tests[method].format(unit) for method, unit in kinds)
        holm = ""
        if counted > 1:
            holm = f"; verdicts hold all at once (Holm over {counted}), intervals each for itself"
        block.notes.append(f"differences are {told}, intervals 95%{holm}")
    for group in judged:
        assert group.difference is not None
        if group.difference.method == "Welch" and len(methods) > 1:
            unit = group.difference.unit
            block.notes.append(f"{group.label} shares too few {unit}s with {group.baseline}: Welch's t")
        if group.difference.unpaired_seeds:
            seeds, unit = ", ".join(map(str, group.difference.unpaired_seeds)), group.difference.unit
            block.notes.append(f"{group.label} against {group.baseline}: {unit}s {seeds} have no partner")
        low, high = group.difference.interval.low, group.difference.interval.high
        if low is not None and high is not None and low > high:
            block.notes.append(
                f"{group.label} against {group.baseline}: the intervals of fewer and of more seeds contradict each "
                "other, which chance does in at most 5% of tables: look for runs that are unlike the others"
            )
        if group.difference.interval.n > 1 and group.difference.p is None:
            block.notes.append(
                f"{group.label} against {group.baseline}: the differences are all the same, so that their spread, and "
                "with it an interval, cannot be told"
            )


def _look_notes(block: Block, question: Question, looks: PastLooks, settled: Settled) -> None:
    """Why the any-time rule judges, and what an earlier look had asked otherwise."""
    judged = [group for group in block.groups if group.difference]
    anytime = [group.label for group in judged if group.difference and group.difference.method == "any-time"]
    if anytime:
        why = "it was asked for" if question.any_time else "seeds were added after a look"
        why = "settle decided when to stop" if settled.family else why
        whose = "" if len(anytime) == len(judged) else f" {'; '.join(anytime)}"
        block.notes.append(
            f"the any-time rule judges{whose}, because {why}: its verdicts and intervals hold however often one looks"
        )
    shown = {run.row["signature"] for group in block.groups for run in group.runs}
    earlier = next((look for look in looks.seen if len(look.runs & shown) > 1), None)
    if earlier is None:
        return
    if earlier.quality != question.quality:
        block.notes.append(
            f"the first look at these runs had {earlier.quality} as its main measure, and this one has "
            f"{question.quality}: a measure that is chosen after a look is no main measure"
        )
    elif question.margin is not None and earlier.margin != question.margin:
        had = "no margin" if earlier.margin is None else f"a margin of {earlier.margin:g}"
        block.notes.append(
            f"the first look at these runs had {had}, and this one has {question.margin:g}: a margin that is chosen "
            "after a look proves little"
        )
