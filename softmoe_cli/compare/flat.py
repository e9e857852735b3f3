"""A comparison for programs, with every digit: CSV with a row for each group, JSON with every run."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from softmoe_cli.compare.cuts import Spread
from softmoe_cli.compare.findings import findings
from softmoe_cli.compare.groups import Block, Comparison, Group, Second, setting
from softmoe_cli.compare.intervals import Interval
from softmoe_cli.compare.runs import said_seed
from softmoe_cli.compare.verdicts import TASK_MEASURE
from softmoe_cli.run.rows import QUALITIES, TASK_QUALITY
from softmoe_cli.text import spreadsheet_cell


def flat_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row per group with every digit: what table.csv holds."""
    return [_flat(comparison, block, group) for block in comparison.blocks for group in block.groups]


def _flat(comparison: Comparison, block: Block, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"block": block.title, "group": group.label, "n": len(group.runs)}
    row["seeds"] = " ".join(said_seed(run) for run in group.runs)
    row["cuts"] = " ".join(str(run.draw[0]) for run in group.runs)
    for key, interval in group.intervals.items():
        row |= _ends(key, interval)
    row |= {key: setting(group, key) for key in comparison.columns if key not in group.intervals}
    row["baseline"] = group.baseline
    row |= _ends("difference", group.difference.interval if group.difference else None)
    row |= {
        "method": group.difference.method if group.difference else None,
        "p": group.difference.p if group.difference else None,
        "p_holm": group.p_holm,
        "p_equal_holm": group.p_equal_holm,
        "verdict": group.verdict,
        **_chance("p_better", group.p_better),
        "may_be_best": group.may_be_best,
        "cost_ratio": group.cost_ratio,
        "conditions": "; ".join(group.conditions),
        "chance_pct": group.chance_pct,
        "at_chance": group.at_chance,
        "pretrained": group.pretrained,
        "source_counted": group.source_counted,
        "checkpoint_train_pflop": group.checkpoint_pflop,
        "on_front": group.front,
        "front_probability": group.front_probability,
    }
    row |= _flat_spread("", group.spread) | _flat_spread("difference_", group.difference_spread)
    row |= _flat_outlook(block, group) | _flat_reached(group)
    if group.second:
        row |= _flat_beside(comparison.second, group.second, shown=comparison.second in group.intervals)
    for name, own in group.tasks.items():
        row |= _flat_beside(TASK_QUALITY.format(name, TASK_MEASURE), own, shown=False)
    for each in group.budgets:
        name = f"{QUALITIES[comparison.quality].curve}_at_{each.axis}_{each.budget!r}"
        row |= _ends(name, each.interval)
        row |= _ends(f"{name}_difference", each.difference.interval if each.difference else None)
        row[f"{name}_verdict"] = each.verdict
    return row


def _flat_spread(name: str, told: Spread | None) -> dict[str, Any]:
    if told is None:
        return {}
    return {
        f"{name}cut_deviation": told.between,
        f"{name}seed_deviation": told.within,
        f"{name}half_for_new_images": told.new_images_half,
    }


def _flat_outlook(block: Block, group: Group) -> dict[str, Any]:
    """What the table could have seen is the same in all rows of a table."""
    seen = block.outlook
    needed = seen.needed.get(group.label) if seen else None
    return {
        "sees": seen.sees if seen else None,
        "deviation": seen.deviation.mean if seen else None,
        "seeds_needed": needed.seeds if needed else None,
        "seeds_needed_fewest": needed.fewest if needed else None,
        "seeds_needed_most": needed.most if needed else None,
    }


def _flat_reached(group: Group) -> dict[str, Any]:
    told = group.reached
    if told is None:
        return {}
    row: dict[str, Any] = {"reached": told.reached, f"reached_at_{told.axis}": told.cost}
    return (
        row
        | _chance("times_cheaper", told.ratio)
        | {"times_cheaper_below": told.below, "times_cheaper_above": told.above}
    )


def _flat_beside(key: str, told: Second, *, shown: bool) -> dict[str, Any]:
    """A measure beside the main one; `shown`: its mean is in the row already."""
    row = {} if shown else _ends(key, told.interval)
    row |= _ends(f"{key}_difference", told.difference.interval if told.difference else None)
    verdict = {f"{key}_p_holm": told.p_holm, f"{key}_verdict": told.verdict}
    return row | verdict | _chance(f"{key}_p_better", told.p_better)


def _chance(key: str, interval: Interval | None) -> dict[str, float | None]:
    return {key if name.endswith("_mean") else name: value for name, value in _ends(key, interval).items()}


def _ends(key: str, interval: Interval | None) -> dict[str, float | None]:
    names = (f"{key}_mean", f"{key}_ci95_low", f"{key}_ci95_high")
    values = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip(names, values, strict=True))


def comma_separated(comparison: Comparison) -> str:
    return csv_of(flat_rows(comparison))


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers with all their digits: reading them back gives the same ones."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: spreadsheet_cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def everything(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison, with every run's own figures, as JSON holds it."""
    return {
        "quality": comparison.quality,
        "second": comparison.second,
        "margin": comparison.margin,
        "to_quality": comparison.to_quality,
        "cost": comparison.cost,
        "blocks": [
            {
                "title": block.title,
                "notes": block.notes,
                "outlook": asdict(block.outlook) if block.outlook else None,
                "sentences": findings(comparison, block),
                "groups": [_group(comparison, group) for group in block.groups],
            }
            for block in comparison.blocks
        ],
        "notes": comparison.notes,
        "commands": comparison.commands,
        "left_out": [{"folder": folder, "reason": reason} for folder, reason in comparison.left_out],
        "reference": comparison.reference,
    }


def _group(comparison: Comparison, group: Group) -> dict[str, Any]:
    plain = {"figures" if key == "intervals" else key: value for key, value in vars(group).items() if key != "runs"}
    plain["figures"] = {key: asdict(each) if each else None for key, each in group.intervals.items()}
    plain |= {"pretrained": group.pretrained, "source_counted": group.source_counted}
    plain |= {"checkpoint_train_pflop": group.checkpoint_pflop}
    plain["difference"] = asdict(group.difference) if group.difference else None
    plain["p_better"] = asdict(group.p_better) if group.p_better else None
    plain["second"] = asdict(group.second) if group.second else None
    plain["tasks"] = {name: asdict(own) for name, own in group.tasks.items()}
    for key in ("spread", "difference_spread"):
        plain[key] = asdict(vars(group)[key]) if vars(group)[key] else None
    plain["reached"] = asdict(group.reached) if group.reached else None
    plain["budgets"] = [asdict(each) for each in group.budgets]
    keys = ("name", "signature", "seed", *dict.fromkeys([comparison.quality, comparison.cost, *comparison.columns]))
    plain["runs"] = [{"folder": run.place} | {key: run.row.get(key) for key in keys} for run in group.runs]
    return plain


def json_text(comparison: Comparison) -> str:
    return json.dumps(everything(comparison), indent=1, allow_nan=False) + "\n"
