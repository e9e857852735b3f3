"""`softmoe cost`: formula, counter, memory and clock of models, as a table, JSON, CSV or Markdown."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config.commands import CostConfig
from softmoe_cli.cost.clock import Timing, measure, rank
from softmoe_cli.cost.flop import account_model, count_flop, on_meta
from softmoe_cli.cost.load import Load, load_of
from softmoe_cli.cost.memory import predict
from softmoe_cli.cost.served import extractable, of_one_task, served_tasks
from softmoe_cli.text import aligned, several

CONVENTION = (
    "1 multiply-add = 2 FLOPs; matrix products only, router, dispatch and combine included; FLOPs are per image, "
    "training is forward and backward; counter is torch's, on the meta device"
)
UNDIVIDED = "of a recomputed step the counter cannot tell the parts apart: its training column has the total alone"
CostRow = dict[str, Any]


def formula_row(config: CostConfig, vit: VisionTransformer) -> CostRow:
    """Everything about a model that needs no counting and no measuring. `vit` is the model on the meta device."""
    load = load_of(config)
    cost = account_model(vit, batch=load.part, recompute=load.recompute)
    memory = predict(load, config.devices, config.parallel)
    served = served_tasks(config.model, vit)
    return {
        "model": config.model.name,
        "image_size": config.model.image_size,
        "tokens": cost.tokens,
        "slots_per_token": cost.slots_per_token,
        "nominal_share": cost.nominal_share,
        "num_classes": load.num_classes,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "recompute": config.recompute,
        "precision": config.precision,
        "devices": config.devices,
        "parallel": config.parallel if config.devices > 1 else None,
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "served_params_m": fmean(each.params for each in served.values()) / 1e6 if served else None,
        "served_forward_gflop": fmean(each.forward_flop for each in served.values()) / 1e9 if served else None,
        "served": [
            {
                "task": name,
                "params_m": each.params / 1e6,
                "active_params_m": each.active_params / 1e6,
                "forward_gflop": each.forward_flop / 1e9,
                "latency_ms": None,
            }
            for name, each in served.items()
        ],
        "weight_mib": memory.weight_bytes / 2**20,
        "gradient_mib": memory.gradient_bytes / 2**20,
        "optimizer_mib": memory.optimizer_bytes / 2**20,
        "activation_mib": memory.activation_bytes / 2**20,
        "peak_mib": memory.peak_bytes / 2**20,
        "parts": [
            {
                "part": part.name,
                "params_m": part.params / 1e6,
                "active_params_m": part.active_params / 1e6,
                "forward_gflop": part.forward_flop / 1e9,
                "train_gflop": part.train_flop / 1e9,
            }
            for part in cost.parts
        ],
    }


def costs(configs: Sequence[CostConfig]) -> list[CostRow]:
    """A row per model: formula, counter, and the clock where asked for.

    Raises:
        UsageError: a model that cannot be built, counted or measured here.
    """
    rows, loads = [], [load_of(config) for config in configs]
    for config, load in zip(configs, loads, strict=True):
        vit = on_meta(load.model, load.num_classes)
        row = formula_row(config, vit)
        forward, step = count_flop(vit, batch=load.part, recompute=load.recompute)
        for key, seen in (("counter_forward_gflop", forward), ("counter_train_gflop", step)):
            row[key] = seen.flop / seen.images / 1e9
            own = seen.flop_by_part
            if config.model.adapter.name != "none" and seen is step:
                own = None  # where nothing is trained, the counter does not see which part a gradient goes through
                row["train_gflop"] = row[key]
            for each in row["parts"]:
                each[key] = None if own is None else own[each["part"]] / seen.images / 1e9
                if config.model.adapter.name != "none":
                    each["train_gflop"] = None
        row |= dict.fromkeys(CLOCK)
        rows.append(row)
    timed = [index for index, config in enumerate(configs) if config.clock]
    if timed:
        repeats = max(configs[index].repeats for index in timed)
        alone = {index: _alone(loads[index]) for index in timed}
        timings = iter(measure([each for index in timed for each in (loads[index], *alone[index])], repeats))
        for index in timed:
            rows[index] |= _clock_row(next(timings), loads[index].batch)
            for each in rows[index]["served"]:
                each["latency_ms"] = next(timings).latency_ms
    timed_rows = [rows[index] for index in timed]
    places = rank([(row["latency_ms"] / row["batch_size"], row["hardware"]) for row in timed_rows])
    for row, place in zip(timed_rows, places, strict=True):
        row["latency_rank"] = place
    return rows


def _alone(load: Load) -> list[Load]:
    """The same with each task alone, for a model that single tasks are taken out of."""
    if not extractable(load.model):
        return []
    model = of_one_task(load.model, on_meta(load.model, load.num_classes))
    return [replace(load, model=model, num_classes=classes) for classes in load.model.tasks.values()]


def _clock_row(timing: Timing, batch: int) -> CostRow:
    return {
        "latency_ms": timing.latency_ms,
        "latency_spread_ms": timing.latency_spread_ms,
        "images_per_s": 1000 * batch / timing.latency_ms,
        "train_step_ms": timing.train_step_ms,
        "train_step_spread_ms": timing.train_step_spread_ms,
        "train_images_per_s": 1000 * batch / timing.train_step_ms,
        "measured_peak_mib": None if timing.peak_bytes is None else timing.peak_bytes / 2**20,
        "hardware": timing.hardware,
        "torch": torch.__version__,
    }


CLOCK = (
    "latency_ms", "latency_spread_ms", "images_per_s", "train_step_ms", "train_step_spread_ms", "train_images_per_s",
    "measured_peak_mib", "latency_rank", "hardware", "torch",
)  # fmt: skip
"""Keys that only the clock fills."""

TABLE = {
    "params_m": "params M", "active_params_m": "active M", "forward_gflop": "forward GFLOP",
    "counter_forward_gflop": "counter", "train_gflop": "training GFLOP", "counter_train_gflop": "counter",
}  # fmt: skip
"""The columns of a table, and their heads."""


def show_costs(rows: list[CostRow], form: str, *, many: bool) -> str:
    """The rows as `form`: one model by part with a total, or a line per model."""
    if form == "json":
        return json.dumps([{"convention": CONVENTION, **row} for row in rows] if many else {
            "convention": CONVENTION, **rows[0]
        })  # fmt: skip
    lines = [{key: value for key, value in row.items() if key not in ("parts", "served")} for row in rows]
    if not many:
        lines = [*rows[0]["parts"], {"part": "total", **lines[0]}]
    if form == "csv":
        out = io.StringIO()
        keys = list(dict.fromkeys(key for line in reversed(lines) for key in line))
        writer = csv.DictWriter(out, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        return out.getvalue().rstrip("\n")
    first = "model" if many else "part"
    table = [[first, *TABLE.values()], *([line[first], *(_cell(line.get(key)) for key in TABLE)] for line in lines)]
    total = ["model", "batch", "devices", "peak MiB", "measured", "latency ms", "spread", "images/s", "step ms",
             "spread", "images/s", "rank"]  # fmt: skip
    keys = ["peak_mib", "measured_peak_mib", "latency_ms", "latency_spread_ms", "images_per_s", "train_step_ms",
            "train_step_spread_ms", "train_images_per_s", "latency_rank"]  # fmt: skip
    measured = [total]
    for row in rows:
        devices = f"{row['devices']} {row['parallel']}" if row["devices"] > 1 else ""
        measured.append([row["model"], str(row["batch_size"]), devices, *(_cell(row[key]) for key in keys)])
    where = dict.fromkeys(row["hardware"] for row in rows if row["hardware"])
    notes = CONVENTION if many else f"{CONVENTION}\n{rows[0]['model']}: {_about(rows[0])}"
    if any(row["recompute"] for row in rows) and not many:
        notes += "\n" + UNDIVIDED
    chapters = [notes, aligned(table, form == "markdown"), aligned(_filled(measured), form == "markdown")]
    if any(row["served"] for row in rows):
        chapters.append(aligned(_served_table(rows), form == "markdown"))
    if where:
        chapters.append("measured on " + "; ".join(where))
    return "\n\n".join(chapters)


def _served_table(rows: list[CostRow]) -> list[list[str]]:
    """What softmoe extract makes of each task of a model, below the whole of it."""
    keys = ("params_m", "active_params_m", "forward_gflop", "latency_ms")
    table = [["model", "served", "params M", "active M", "forward GFLOP", "latency ms"]]
    for row in rows:
        if row["served"]:
            for name, each in [("whole", row), *((f"{each['task']} alone", each) for each in row["served"])]:
                table.append([row["model"], name, *(_cell(each[key]) for key in keys)])
    return _filled(table)


def _about(row: CostRow) -> str:
    slots = "" if row["slots_per_token"] is None else f", {row['slots_per_token']:.2f} slots per token"
    share = row["nominal_share"]
    slots += "" if share in (None, 1.0) else f", {100 * share:.4g}% of choices by MLPs when the load is even"
    recompute = ", recomputed" if row["recompute"] else ""
    each = f" on each of {row['devices']} devices, {row['parallel']}" if row["devices"] > 1 else ""
    return (
        f"{row['image_size']} px, {row['tokens']} tokens{slots}; memory for {row['batch_size']} images in "
        f"{several(row['accumulate'], 'part')}{recompute}, {row['precision']}{each}: weights "
        f"{row['weight_mib']:,.1f} MiB, gradients {row['gradient_mib']:,.1f}, AdamW {row['optimizer_mib']:,.1f}, "
        f"activations {row['activation_mib']:,.1f}"
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def _filled(table: list[list[str]]) -> list[list[str]]:
    """The table without the columns that are empty."""
    keep = [i for i in range(len(table[0])) if any(row[i] for row in table[1:])]
    return [[row[i] for i in keep] for row in table]
