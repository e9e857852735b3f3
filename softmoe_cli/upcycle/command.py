"""`softmoe upcycle`: a dense model as a mixture of experts. torch is imported for what was not made before."""

import copy
from collections.abc import Sequence
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import UpcycleConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door, overlay, plain
from softmoe_cli.run.header import Source, has_moments
from softmoe_cli.terminal import Screen
from softmoe_cli.text import flop, patterns, si
from softmoe_cli.upcycle.settings import settings_of_upcycling


def upcycle_as_typed(config: Any, typed: list[str]) -> int:
    """`softmoe upcycle`, from what Hydra composed and the words that were typed."""
    tree = plain(config, UpcycleConfig)
    if tree["checkpoint"] == "???":
        raise UsageError(
            "softmoe upcycle needs checkpoint= of a dense model: a run folder, a .safetensors file, "
            "hf-hub:OWNER/NAME, timm:NAME or vmoe:PATH"
        )
    found = inherit.made_before("upcycled", tree, lambda source: _asked(copy.deepcopy(tree), source, typed))
    if found is not None:
        show_upcycle(found, tree["format"])
        return 0
    source = inherit.described_by_timm(inherit.source_of_layers(tree["checkpoint"], "upcycle"), tree["model"])
    from softmoe_cli.upcycle.make import upcycle

    named = inherit.names_data(tree["data"])
    checked = _checked(tree, source, typed)
    if not named:
        inherit.check_here(checked.data, source)
    show_upcycle(upcycle(checked, source), checked.format)
    return 0


def _checked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> UpcycleConfig:
    """The options, with what the checkpoint decides of them; held against its weights where they were read."""
    inherit.take_backbone(tree["model"], source, typed)
    tree["data"] = overlay(inherit.data_said(source, named=inherit.names_data(tree["data"])), tree["data"])
    inherit.take_model(tree, source, typed)
    if source.weights:
        inherit.require_own(tree, source)
    if tree["data"].get("name", "???") == "???":
        raise UsageError(f"checkpoint={source.label} names no images; choose some with data=, for the receipt")
    if tree["model"]["router"] == "???" or tree["model"]["router"]["_target_"] is None:
        raise UsageError(
            "softmoe upcycle needs a router: model/router=NAME with model.moe_blocks=last_N, or a named model as model="
        )
    return door(tree, UpcycleConfig)


def _asked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> inherit.Request | None:
    checked = _checked(tree, source, typed)
    carried = has_moments(source) if checked.carry_optimizer else False
    if carried is None:
        return None
    return inherit.Request(checked, checked.model.name, lambda: settings_of_upcycling(checked, carried=carried))


def show_upcycle(receipt: dict[str, Any], form: str) -> None:
    """Prints a receipt as a table or, without its key map, as JSON."""
    if form == "json":
        programs.reply({key: value for key, value in receipt.items() if key != "keys"})
        return
    before, after = receipt["cost"]["before"], receipt["cost"]["after"]
    fates: dict[str, int] = {}
    for fate in receipt["keys"].values():
        kind = "new" if fate["from"] is None else "copied" if fate["how"] == "copied" else "made from MLPs"
        fates[kind] = fates.get(kind, 0) + 1
    losses = "none: the head is new"
    if receipt["loss_before"] is not None:
        losses = f"{receipt['loss_before']:.4f} before, {receipt['loss_after']:.4f} after"
    rows = {
        "from": receipt["source"]["checkpoint"],
        "weights": ", ".join(f"{number} {kind}" for kind, number in fates.items()),
        "change": f"mean {receipt['mean_change']:.3g}, largest {receipt['max_change']:.3g}, in {receipt['outputs']} of "
        f"mean size {receipt['mean_size']:.3g} ({receipt['images']} images, {receipt['precision']})",
        "loss": losses,
        "optimizer": "starts afresh",
        "parameters": f"{si(before['params'])} before, {si(after['params'])} after, "
        f"{si(after['active_params'])} of them active per token",
        "cost per image": f"{flop(before['forward_flop'])} forward before, {flop(after['forward_flop'])} after",
        "folder": receipt["folder"],
    }
    if carried := receipt.get("optimizer"):
        fresh = f"; {', '.join(patterns(carried['fresh']))} start at zero" if carried["fresh"] else ""
        rows["optimizer"] = f"moments of {carried['tensors']} tensors after {carried['steps']:,} steps carried{fresh}"
    Screen().table("upcycle", rows)
