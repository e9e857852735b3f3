"""What is compared: runs that differ only in their seed form a group, and groups that may be compared form a block."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softmoe_cli.compare.cuts import Draw, Spread, independent
from softmoe_cli.compare.intervals import (
    Difference,
    Interval,
    at_budget,
    at_chance,
    budgets,
    front_probability,
    mean_interval,
    mean_of,
    on_front,
)
from softmoe_cli.compare.power import Outlook
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.reach import Reached
from softmoe_cli.compare.runs import FINGERPRINT, FinishedRun
from softmoe_cli.compare.units import quantity
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import COSTS, OF_TASKS, QUALITIES, Row, number, of_tasks
from softmoe_cli.text import several, shortened

LABELS = {
    "model.backbone.name": "{}", "backbone": "{}", "model": "{}", "model.router._target_": "{}", "router": "{}",
    "model.adapter.name": "{}", "num_adapters": "{} adapters",
    "prune.keep": "pruned to {}", "prune.by": "by {}",
    "num_experts": "{} experts", "slots_per_expert": "{} slots/expert", "k": "k={}",
    "expert_width": "experts of width {}", "capacity_factor": "capacity factor {}", "moe_blocks": "blocks {}",
    "image_size": "{} px", "steps": "{} updates", "epochs": "{} epochs", "images": "{} training images",
    "minutes": "{} minutes", "batch_size": "{} images/update", "lr": "lr {}", "command": "{}",
    "checkpoint.origin": "from {}", "checkpoint": "from {}",
}  # fmt: skip
"""How a label writes a setting, found by its key or the last word of its key. Labels contain these settings whenever
they differ, in this order; they contain others only if labels would otherwise be equal."""


@dataclass
class Budgeted:
    """Validation quality at one budget: an interval, or the reason why there is none."""

    axis: str
    budget: float
    values: list[tuple[Draw, float]]
    interval: Interval | None
    reason: str
    difference: Difference | None = None
    verdict: str | None = None


@dataclass
class Second:
    """A group in the second measure, or in one task of a mix: its mean and, against the baseline, difference, verdict,
    adjusted p-value and the probability to be better."""

    interval: Interval
    difference: Difference | None = None
    verdict: str | None = None
    p_holm: float | None = None
    p_better: Interval | None = None


@dataclass
class Group:
    """Runs that differ in nothing but their seed (or in nothing that --by names).

    `p_holm` and `p_equal_holm` are adjusted for all comparisons of the table. `p_better`: the probability that a new
    run is better than the baseline's of the same seed. `may_be_best`: whether it cannot be ruled out that no group is
    better; None where nothing can be ruled out. `cost_ratio` is the group's cost over the baseline's, both with the
    cost of their checkpoints where that is known; `conditions` say what else was unequal. `at_chance`: no better than
    guessing, which reaches `chance_pct`. `tasks`: of a mix the test top-1 of each task by its name. `spread` and,
    against the baseline, `difference_spread` say how much cuts and seeds vary, where there are several cuts.
    """

    settings: Row
    runs: list[FinishedRun]
    label: str = ""
    intervals: dict[str, Interval | None] = field(default_factory=dict)
    baseline: str | None = None
    difference: Difference | None = None
    verdict: str | None = None
    p_holm: float | None = None
    p_equal_holm: float | None = None
    p_better: Interval | None = None
    second: Second | None = None
    tasks: dict[str, Second] = field(default_factory=dict)
    spread: Spread | None = None
    difference_spread: Spread | None = None
    reached: Reached | None = None
    may_be_best: bool | None = None
    cost_ratio: float | None = None
    conditions: list[str] = field(default_factory=list)
    chance_pct: float | None = None
    at_chance: bool = False
    front: bool = False
    front_probability: float | None = None
    budgets: list[Budgeted] = field(default_factory=list)

    def values(self, key: str) -> list[tuple[Draw, float]]:
        return [(run.draw, run.row[key]) for run in self.runs]

    @property
    def cuts(self) -> int:
        """How many cuts of the data the runs are of."""
        return len({run.draw[0] for run in self.runs})

    @property
    def count(self) -> str:
        """n as tables say it."""
        runs = len(self.runs)
        return f"{runs}" if self.cuts == 1 else f"{self.cuts} cuts,\n{several(runs, 'run')}"

    @property
    def pretrained(self) -> bool:
        """Whether a run of the group began with a checkpoint, whose training is in none of the group's costs it is
        `source_counted`."""
        return any(run.row.get("checkpoint") is not None for run in self.runs)

    @property
    def source_counted(self) -> bool:
        """Whether the group's training FLOPs hold those of its checkpoints."""
        return any(run.source_counted for run in self.runs)

    @property
    def checkpoint_pflop(self) -> float | None:
        """The training cost of the checkpoints that the runs began with, mean over runs; None if one of them is
        unknown."""
        costs = [run.row.get("checkpoint.train_pflop") for run in self.runs if run.row.get("checkpoint") is not None]
        known = [cost for cost in costs if cost is not None]
        return math.fsum(known) / len(self.runs) if known and len(known) == len(costs) else None


@dataclass
class Block:
    """Groups whose figures may be compared with each other. `corrected`: how many comparisons Holm's correction counted
    in each of the families main, second, budgets and tasks."""

    title: str
    groups: list[Group]
    notes: list[str]
    outlook: Outlook | None = None
    corrected: dict[str, int] = field(default_factory=dict)


@dataclass
class Comparison:
    """`typed`: the columns that the user asked for, empty where `columns` are the usual ones. `commands`: the commands
    that made the runs. `second`: the measure beside `quality`. `compute`: what all runs below the folders have cost, in
    a sentence."""

    quality: str
    cost: str
    columns: list[str]
    blocks: list[Block]
    notes: list[str]
    left_out: list[tuple[str, str]]
    typed: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    reference: list[dict[str, str]] = field(default_factory=list)
    reference_name: str = ""
    second: str = ""
    margin: float | None = None
    to_quality: str | None = None
    compute: str = ""

    @property
    def groups(self) -> list[Group]:
        return [group for block in self.blocks for group in block.groups]


def block_of(title: str, runs: list[FinishedRun], by: list[str], columns: list[str], question: Question) -> Block:
    gathered: dict[str, Group] = {}
    for run in sorted(runs, key=lambda run: (run.draw, run.row["signature"])):
        gathered.setdefault(group_key(run, by), Group(_chosen(run, by), [])).runs.append(run)
    groups = [gathered[key] for key in sorted(gathered)]
    _name(groups)
    notes = _mixed_notes(groups) if by else []
    fingerprints = Counter(" with torch ".join(str(run.row.get(key)) for key in FINGERPRINT) for run in runs)
    for key in dict.fromkeys([question.quality, question.cost, *columns]):
        if key not in COSTS and key not in QUALITIES and not key.startswith(OF_TASKS):
            continue
        apart = key in COSTS and COSTS[key].clocked and len(fingerprints) > 1
        for group in groups:
            whole = all(number(run.row.get(key)) for run in group.runs) and not apart
            group.intervals[key] = mean_interval(independent(group.values(key))) if whole else None
        if apart:
            told = "; ".join(f"{count} on {name}" for name, count in sorted(fingerprints.items()))
            notes.append(f"{key} is blank: it was measured on different machines ({told}); --cost {key} separates them")
    _fronts(groups, question)
    _chance(groups, question)
    _budgets(groups, question, notes)
    few = [group.label for group in groups if len(group.runs) == 1]
    if few:
        notes.append(f"one seed only, and so no interval: {'; '.join(few)}")
    notes += _start_notes(groups)
    return Block(title, groups, notes)


def _chosen(run: FinishedRun, by: Sequence[str]) -> Row:
    settings = run.settings()
    return {key: settings.get(key, run.row.get(key)) for key in by} if by else settings


def group_key(run: FinishedRun, by: Sequence[str]) -> str:
    """Equal for runs of one group: those that agree in all settings or, if it is said `by` what they are grouped, in
    that."""
    return json.dumps(_chosen(run, by), sort_keys=True)


def _name(groups: list[Group]) -> None:
    """Labels of what differs between groups: the well-known settings, then others until no two labels are the same."""
    keys = sorted({key for group in groups for key in group.settings})

    def distinct(key: str) -> int:
        return len({said(group.settings[key]) for group in groups if group.settings.get(key) is not None})

    order = list(LABELS)
    known = sorted((key for key in keys if _known(key)), key=lambda key: order.index(_known(key)))
    chosen = [key for key in known if distinct(key) > 1]
    others = sorted(
        (key for key in keys if key not in chosen), key=lambda key: order.index(key) if key in order else len(order)
    )

    def labels() -> list[str]:
        return [", ".join(filter(None, (_part(group, key) for key in chosen))) for group in groups]

    for key in others:
        told = labels()
        alike = defaultdict(set)
        for label, group in zip(told, groups, strict=True):
            alike[label].add(said(group.settings[key]) if key in group.settings else None)
        if any(len(values) > 1 for values in alike.values()):
            chosen.append(key)
    for group, label in zip(groups, labels(), strict=True):
        group.label = label or shortened(group.runs[0].row["router"] or group.runs[0].row["name"], LABEL_LETTERS)
    for label in {group.label for group in groups}:
        twins = [group for group in groups if group.label == label]  # such as from two checkpoints of one run
        odd = [key for key in keys if len({said(twin.settings.get(key)) for twin in twins}) > 1]
        for twin in twins:
            twin.label += f" ({', '.join(said(twin.settings.get(key))[-12:] for key in odd)})" if odd else ""
    seen = Counter[str]()
    for group in groups:
        seen[group.label] += 1
        group.label += f" #{seen[group.label]}" if seen[group.label] > 1 else ""


LABEL_LETTERS = 48
"""The most letters that one setting takes in a label."""


def _known(key: str) -> str:
    """The key of LABELS that fits a setting; empty if there is none."""
    leaf = key.rpartition(".")[2]
    if key in LABELS:
        return key
    return leaf if leaf in LABELS else ""


def _part(group: Group, key: str) -> str:
    """One setting as a label writes it; empty if the group does not have the setting."""
    value, row = group.settings.get(key), group.runs[0].row
    if value is None:
        return ""
    if key == "model.router._target_":
        value = row["router"]
    alone = re.fullmatch(r"model\.blocks\.(\d+)\.(.+)", key)
    if alone is not None:
        what = str(value).split(".")[-2] if alone[2] == "_target_" else f"{alone[2]} {said(value)}"
        return f"block {alone[1]} {shortened(what, LABEL_LETTERS)}"
    if key == "checkpoint.origin":
        value = _source_name(Path(row["checkpoint"] or value))
    text = shortened(",".join(map(str, value)) if isinstance(value, list) else said(value), LABEL_LETTERS)
    told = LABELS.get(_known(key), f"{key.rpartition('.')[2]} {{}}").format(text)
    return told.replace("experts", "expert").replace("slots/", "slot/") if text == "1" else told


def _source_name(weights: Path) -> str:
    """The run's name, or the folder's, where that says more than the file's."""
    if weights.name != "model.safetensors":
        return weights.name
    folder = weights.parent
    return (folder.parents[1] if folder.parent.name == "checkpoints" else folder).name or str(weights)


def _mixed_notes(groups: list[Group]) -> list[str]:
    """Notes on what else differs within the groups that --by makes."""
    mixed = set()
    for group in groups:
        settings = [run.settings() for run in group.runs]
        for key in set().union(*settings):
            if key not in group.settings and len({said(each.get(key)) for each in settings}) > 1:
                mixed.add(key)
    return [f"--by puts runs together that differ in {', '.join(sorted(mixed))}"] if mixed else []


EQUAL_COST = 0.01
"""Costs that differ by no more than this share of the largest are one: they are drawn so, and decide no front."""


def _fronts(groups: list[Group], question: Question) -> None:
    """Stores who is on the front. Equal costs decide nothing there: the group with the better mean is."""
    sign = 1 if QUALITIES[question.quality].better == "higher" else -1
    if any(group.intervals[question.cost] is None for group in groups):
        groups = [group for group in groups if group.intervals[question.cost] is not None]
    if not groups:
        return
    costs, qualities = ([independent(g.values(key)) for g in groups] for key in (question.cost, question.quality))
    means = [[mean_interval(each).mean for each in values] for values in (costs, qualities)]
    if equal_costs(means[0]):
        costs, means[0] = [[1.0] * len(each) for each in costs], [1.0] * len(costs)
    chances = front_probability(list(zip(costs, [[sign * v for v in each] for each in qualities], strict=True)))
    for group, front, chance in zip(groups, on_front(means[0], [sign * q for q in means[1]]), chances, strict=True):
        group.front = bool(front)
        group.front_probability = chance if len(group.runs) > 1 else None


def equal_costs(costs: Sequence[float]) -> bool:
    """Whether several costs are one, as those of arms that were made equal: the rest is rounding, to whole updates."""
    return len(costs) > 1 and max(costs) - min(costs) <= EQUAL_COST * max(costs)


def _chance(groups: list[Group], question: Question) -> None:
    """Stores the accuracy of a model that always gives the same answer, and whether each group is better. With one
    guess that accuracy is the share of the commonest class; with more guesses it is that many times the mean share of a
    class."""
    guesses = QUALITIES[question.quality].guesses
    if not guesses:
        return
    for group in groups:
        row = group.runs[0].row
        if guesses == 1 and all(run.row.get("chance_pct") is not None for run in group.runs):
            group.chance_pct = mean_of(independent(group.values("chance_pct")))  # cuts differ in it
        elif choices := _choices(row):
            group.chance_pct = min(100.0, 100 * guesses / choices)
        else:
            continue  # of another program's run, which does not say it
        images = row.get("test_images") if "validation" not in question.quality else None
        group.at_chance = at_chance(independent(group.values(question.quality)), group.chance_pct, images)


def _choices(row: Row) -> int | None:
    """Among how many classes an answer is: of a mix those of the image's own set. None where that is not said, or sets
    differ in it, of which nobody says how many test images each has."""
    tasks = [row.get(f"data.sets.{name}.num_classes") for name in of_tasks(row, "top1_pct")]
    numbers = set(tasks or [row.get("classes")])
    return numbers.pop() if len(numbers) == 1 else None


def _start_notes(groups: list[Group]) -> list[str]:
    """A note for each group that began with a checkpoint: what the checkpoint had cost."""
    notes = []
    for group in groups:
        if group.pretrained:
            cost = group.checkpoint_pflop
            counted = (
                "counted in all its training FLOPs"
                if group.source_counted
                else "counted where two groups' training FLOPs are set against each other, and nowhere else "
                "(--with-source counts it everywhere)"
            )
            notes.append(
                f"{group.label} began with a checkpoint whose cost is not known: its pretraining is not counted"
                if cost is None
                else f"{group.label} began with a checkpoint that had cost {quantity('train_pflop', cost)}: {counted}"
            )
    return notes


def _budgets(groups: list[Group], question: Question, notes: list[str]) -> None:
    """Validation quality of every run at common budgets; a group's cell is filled only if all its runs reach it."""
    key = QUALITIES[question.quality].curve
    for axis, given in question.budgets:
        curves = {id(run): run.curve(axis, key) for group in groups for run in group.runs}
        wanted = given or budgets([curve for curve in curves.values() if curve])
        if not wanted:
            notes.append(f"no common {axis}: no part of it is covered by every run's curve")
        there = {each.budget for each in groups[0].budgets if each.axis == axis}  # each is one comparison
        for budget in [each for each in dict.fromkeys(wanted) if each not in there]:
            for group in groups:
                reached = [(run.draw, at_budget(curves[id(run)], budget)) for run in group.runs]
                values = [(draw, value) for draw, value in reached if value is not None]
                reason = ""
                if len(values) < len(reached):
                    reason = _unreached([curves[id(run)] for run in group.runs], axis, budget)
                interval = None if reason else mean_interval(independent(values))
                group.budgets.append(Budgeted(axis, budget, values, interval, reason))


def _unreached(curves: list[list[tuple[float, float]]], axis: str, budget: float) -> str:
    if not all(curves):
        return "no curve"
    early = sum(curve[-1][0] < budget for curve in curves)
    if early:
        first = min(curve[-1][0] for curve in curves)
        return f"{early} of {len(curves)} end before, the first at {quantity(axis, first)}"
    return f"first look at {quantity(axis, max(curve[0][0] for curve in curves))}"


def said(value: Any) -> str:
    """A value as people type it: null, true, 0.001, [1,3]."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return str(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, separators=(",", ":")) if not isinstance(value, str) else value


def key_named(option: str, key: str, keys: Iterable[str]) -> str:
    """A key of the rows by its name or by the unique end of its name."""
    keys = list(keys)
    if key in keys:
        return key
    ends = [each for each in keys if each.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0]
    hint = f" It could be {' or '.join(ends)}." if ends else nearest(key, keys) or _by_leaf(key, keys)
    raise UsageError(f"--{option} {key}: no run's result has such a key.{hint}")


def _by_leaf(key: str, keys: list[str]) -> str:
    leaves = {each.rpartition(".")[2]: each for each in keys}
    close = nearest(key.rpartition(".")[2], leaves)
    return next((f" Did you mean '{full}'?" for leaf, full in leaves.items() if close.endswith(f" '{leaf}'?")), "")


def natural(label: str) -> tuple[Any, ...]:
    """A key for sorting with which 2 experts come before 16 experts."""
    parts = re.split(r"(\d+(?:\.\d+)?)", label)
    return tuple((part, 0.0) if i % 2 == 0 else ("", float(part)) for i, part in enumerate(parts)), label


def setting(group: Group, key: str) -> str:
    """A setting that --columns names, as a cell: the value that all runs of the group have."""
    values = {said(run.row.get(key)) for run in group.runs}
    return values.pop() if len(values) == 1 else "mixed"
