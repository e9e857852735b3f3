"""A comparison in sentences: which groups are on the front, and the verdicts."""

from softmoe_cli.compare.groups import Block, Comparison, Group
from softmoe_cli.compare.units import cell
from softmoe_cli.run.rows import COSTS, QUALITIES
from softmoe_cli.text import several

MOST_SENTENCES = 4
VERDICTS = {"better": "is better than", "worse": "is worse than", "not distinguishable": "cannot be told from"}


def pretraining(group: Group, cost: str) -> list[str]:
    """A note that the training of a group's checkpoint is in none of its costs."""
    return ["pretraining not counted"] if group.pretrained and COSTS[cost].trained else []


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
    """soft is better than dense in test top-1: +2.96 ± 0.79 points (p = 0.004, 3 seeds); at 16% more training FLOPs."""
    assert group.difference is not None
    interval, name = group.difference.interval, QUALITIES[quality].title.removesuffix(", %")
    verdict = VERDICTS.get(group.verdict or "", "has too few seeds for a verdict against")
    points = " points" if quality.endswith("_pct") else ""
    p = "" if group.p_holm is None else f"p = {group.p_holm:.2g}, "
    seeds = several(interval.n, "seed")
    beside = [*group.conditions, *(["itself at chance"] if group.at_chance else [])]
    apart = f"{cell(quality, interval, signed=True)}{points}"
    sentence = f"{group.label} {verdict} {group.baseline} in {name}: {apart} ({p}{seeds})"
    return f"{sentence}; {', '.join(beside)}." if beside else f"{sentence}."
