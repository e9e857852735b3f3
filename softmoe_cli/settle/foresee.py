"""`softmoe settle --plan`: the arms and what one seed of them costs, and how many seeds and hours to expect."""

import math
from collections.abc import Mapping
from typing import Any

from softmoe_cli.compare.power import Outlook
from softmoe_cli.compare.units import figure, points
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.run.rows import QUALITIES
from softmoe_cli.settle.expect import EFFECTS, Expected, expectations
from softmoe_cli.settle.fair import Arms
from softmoe_cli.settle.rounds import Contest
from softmoe_cli.text import aligned, flop, in_words, several


def foreseen(contest: Contest, arms: Arms, asked: SettleConfig, seen: Outlook | None) -> dict[str, Any]:
    """The plan for programs. `seen`: what is known of the deviation from runs that are there already."""
    deviation = seen.deviation.mean if seen else None
    margins = list(EFFECTS) if contest.margin is not None else []
    if contest.margin is not None and deviation:
        margins = [contest.margin / deviation]
    found = expectations(len(contest.arms), contest.least, asked.max_seeds, margins)
    costs = [arm.job.cost for arm in arms.arms]
    seconds = math.fsum(cost["seconds"] for cost in costs)
    trials = asked.trials * asked.tune_seeds
    return {
        "quality": contest.quality,
        "margin": contest.margin,
        "baseline": contest.baseline,
        "first_look_at": contest.least,
        "max_seeds": asked.max_seeds,
        "deviation": deviation,
        "arms": [
            {"arm": arm.label, "words": arm.words, "train_pflop": _known(arm.job.cost["train_pflop"]),
             "seconds": _known(arm.job.cost["seconds"])} for arm in arms.arms
        ],
        "tuning": {"trials": trials * len(arms.arms), "hours": _known(trials * seconds / 3600)} if asked.tune else None,
        "expected": [_row(each, seconds, len(arms.slots), deviation) for each in found],
    }  # fmt: skip


def _row(each: Expected, seconds: float, slots: int, deviation: float | None) -> Mapping[str, Any]:
    return {
        "effect": each.effect,
        "margin": each.margin,
        "different": each.different,
        "equal": each.equal,
        "seeds": each.seeds,
        "hours": _known(each.seeds * seconds / 3600),
        "hours_here": _known(each.seeds * seconds / 3600 / slots),
        "difference": each.effect * deviation if deviation else None,
    }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def plan_text(plan: Mapping[str, Any]) -> str:
    """The plan for people."""
    key = plan["quality"]
    rows = [["arm", "training", "time of a seed"]]
    for arm in plan["arms"]:
        pflop, seconds = arm["train_pflop"], arm["seconds"]
        base = " (baseline)" if arm["arm"] == plan["baseline"] else ""
        rows.append([arm["arm"] + base, "unknown" if pflop is None else flop(1e15 * pflop), _time(seconds)])
    table = [["if the difference is", "decided", "seeds", "hours", "hours here"]]
    for each in plan["expected"]:
        true = (
            f"{each['effect']:g} deviations" if each["margin"] is None else f"0, margin {each['margin']:.3g} deviations"
        )
        decided = f"{100 * (each['different'] + each['equal']):.0f}%"
        times = ["unknown" if each[name] is None else in_words(3600 * each[name]) for name in ("hours", "hours_here")]
        table.append([true, decided, f"{each['seeds']:.1f}", *times])
    margin = "no margin, so that equal arms stay open" if plan["margin"] is None else (
        f"margin {figure(key, plan['margin'])}{points(key)}")  # fmt: skip
    spread = "not known before the first runs" if plan["deviation"] is None else (
        f"{figure(key, plan['deviation'])}{points(key)} in the runs so far")  # fmt: skip
    tuning = ""
    if plan["tuning"]:
        time = plan["tuning"]["hours"]
        tuning = f"\ntuning before the first seed: {several(plan['tuning']['trials'], 'run')}, " + (
            "time unknown" if time is None else in_words(3600 * time))  # fmt: skip
    return (
        f"{aligned(rows, markdown=False)}\n\n"
        f"main measure: {QUALITIES[key].title}; {margin}; first look at {plan['first_look_at']} seeds, at most "
        f"{plan['max_seeds']}{tuning}\n\n{aligned(table, markdown=False)}\n\n"
        f"one deviation of a seed's difference is {spread}; seeds of each arm, mean of simulated studies, for an arm "
        "that is decided first; hours of all arms and the baseline, with no arm decided earlier"
    )


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else in_words(seconds)
