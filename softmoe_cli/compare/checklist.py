"""The paragraph that papers' checklists ask for: what varied, how many runs, which test and correction, and what all
runs have cost, those included that failed."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from softmoe_cli.compare.groups import Block, Comparison
from softmoe_cli.compare.runs import FinishedRun, unfinished
from softmoe_cli.compare.units import measure_name, quantity
from softmoe_cli.run.rows import COSTS, Row
from softmoe_cli.text import in_words, several

TESTS = {
    "paired": "paired by {}, Student's t",
    "Welch": "of unpaired {}s, Welch's t",
    "any-time": "paired by {}, e-values that hold at every look",
}
VARIED = (
    "the seed, which decides initial weights, the order of the images, augmentation and whatever else is random; the "
    "cut of the data and its {images}test images were always the same"
)
VARIED_CUTS = (
    "the seed, which decides initial weights, the order of the images, augmentation and whatever else is random; and "
    "the cut of the data into training, validation and {images}test images, of which there are {cuts}"
)
VARIED_OTHERS = "the seed, as far as the runs say it; they are other programs' and do not say what else varied"


def compute(finished: Sequence[FinishedRun], folders: Sequence[Path]) -> str:
    """What all runs below the folders have cost: finished ones by their results, others by the last row that they
    wrote."""
    others = [run for run in finished if run.chosen is not None]
    finished = [run for run in finished if run.chosen is None]
    if not finished:
        return f"{several(len(others), 'run')} that other programs made, of which {_stated(others)}"
    told = [f"{several(len(finished), 'finished run')} took {_spent([_cost(run.row) for run in finished])}"]
    failed = [_cost(row) for row in unfinished(folders)]
    if failed:
        told.append(f"{several(len(failed), 'run')} that failed or did not finish took {_spent(failed)} at least")
    if others:
        told.append(f"{several(len(others), 'run')} are other programs', of which {_stated(others)}")
    machines = Counter(str(run.row.get("hardware")) for run in finished)
    on = "; ".join(f"{count} on {name}" for name, count in sorted(machines.items()))
    return f"{', '.join(told)} (finished runs: {on})"


def _cost(row: Row) -> tuple[float, float]:
    """PFLOPs of training; seconds of devices."""
    seconds = [row.get(key) for key in ("device_s", "eval_s", "save_s", "compile_s")]
    return float(row.get("train_pflop") or 0.0), math.fsum(each for each in seconds if each)


def _stated(runs: Sequence[FinishedRun]) -> str:
    """What runs of other programs say that they have cost."""
    told = []
    for key in ("train_pflop", "device_s"):
        values = [run.row[key] for run in runs if run.row.get(key) is not None]
        if values:
            computed = " (computed)" if any(key in run.row.get("computed", ()) for run in runs) else ""
            total = math.fsum(values)
            amount = quantity(key, total) if key == "train_pflop" else in_words(total)
            told.append(f"{len(values)} tell {amount}{computed} of {COSTS[key].amount} in all")
    return " and ".join(told) or "none tells what it took"


def _spent(costs: Sequence[tuple[float, float]]) -> str:
    pflop, seconds = (math.fsum(each) for each in zip(*costs, strict=True))
    told = quantity("train_pflop", pflop) if pflop else "no training FLOPs"
    return f"{told} and {in_words(seconds)} of devices, evaluation and saving included"


def checklist(comparison: Comparison, block: Block) -> str:
    """One paragraph for one table."""
    runs = [run for group in block.groups for run in group.runs]
    counts = sorted({len(group.runs) for group in block.groups})
    seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    count = runs[0].row.get("test_images")
    images = "" if count is None else f"{count:,} "
    cuts = len({run.draw[0] for run in runs})
    unit, n = ("seed", "seed" if counts == [1] else "seeds") if cuts == 1 else ("cut", "runs")
    varied = VARIED if cuts == 1 else VARIED_CUTS
    if any(run.chosen is not None for run in runs):
        varied = VARIED_OTHERS
    parts = [
        f"Varied: {varied.format(images=images, cuts=cuts)}",
        f"n: {seeds} {n} for each group",
        f"error bars: half a 95% t-interval of the mean over {unit}s"
        + ("" if cuts == 1 else ", each the mean of its seeds"),
    ]
    judged = [group for group in block.groups if group.difference]
    if judged:
        kinds = sorted({(each.method, each.unit) for group in judged if (each := group.difference)})
        methods = sorted({method for method, _ in kinds})
        parts.append(
            f"test: differences from a baseline, {' or '.join(TESTS[m].format(u) for m, u in kinds)}, two-sided, 5%"
        )
        parts.append(f"main measure: {measure_name(comparison.quality)}")
        if comparison.margin is not None:
            how = "the same e-values" if methods == ["any-time"] else "two one-sided tests"
            parts.append(f"equality within {comparison.margin:g}: {how}, 5%")
        parts.append(f"correction: {_correction(comparison, block)}")
    return f"{'; '.join(parts)}; compute: {comparison.compute}."


def _correction(comparison: Comparison, block: Block) -> str:
    """Over how many comparisons each family was corrected: Holm over 2 in test top-1, over 6 in quality at budgets."""
    names = {"main": measure_name(comparison.quality), "second": measure_name(comparison.second),
             "budgets": "quality at budgets", "tasks": "test top-1 of each task"}  # fmt: skip
    told = {names[family]: count for family, count in block.corrected.items()}
    many = [f"over {count} comparisons in {name}" for name, count in told.items() if count > 1]
    few = [name for name, count in told.items() if count == 1]
    without = [name for name, count in told.items() if count == 0]
    parts = [f"Holm {', '.join(many)}, each apart"] if many else []
    parts += [f"none is needed in {' and '.join(few)}, one comparison each"] if few else []
    parts += [f"nothing was tested in {' and '.join(without)}"] if without else []
    return ", ".join(parts)
