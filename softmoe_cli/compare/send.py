"""A comparison on Weights & Biases: a run of the study's group with the verdict table, every figure and the page."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.findings import findings
from softmoe_cli.compare.flat import flat_rows
from softmoe_cli.compare.groups import Block, Comparison, Group
from softmoe_cli.compare.intervals import EQUAL, FEW, OPEN
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.written import write_comparison
from softmoe_cli.errors import UsageError
from softmoe_cli.run.mirror import publish, tracking_of


def tracking_mode() -> str:
    """online or offline, as `tracking=auto` would be."""
    mode = tracking_of("auto")
    if mode == "off":
        raise UsageError(f"--wandb has no effect with WANDB_MODE={os.environ.get('WANDB_MODE')}; unset one of them")
    return mode


def send_look(
    folders: Sequence[Path],
    question: Question,
    out: Path,
    mode: str,
    say: Callable[[str], None],
    *,
    project: str | None = None,
    look: int | None = None,
) -> Comparison:
    """Compares the runs below the folders as they are now, writes the files into `out` and sends them. For whoever adds
    seeds between looks: calls with one question are one W&B run, whose charts have the numbers of `look` after `look`,
    and whose tables and page are the last one's. Records no look.

    Raises:
        UsageError: nothing to compare, or the folder cannot be written.
    """
    comparison = compare(folders, question)
    send(comparison, question, write_comparison(comparison, out), out, mode, say, project=project, look=look)
    return comparison


def send(
    comparison: Comparison,
    question: Question,
    files: Sequence[str],
    out: Path,
    mode: str,
    say: Callable[[str], None],
    *,
    project: str | None = None,
    look: int | None = None,
) -> None:
    """Sends what was written into `out`; `mode` is online, offline or off."""
    if mode == "off":
        return
    axes = (f"{comparison.cost}_mean", f"{comparison.quality}_mean")
    told = [each for block in comparison.blocks for each in findings(comparison, block)]
    settings = wandb_run(comparison, question, project) | {"notes": "\n\n".join(told)}
    publish(
        mode, settings, out, flat_rows(comparison), axes, list(files), say,
        beside={"verdicts": verdict_rows(comparison)}, numbers=numbers(comparison), step=look,
    )  # fmt: skip


def wandb_run(comparison: Comparison, question: Question, project: str | None) -> dict[str, Any]:
    """Arguments of wandb.init. The id depends on studies and question only: the same question, asked again with more
    seeds, updates the same W&B run."""
    studies = sorted({str(run.row.get("study")) for group in comparison.groups for run in group.runs})
    asked = dataclasses.asdict(question)
    del asked["typed"]
    mark = hashlib.sha256(json.dumps([studies, asked], sort_keys=True).encode()).hexdigest()[:10]
    return {
        "id": f"compare-{mark}",
        "project": project or "softmoe",
        "group": "+".join(studies),
        "job_type": "compare",
        "name": f"compare {comparison.quality} by {comparison.cost}",
        "config": asked | {"signatures": [run.row["signature"] for g in comparison.groups for run in g.runs]},
    }


def verdict_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """What a reader asks first: a row for each group, the baselines too."""
    return [
        {"table": block.title, "group": group.label, "n": len(group.runs), **_verdict(comparison, block, group)}
        for block in comparison.blocks
        for group in block.groups
    ]


def _verdict(comparison: Comparison, block: Block, group: Group) -> dict[str, Any]:
    quality, found = group.intervals[comparison.quality], group.difference
    interval = found.interval if found else None
    baselines = {each.baseline for each in block.groups}
    return {
        comparison.quality: quality.mean if quality else None,
        "verdict": group.verdict or ("baseline" if group.label in baselines else ""),
        "beside it": ", ".join([*group.conditions, *(["at chance"] if group.at_chance else [])]),
        "baseline": group.baseline,
        "difference": interval.mean if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        f"{found.unit}s" if found else "seeds": interval.n if interval else None,
        "p": group.p_equal_holm if group.verdict == EQUAL else group.p_holm,
        "cost ratio": group.cost_ratio,
    }


def numbers(comparison: Comparison) -> dict[str, float]:
    """What changes from look to look: how many verdicts are open, and each difference with the ends of its interval;
    with the title of its table where there are several, which may have groups of one name."""
    found = [(block, group, group.difference.interval)
             for block in comparison.blocks for group in block.groups if group.difference]  # fmt: skip
    told: dict[str, float] = {"open": sum(group.verdict in (OPEN, FEW) for _, group, _ in found)}
    told["comparisons"] = len(found)
    for block, group, interval in found:
        label = f"{block.title}: {group.label}" if len(comparison.blocks) > 1 else group.label
        ends = {"difference": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
        told |= {f"{name}/{label}": value for name, value in ends.items() if value is not None}
    return told
