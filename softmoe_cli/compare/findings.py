"""A comparison in sentences: which groups are on the front, the verdicts, and what the table could have seen."""

from softmoe_cli.compare.checklist import checklist
from softmoe_cli.compare.groups import Block, Budgeted, Comparison, Group
from softmoe_cli.compare.intervals import BETTER, EQUAL, LESS, OPEN, WORSE, Difference
from softmoe_cli.compare.power import MOST_SEEDS, POWER, Needed
from softmoe_cli.compare.units import cell, chance_cell, difference_cell, ends, figure, measure_name, points, quantity
from softmoe_cli.run.rows import AXES, COSTS, CURVES, QUALITIES
from softmoe_cli.text import several

MOST_SENTENCES = 4
VERDICTS = {
    BETTER: "is better than",
    WORSE: "is worse than",
    EQUAL: "is equal, within the margin, to",
    OPEN: "cannot be told from",
    BETTER + LESS: "is better, by less than the margin, than",
    WORSE + LESS: "is worse, by less than the margin, than",
}


def pretraining(group: Group, cost: str) -> list[str]:
    """A note on whether the training of a group's checkpoint is in its costs; nothing where there is no checkpoint."""
    if not group.pretrained or not COSTS[cost].trained:
        return []
    return [f"pretraining {'' if _counted(group, cost) else 'not '}counted"]


def _counted(group: Group, cost: str) -> bool:
    return group.source_counted and cost == "train_pflop"


def provisos(group: Group, cost: str) -> list[str]:
    """What a reader must know about a group that is on the front."""
    return [*(["at chance"] if group.at_chance else []), *pretraining(group, cost)]


def front(comparison: Comparison, block: Block) -> str:
    """The groups on the front, cheapest first."""
    names = []
    there = [group for group in block.groups if group.front]
    for group in sorted(there, key=lambda group: mean(group, comparison.cost)):
        chance = [] if group.front_probability is None else [f"{100 * group.front_probability:.0f}%"]
        words = [*chance, *provisos(group, comparison.cost)]
        names.append(group.label + (f" ({', '.join(words)})" if words else ""))
    if not names:
        return f"There is no front: no group states its {COSTS[comparison.cost].amount}"
    return f"On the front, by {COSTS[comparison.cost].amount}: {'; '.join(names)}"


def mean(group: Group, key: str) -> float:
    interval = group.intervals[key]
    return 0.0 if interval is None else interval.mean


def headline(comparison: Comparison, block: Block) -> list[str]:
    """For a few groups, each against its baseline; for many groups, how many got each verdict, and the best group."""
    quality = comparison.quality
    judged = [group for group in block.groups if group.difference]
    if not judged:
        if len(block.groups) > 1:
            return ["Nothing is measured against a baseline, and so there is no verdict."]
        (only,) = block.groups
        name, _, percent = QUALITIES[quality].title.partition(", ")
        words = [f"{cell(quality, only.intervals[quality])}{percent}", *provisos(only, comparison.cost)]
        return [f"{only.label} reached a {name} of {', '.join(words)}."]
    sentences = {group.label: _sentence(quality, group) for group in judged}
    if len(judged) <= MOST_SENTENCES:
        return list(sentences.values())
    kinds = [group.verdict for group in judged]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    best = (max if QUALITIES[quality].better == "higher" else min)(block.groups, key=lambda group: mean(group, quality))
    best_sentence = sentences.get(best.label, f"{best.label}, with {cell(quality, best.intervals[quality])}.")
    return [
        f"{len(judged)} groups are measured against a baseline: {', '.join(counts)}.",
        f"The best mean: {best_sentence}",
    ]


def _sentence(quality: str, group: Group) -> str:
    """soft is better than dense in test top-1: +2.96 ± 0.79 points (p = 0.004, 3 seeds); at 16% more training FLOPs; it
    is the better one with 98% (64% to >99%) of seeds."""
    found = group.difference
    assert found is not None
    name = measure_name(quality)
    verdict = VERDICTS.get(group.verdict or "", "has too few seeds for a verdict against")
    tested = group.p_equal_holm if group.verdict == EQUAL else group.p_holm
    p = "" if tested is None else f"p = {tested:.2g}, "
    seeds = several(found.interval.n, found.unit)
    beside = [*group.conditions, *(["itself at chance"] if group.at_chance else [])]
    won = f"; it is the better one with {chance_cell(group.p_better)} of {found.unit}s" if group.p_better else ""
    sentence = f"{group.label} {verdict} {group.baseline} in {name}: {difference_cell(quality, found)}{points(quality)}"
    return f"{sentence} ({p}{seeds}){'; ' if beside else ''}{', '.join(beside)}{won}."


def best(block: Block) -> str:
    """The groups that may be the best; empty where none could be ruled out by a test."""
    kept = [group.label for group in block.groups if group.may_be_best]
    if not kept:
        return ""
    if len(kept) == 1:
        return f"{kept[0]} is the best of {several(len(block.groups), 'group')} (95%)"
    if len(kept) == len(block.groups):
        return "Which group is the best cannot be told: none can be ruled out (95%)"
    return f"Which is the best cannot be told among {len(kept)} of {len(block.groups)} (95%): {'; '.join(kept)}"


def power_line(comparison: Comparison, block: Block) -> str:
    """What the table could have seen, and how many seeds would settle what; empty where no deviation is known."""
    seen = block.outlook
    if seen is None:
        return ""
    key = comparison.quality
    unit = points(key)

    def size(value: float) -> str:
        return f"{figure(key, value)}{unit}"

    rule = "by the any-time rule, " if seen.anytime else ""
    family = f", first step of Holm over {seen.comparisons}" if seen.comparisons > 1 else ""
    spread = (
        f"one {seen.unit}'s difference has a deviation of {size(seen.deviation.mean)}, 95% {ends(key, seen.deviation)}"
    )
    sees = "no difference at all" if seen.sees is None else f"differences of {size(seen.sees)} or more"
    n = f"n = {seen.n}" if seen.unit == "seed" else several(seen.n, seen.unit)
    told = [f"With {n} this table sees {sees} ({rule}{POWER:.0%}{family}; {spread})"]
    if seen.later_sees is not None:
        told.append(f"{seen.later_n} {seen.unit}s would see {size(seen.later_sees)}")
    if seen.needed:
        shown = list(seen.needed.items())[:MOST_SENTENCES]
        each = [f"{label} needs {_seeds(needed, seen.unit)}" for label, needed in shown]
        rest = len(seen.needed) - len(shown)
        more = f" ({rest} more in table.csv)" if rest else ""
        told.append(f"at the difference found, {', '.join(each)}{more}")
    if comparison.margin is not None:
        number = f"more than {MOST_SEEDS:,}" if seen.equal_n is None else f"about {seen.equal_n:,}"
        told.append(
            f"groups without a difference need {number} {seen.unit}s to be equal within {size(comparison.margin)}"
        )
    return "; ".join(told)


def _seeds(needed: Needed, unit: str) -> str:
    """about 14 seeds (5 or more)"""
    number = f"more than {MOST_SEEDS:,} {unit}s" if needed.seeds is None else f"about {several(needed.seeds, unit)}"
    if needed.fewest is None:
        return number
    return f"{number} ({needed.fewest:,} {'or more' if needed.most is None else f'to {needed.most:,}'})"


def closing(comparison: Comparison, block: Block) -> str:
    """The one sentence that the question was asked for: the best group against its baseline at equal cost. At the end
    of training if the two had cost the same, else at the largest budget that both reached."""
    judged = [group for group in block.groups if group.difference]
    if not judged:
        return ""
    key, amount = comparison.quality, COSTS[comparison.cost].amount
    sign = 1 if QUALITIES[key].better == "higher" else -1
    equal = [group for group in judged if group.cost_ratio is not None and round(100 * abs(group.cost_ratio - 1)) == 0]
    if equal:
        group = max(equal, key=lambda group: sign * mean(group, key))
        assert group.difference is not None
        count = group.runs[0].row.get("test_images")
        images = "test images" if count is None else f"{count:,} test images"
        images = _validation_images(group) if "validation" in key else images
        told = _settled(comparison, group, group.difference, group.verdict, measure_name(key), images)
        uncounted = ", pretraining not counted" if "pretraining not counted" in group.conditions else ""
        return f"At equal {amount} {told}{uncounted}."
    axis = comparison.cost if comparison.cost in AXES else AXES[0]
    places = [
        (each.budget, sign * each.interval.mean, group, each)
        for group in judged
        for each in group.budgets
        if each.axis == axis and each.difference and each.interval
    ]
    if not places:
        return f"Nothing was compared at equal {COSTS[axis].amount}: --at names budgets that all runs reach."
    largest = max(budget for budget, *_ in places)
    _, _, group, each = max((place for place in places if place[0] == largest), key=lambda place: place[1])
    return _at_budget(comparison, group, each)


def _at_budget(comparison: Comparison, group: Group, each: Budgeted) -> str:
    assert each.difference is not None
    name = CURVES[QUALITIES[comparison.quality].curve].title.removesuffix(", %")
    at = f"At equal {COSTS[each.axis].amount} ({quantity(each.axis, each.budget)})"
    told = _settled(comparison, group, each.difference, each.verdict, name, _validation_images(group))
    return f"{at} {told}{''.join(f', {word}' for word in pretraining(group, each.axis))}."


def _validation_images(group: Group) -> str:
    counts = {look.get("images_evaluated") for run in group.runs for look in run.looks[-1:]}
    return f"{counts.pop():,} validation images" if len(counts) == 1 and None not in counts else "validation images"


def _settled(
    comparison: Comparison, group: Group, found: Difference, verdict: str | None, name: str, images: str
) -> str:
    """soft is 1.20 points better than dense in test top-1 (0.40 to 2.00, 9 seeds, any-time 95%, 1,800 test images)"""
    key = comparison.quality
    size = f"{figure(key, abs(found.interval.mean))}{points(key)}"
    within = "" if comparison.margin is None else f"{figure(key, comparison.margin)}{points(key)}"
    words = {
        BETTER: f"is {size} better than {group.baseline}",
        WORSE: f"is {size} worse than {group.baseline}",
        BETTER + LESS: f"is {size} better than {group.baseline}, less than the margin of {within},",
        WORSE + LESS: f"is {size} worse than {group.baseline}, less than the margin of {within},",
        EQUAL: f"is equal to {group.baseline} within {within}",
        OPEN: f"cannot be told from {group.baseline}{_corrected(found)}",
    }
    told = words.get(verdict or "", f"has too few seeds for a verdict against {group.baseline}")
    level = "any-time 95%" if found.method == "any-time" else "95%"
    limits = [ends(key, found.interval)] if ends(key, found.interval) else []
    chance = [f"{word} at chance" for word, there in (("itself", group.at_chance),
              ("its baseline", "its baseline is at chance" in group.conditions)) if there]  # fmt: skip
    beside = [*limits, several(found.interval.n, found.unit), *([level] if limits else []), images, *chance]
    return f"{group.label} {told} in {name} ({', '.join(beside)})"


def _corrected(found: Difference) -> str:
    """Why there is no verdict where the interval alone would give one."""
    low, high = found.interval.low, found.interval.high
    return ", all comparisons counted," if low is not None and high is not None and low * high > 0 else ""


def sentences(comparison: Comparison, block: Block) -> list[str]:
    """What a table says in all: which groups may be the best, what it could have seen, and the paragraph for a paper's
    checklist."""
    told = [best(block), power_line(comparison, block)]
    return [f"{each}." for each in told if each] + [f"Checklist. {checklist(comparison, block)}"]


def findings(comparison: Comparison, block: Block) -> list[str]:
    """Sentences for files that have no headline: each table's, with its title where there are several."""
    told = [*headline(comparison, block), *sentences(comparison, block), closing(comparison, block)]
    return [f"{block.title}: {each}" if len(comparison.blocks) > 1 else each for each in told if each]
