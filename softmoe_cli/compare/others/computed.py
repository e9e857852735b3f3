"""What `softmoe cost` computes of a timm model that a run names, where the run does not state it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import Row, number
from softmoe_cli.text import several

SAID_SIZES = {"image_size": ("img_size", "image_size"), "in_chans": ("in_chans",)}
"""What a run may say of its model, by the names that timm and others use."""


def with_computed(runs: Sequence[FinishedRun]) -> tuple[list[FinishedRun], list[str]]:
    """The runs, with what their model's name tells of their cost; a sentence for each model, and one for each that has
    no cost because timm knows no ViT of that name."""
    found, notes = [], dict[str, int]()
    for run in runs:
        name, chosen = run.row.get("backbone"), run.chosen
        if chosen is None or not isinstance(name, str):
            found.append(run)
            continue
        size, channels, classes = (_said(chosen, *keys) for keys in (*SAID_SIZES.values(), ("num_classes",)))
        whole = chosen.get("config.input_size")
        if isinstance(whole, list) and len(whole) == 3 and all(type(each) is int and each > 0 for each in whole):
            channels, _, size = whole  # which timm puts before img_size
        told = model_cost(name, size, channels, classes or run.row.get("classes"))
        if isinstance(told, str):
            note, costs = told, dict[str, float]()
        else:
            costs = {key: value for key, value in told.items() if run.row.get(key) is None}
            note = f"{', '.join(costs)} of {name} are computed, as softmoe cost does, and not stated"
        row, looks = run.row | costs, run.looks
        if "train_gflop" in costs and number(row.get("images")) and row.get("train_pflop") is None:
            row, *looks = [_trained(each, costs["train_gflop"]) for each in (row, *looks)]
            costs["train_pflop"] = row["train_pflop"]
            note = note.replace(" are computed", ", train_pflop (from images) are computed")
        if costs or isinstance(told, str):
            notes[note] = notes.get(note, 0) + 1
        found.append(replace(run, row=row | {"computed": sorted(costs)}, looks=looks))
    return found, [f"{several(count, 'run')}: {note}" for note, count in notes.items()]


def _trained(row: Row, gflop: float) -> Row:
    return row | {"train_pflop": row["images"] * gflop / 1e6}


def _said(chosen: Row, *names: str) -> int | None:
    value: Any = next((v for name in names if (v := chosen.get(f"config.{name}")) is not None), None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


@cache
def model_cost(name: str, size: int | None, channels: int | None, classes: int | None) -> dict[str, float] | str:
    """forward_gflop, train_gflop, params_m and active_params_m of a timm model, with one image at a time; or why there
    are none."""
    import timm  # takes seconds to import

    from softmoe_cli.config.adapter import AdapterOptions
    from softmoe_cli.config.model import Backbone, Model
    from softmoe_cli.cost.flop import account_model, on_meta
    from softmoe_cli.model.pretrained import timm_card

    if not timm.is_model(name.split(".")[0]):
        return f"{name} is no model of timm, and so no cost is computed for it"
    try:
        card = timm_card(name)["model"]
        parts = {"backbone": Backbone(**card["backbone"]), "adapter": AdapterOptions(**card["adapter"])}
        model = Model(**(card | parts))
        model = replace(model, image_size=size or model.image_size, in_chans=channels or model.in_chans)
        model.check()
        about = timm.get_pretrained_cfg(name)
        cost = account_model(on_meta(model, classes or about.num_classes), batch=1, recompute=False)
    except UsageError as error:
        return f"softmoe cost knows no cost of {name} ({error})"
    return {
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
    }
