"""Quality of a checkpoint that knows several tasks: of each, and both means over them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import EvaluateConfig
from softmoe_cli.data import sets
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.quality import Outcomes, by_task, qualities, together
from softmoe_cli.terminal import Screen


def require_one_task(config: EvaluateConfig, tasks: dict[str, int]) -> None:
    """Raises UsageError where something is asked for that is of the classes of one task."""
    asks = {
        "predictions": config.predictions, "confusion": config.confusion, "real": config.real, "audit": config.audit,
        "fewshot": config.fewshot, "soup=greedy": config.soup == "greedy",
    }  # fmt: skip
    asked = next((key for key, value in asks.items() if value), None)
    if asked is not None:
        raise UsageError(f"{asked} is about one task, and the checkpoint knows {', '.join(tasks)}; add task=NAME")


def each_task(
    config: EvaluateConfig, known: Sequence[str], said: Callable[[int, ImageSet], Outcomes]
) -> tuple[dict[str, Any], dict[str, Outcomes]]:
    """The row of the checkpoint's own mix, each set among its own classes, which are of the `known` ones. `said` gives
    the outcomes of a task by its number on the images of its set.

    Raises:
        UsageError: a set cannot be read, or has other classes than the checkpoint knows.
    """
    start = time.perf_counter()
    found: dict[str, Outcomes] = {}
    for task, own in enumerate(config.data.of_sets()):
        splits = sets.load_of_task(own, known)
        found[own.name] = said(task, getattr(splits, config.split))
    whole = dict(qualities(together(list(found.values()))))
    tasks = [{"task": name} | dict(qualities(each)) for name, each in found.items()]
    row = {"tasks": tasks, **whole, **by_task(found)}
    row["images"] = row.pop("images_evaluated")
    return row | {"eval_s": time.perf_counter() - start}, found


def show_tasks(row: dict[str, Any], form: str) -> None:
    """Prints the row as a table or as JSON."""
    if form == "json":
        programs.reply(row)
        return
    shown: dict[str, str] = {key: str(row[key]) for key in ("checkpoint", "soup", "data", "split") if key in row}
    if isinstance(row["checkpoint"], list):
        shown["checkpoint"] = f"the average of {len(row['checkpoint'])}: {', '.join(row['checkpoint'])}"
    for each in row["tasks"]:
        shown[each["task"]] = _figures(each) + f", {each['images_evaluated']:,} images"
    means = {"top1_pct": row["mean_over_tasks_top1_pct"], "nll": row["mean_over_tasks_nll"]}
    shown["mean over tasks"] = f"{means['top1_pct']:.2f}% top-1, NLL {means['nll']:.4f}; each task counts once"
    shown["mean over images"] = _figures(row) + f", {row['images']:,} images"
    shown |= {"seconds": f"{row['eval_s']:.4f}", "hardware": row["hardware"]}
    Screen().table("evaluate", shown)


def _figures(row: dict[str, Any]) -> str:
    return (
        f"{row['top1_pct']:.2f}% top-1, {row['top5_pct']:.2f}% top-5, loss {row['loss']:.4f}, NLL {row['nll']:.4f}, "
        f"calibration {row['ece_pct']:.2f}%"
    )
