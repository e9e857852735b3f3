"""Compares every group with its baseline: finds the baseline, gives verdicts, and says what else was unequal."""

import math

from softmoe_cli.compare.groups import Block, Group, Question, key_named, said
from softmoe_cli.compare.intervals import Difference, difference, verdicts
from softmoe_cli.compare.units import apart
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import COSTS, QUALITIES

ROUTED = ("model.moe_blocks", "model.expert_init", "model.expert_width")
"""Settings that, like model.router.*, come with a router: they do not help to find the dense control of a group."""


def judge(blocks: list[Block], question: Question) -> None:
    """Every group against its baseline, at the end and at the budgets: two families per table, Holm's correction in
    each."""
    higher = QUALITIES[question.quality].better == "higher"
    matched = 0
    keys = list(
        dict.fromkeys(key for block in blocks for group in block.groups for run in group.runs for key in run.row)
    )
    for block in blocks:
        candidates = _candidates(block.groups, question.baseline, keys)
        matched += len(candidates)
        ends: dict[int, Difference] = {}
        common: dict[tuple[int, int], Difference] = {}
        for index, group in enumerate(block.groups):
            if group in candidates:
                continue
            baseline = _nearest_group(group, candidates)
            if baseline is None:
                continue
            group.baseline = baseline.label
            _conditions(group, baseline, question.cost)
            group.difference = ends[index] = difference(
                group.values(question.quality), baseline.values(question.quality)
            )
            for place, (ours, theirs) in enumerate(zip(group.budgets, baseline.budgets, strict=True)):
                if ours.interval and theirs.interval:
                    ours.difference = common[index, place] = difference(ours.values, theirs.values)
        for index, (verdict, p) in verdicts(ends, higher_is_better=higher).items():
            block.groups[index].verdict, block.groups[index].p_holm = verdict, p
        for (index, place), (verdict, _) in verdicts(common, higher_is_better=higher).items():
            block.groups[index].budgets[place].verdict = verdict
        _judge_notes(block, candidates)
    if question.baseline is not None and not matched:
        labels = [group.label for block in blocks for group in block.groups]
        raise UsageError(
            f"--baseline {question.baseline}: no group is called or has that.{nearest(question.baseline, labels)} "
            f"Groups: {'; '.join(labels)}"
        )


def _conditions(group: Group, baseline: Group, cost: str) -> None:
    """Says what else was unequal between the two: cost, length of training, pretraining."""
    pair = (group, baseline)
    known = cost == "train_pflop" and all(not g.pretrained or g.checkpoint_pflop is not None for g in pair)
    ours, theirs = (_total(each, cost, pretraining=known) for each in pair)
    if ours is not None and theirs is not None and theirs > 0:
        group.cost_ratio = ours / theirs
        told = apart(group.cost_ratio, COSTS[cost].amount)
        group.conditions += [f"at {told}"] if told else []
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
    """Mean cost; with `pretraining` what the checkpoints had cost is added to training PFLOPs."""
    interval = group.intervals.get(cost)
    if interval is None:
        return None
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
        keys = {key for key in {*mine, *its} if not key.startswith("model.router.") and key not in ROUTED}
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
    tested = sum(group.p_holm is not None for group in judged)
    if methods:
        tests = {"paired": "paired by seed (Student's t)", "Welch": "of unpaired seeds (Welch's t)"}
        told = " and ".join(tests[method] for method in methods)
        holm = ""
        if tested > 1:
            holm = f"; the {tested} verdicts hold all at once (Holm), intervals each for itself"
        block.notes.append(f"differences are {told}, intervals 95%{holm}")
    for group in judged:
        assert group.difference is not None
        if group.difference.method == "Welch" and len(methods) > 1:
            block.notes.append(f"{group.label} shares too few seeds with {group.baseline}: Welch's t")
        if group.difference.unpaired_seeds:
            seeds = ", ".join(map(str, group.difference.unpaired_seeds))
            block.notes.append(f"{group.label} against {group.baseline}: seeds {seeds} have no partner")
        if group.difference.interval.n > 1 and group.difference.p is None:
            block.notes.append(
                f"{group.label} against {group.baseline}: the differences are all the same, so that their spread, and "
                "with it an interval, cannot be told"
            )
