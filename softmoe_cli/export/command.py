"""`softmoe export`: a checkpoint as a folder that other programs understand. torch is imported for what was not made
before."""

import copy
from collections.abc import Sequence
from typing import Any

from softmoe_cli.config.commands import ExportConfig
from softmoe_cli.config.data import check_channels
from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError
from softmoe_cli.export.settings import settings_of_export
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door, plain
from softmoe_cli.programs import reply
from softmoe_cli.run.header import Source
from softmoe_cli.terminal import Screen


def export_as_typed(composed: Any, typed: list[str]) -> int:
    """`softmoe export`, from what Hydra composed and the words that were typed."""
    tree = plain(composed, ExportConfig)
    if tree["checkpoint"] == "???":
        raise UsageError("softmoe export needs checkpoint=: a run, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH")
    if tree["checkpoint"].startswith("timm:"):
        raise UsageError(f"checkpoint={tree['checkpoint']} is timm's own; softmoe export is for what softmoe trained")
    found = inherit.made_before("exported", tree, lambda source: _asked(copy.deepcopy(tree), source, typed))
    if found is not None:
        show_export(found, tree["format"])
        return 0
    source = inherit.named_source(tree["checkpoint"], tree["base"])
    from softmoe_cli.export.make import export

    model = inherit.model_of(source, tree["trust"])
    named = inherit.names_data(tree["data"])
    inherit.take_data(tree, source, typed)
    checked = door(tree, ExportConfig)
    check_channels(checked.data, model.in_chans)
    if not named:
        inherit.check_here(checked.data, source)
    show_export(export(checked, model, source), checked.format)
    return 0


def _asked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> inherit.Request | None:
    if tree["push"] is not None or tree["base"] is not None:
        return None
    inherit.take_data(tree, source, typed)
    checked, model = door(tree, ExportConfig), door(source.card["model"], Model)
    return inherit.Request(checked, model.name, lambda: settings_of_export(checked, model, source))


def show_export(receipt: dict[str, Any], form: str) -> None:
    """Prints a receipt as a table or as JSON."""
    if form == "json":
        reply(receipt)
        return
    rows = {"from": receipt["source"]["checkpoint"]}
    for name, found in receipt["programs"].items():
        rows[name] = f"outputs off by at most {found['max_difference']:.2g}, top-1 as the model's on "
        rows[name] += f"{found['same_top1']} of {receipt['images']} images"
    rows["outputs"] = f"up to {receipt['largest_output']:.3g}; images at a time: {receipt['images_at_a_time']}"
    rows["folder"] = receipt["folder"]
    if "pushed" in receipt:
        rows["pushed to"] = receipt["pushed"]
    Screen().table("export", rows)
