"""Runs of timm's train.py: summary.csv with a row for each epoch, and args.yaml beside it."""

from pathlib import Path
from typing import Any

import yaml

from softmoe_cli.compare.others.mapping import EVAL
from softmoe_cli.compare.others.tables import csv_lines
from softmoe_cli.compare.others.told import SUMMARY, Cells, Damaged, Told, flat, last_values, typed_value
from softmoe_cli.errors import first_line
from softmoe_cli.run import rows
from softmoe_cli.run.budget import DEEPEST

ARGS = "args.yaml"
TIMM_NAMES = EVAL | {
    "validation_top1_pct": "eval_top1", "loss": "eval_loss", "validation_loss": "eval_loss",
    "best_validation_top1_pct": "best_eval_top1", "seed": "seed", "epochs": "epochs_done", "data": "dataset",
    "classes": "num_classes",
}  # fmt: skip
WHERE_IT_RAN = (
    "output", "experiment", "log_", "wandb", "workers", "pin_mem", "device", "resume", "recovery_interval",
    "checkpoint_hist", "data_dir", "local_rank", "save_images", "no_prefetcher", "use_multi_epochs_loader", "dist_",
    "synchronize_step", "distributed", "world_size", "rank", "prefetcher", "eval_metric", "dataset_download",
    "dataset_trust_remote_code",
)  # fmt: skip
"""Beginnings of arguments that say where a run ran and what it wrote, and not what it computed."""


def read_timm(folder: Path) -> Told:
    """The run of a folder.

    Raises:
        Damaged: a file is missing, cut short or no such file.
    """
    try:
        text = rows.contents(folder / SUMMARY).decode()
        arguments = rows.contents(folder / ARGS)
    except FileNotFoundError as error:
        raise Damaged(f"has no {Path(error.filename).name}") from error
    except (rows.Unreadable, UnicodeDecodeError) as error:
        raise Damaged(f"has a damaged {SUMMARY} or {ARGS}: it {error}") from error
    history = _epochs(text)
    settings = {key: value for key, value in _arguments(arguments).items() if not key.startswith(WHERE_IT_RAN)}
    best = [row["eval_top1"] for row in history if isinstance(row.get("eval_top1"), int | float)]
    summary = last_values(history) | {"epochs_done": history[-1]["epoch"] + 1}
    summary |= {"best_eval_top1": max(best)} if best else {}
    return Told(folder, "timm", settings, summary, history, (folder / SUMMARY).stat().st_mtime, "", TIMM_NAMES)


def _epochs(text: str) -> list[Cells]:
    head, lines = csv_lines(text, f"{SUMMARY} ")
    if "epoch" not in head:
        raise Damaged(f"{SUMMARY} has no column epoch")
    if not lines:
        raise Damaged(f"{SUMMARY} has no epoch yet")
    found: list[Cells] = []
    for number, cells in lines:
        if len(cells) != len(head):
            raise Damaged(f"{SUMMARY} is cut short: line {number} has {len(cells)} values under {len(head)} names")
        row = dict(zip(head, map(typed_value, cells), strict=True))
        if type(row["epoch"]) is not int or row["epoch"] < 0:
            raise Damaged(f"{SUMMARY} is damaged: epoch is no number in line {number}")
        words = next((name for name, value in row.items() if not isinstance(value, int | float)), None)
        if words is not None:
            raise Damaged(f"{SUMMARY} is damaged: {words} is no number in line {number}")
        if found and row["epoch"] <= found[-1]["epoch"]:
            raise Damaged(f"{SUMMARY} goes back to epoch {row['epoch']} in line {number}")
        found.append(row)
    if not text.endswith("\n"):
        raise Damaged(f"{SUMMARY} is cut short: its last line has no end")
    return found


def _arguments(text: bytes) -> Cells:
    """What args.yaml says, by a loader that makes nothing but numbers, words, lists and mappings."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # libyaml's composer ends the process at great depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise Damaged(f"{ARGS} is nested too deeply")
        tree: Any = yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{ARGS} is no YAML of plain values ({first_line(error)})") from error
    if not isinstance(tree, dict) or not tree:
        raise Damaged(f"{ARGS} has no arguments" if tree else f"{ARGS} is empty")
    return flat({str(key): value for key, value in tree.items()})
