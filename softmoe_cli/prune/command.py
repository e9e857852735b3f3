"""`softmoe prune`: a trained mixture with fewer experts or, with one left, as a plain ViT; without training. Which
method this is after, and what is ours: README.md. torch is imported for what was not made before."""

import copy
from collections.abc import Sequence
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import PruneConfig
from softmoe_cli.config.data import check_channels
from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door, plain
from softmoe_cli.prune.settings import settings_of_pruning
from softmoe_cli.run.header import Source, read_header
from softmoe_cli.terminal import Screen
from softmoe_cli.text import flop, si


def prune_as_typed(config: Any, typed: list[str]) -> int:
    """`softmoe prune`, from what Hydra composed and the words that were typed."""
    tree = plain(config, PruneConfig)
    found = inherit.made_before("pruned", tree, lambda source: _asked(copy.deepcopy(tree), source, typed))
    if found is not None:
        show_pruned(found, tree["format"])
        return 0
    source, model = inherit.cut_from(tree, "prune", "has no experts to prune")
    from softmoe_cli.model.router import check_evaluated
    from softmoe_cli.prune.make import prune

    if model.tasks:
        raise UsageError(
            f"checkpoint={source.label} knows the tasks {', '.join(model.tasks)}; first make a model of one: softmoe "
            f"extract checkpoint={source.label} task=NAME"
        )
    named = inherit.names_data(tree["data"])
    inherit.take_data(tree, source, typed)
    checked = door(tree, PruneConfig)
    check_channels(checked.data, model.in_chans)
    check_evaluated("batch_size", checked.batch_size, model)
    if not named:
        inherit.check_here(checked.data, source)
    before = None if checked.before is None else inherit.named_source(checked.before)
    show_pruned(prune(checked, model, source, before), checked.format)
    return 0


def _asked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> inherit.Request | None:
    inherit.take_data(tree, source, typed)
    checked = door(tree, PruneConfig)
    before = None if checked.before is None else read_header(checked.before)
    if before is None and checked.before is not None:
        return None
    name = door(source.card["model"], Model).name
    return inherit.Request(checked, name, lambda: settings_of_pruning(checked, before))


def show_pruned(receipt: dict[str, Any], form: str) -> None:
    """Prints a receipt as a table or, without its key map, as JSON."""
    if form == "json":
        programs.reply({key: value for key, value in receipt.items() if key != "keys"})
        return
    settings, cost, quality = receipt["settings"], receipt["cost"], receipt["validation"]
    rows = {"from": receipt["source"]["checkpoint"]}
    for place, block in receipt["blocks"].items():
        stay, gone = (", ".join(map(str, block[key])) for key in ("kept", "dropped"))
        rows[f"block {place}"] = f"stays: {stay}" + (f"; goes: {gone}" if gone else "")
    if any("scores" in block for block in receipt["blocks"].values()):
        rows["by"] = settings["by"] + (
            f" on {receipt['scored_images']:,} training images" if receipt["scored_images"] else ""
        )
    rows["is now"] = "a plain ViT, which timm loads" if settings["to"] == "dense" else "a mixture of those"
    if quality["before"] is not None:
        rows["validation top-1"] = (
            f"{quality['before']['top1_pct']:.2f}% before, {quality['after']['top1_pct']:.2f}% after"
        )
        rows["validation loss"] = f"{quality['before']['loss']:.4f} before, {quality['after']['loss']:.4f} after"
    rows["outputs"] = (
        f"changed by up to {receipt['max_change']:.3g}; {receipt['same_predictions_pct']:.1f}% of "
        f"{receipt['validation_images']:,} predictions are the same"
    )
    before, after = cost["before"], cost["after"]
    rows["parameters"] = f"{si(before['params'])} before, {si(after['params'])} after"
    rows["cost per image"] = f"{flop(before['forward_flop'])} forward before, {flop(after['forward_flop'])} after"
    if "clock" in receipt:
        one, other = (receipt["clock"][when] for when in ("before", "after"))
        rows["latency"] = f"{one['latency_ms']:.4g} ms before, {other['latency_ms']:.4g} ms after"
        rows["latency"] += f" ({receipt['clock']['images']} images, {receipt['clock']['hardware']})"
    Screen().table("prune", rows | {"folder": receipt["folder"]})
