"""`softmoe extract`: a model of one task, or of some, out of one that knows several; without training. torch is
imported for what was not made before."""

import copy
from collections.abc import Sequence
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import ExtractConfig
from softmoe_cli.config.data import check_channels
from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError
from softmoe_cli.extract.settings import settings_of_extract, tasks_asked
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door, plain
from softmoe_cli.run.header import Source
from softmoe_cli.terminal import Screen
from softmoe_cli.text import flop, si


def extract_as_typed(config: Any, typed: list[str]) -> int:
    """`softmoe extract`, from what Hydra composed and the words that were typed."""
    tree = plain(config, ExtractConfig)
    found = inherit.made_before("extracted", tree, lambda source: _asked(copy.deepcopy(tree), source, typed))
    if found is not None:
        show_extracted(found, tree["format"])
        return 0
    source, model = inherit.cut_from(tree, "extract", "knows one task")
    from softmoe_cli.extract.make import extract
    from softmoe_cli.model.router import check_evaluated

    if not model.tasks:
        raise UsageError(f"checkpoint={source.label} knows one task; there is nothing to extract")
    if inherit.names_data(tree["data"]):
        raise UsageError("softmoe extract compares on the checkpoint's own sets; leave data= out (data.root= may stay)")
    inherit.take_data(tree, source, typed)
    checked = door(tree, ExtractConfig)
    check_channels(checked.data, model.in_chans)
    check_evaluated("batch_size", checked.batch_size, model)
    which = tasks_asked(checked, model.tasks)
    for own in checked.data.of_sets():
        if own.name in which:  # no other task's images are looked at
            inherit.check_here(own, source)
    show_extracted(extract(checked, model, source), checked.format)
    return 0


def _asked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> inherit.Request | None:
    tasks = source.card["model"].get("tasks")
    if not tasks or inherit.names_data(tree["data"]):
        return None
    inherit.take_data(tree, source, typed)
    checked = door(tree, ExtractConfig)
    which, name = tasks_asked(checked, tasks), door(source.card["model"], Model).name
    return inherit.Request(checked, name, lambda: settings_of_extract(checked, which))


def show_extracted(receipt: dict[str, Any], form: str) -> None:
    """Prints a receipt as a table or as JSON."""
    if form == "json":
        programs.reply(receipt)
        return
    settings, cost = receipt["settings"], receipt["cost"]
    screen, rows = Screen(), {"from": receipt["source"]["checkpoint"], "tasks": ", ".join(settings["tasks"])}
    for place, block in receipt["blocks"].items():
        kept = None if block["kept"] is None else ", ".join(map(str, block["kept"]))
        rows[f"block {place}"] = block.get("why") or f"experts {kept} stay, of {block['of']}"
    kind = {"experts": "a mixture of those", "dense": "a plain ViT, which timm loads"}
    rows["is now"] = kind.get(settings["form"], "a mixture with one expert in each block, as wide as those together")
    screen.table("extract", rows)
    for name, each in receipt["of_each"].items():
        outputs = (
            f"{name}: off by at most {max(each['max_change'], each['test']['max_change']):.2g}; "
            f"{each['same_predictions_pct']:.1f}% of {each['validation_images']:,} validation predictions and "
            f"{each['test']['same_predictions_pct']:.1f}% of {each['test']['images']:,} test predictions are the same"
        )
        screen.row("outputs", outputs)
        quality = (each["validation"][when]["top1_pct"] for when in ("before", "after"))
        screen.row("validation", f"{name}: top-1 {{:.2f}}% before, {{:.2f}}% after".format(*quality))
        if "clock" in each:
            one, other = (each["clock"][when] for when in ("before", "after"))
            latency = f"{name}: {one['latency_ms']:.4g} ms before, {other['latency_ms']:.4g} ms after"
            screen.row("latency", f"{latency} ({each['clock']['images']} images, {each['clock']['hardware']})")
    rows = {}
    rows["in float64"] = f"off by at most {receipt['float64_distance']:.2g} of the largest output"
    before, after = cost["before"], cost["after"]
    rows["parameters"] = f"{si(before['params'])} before, {si(after['params'])} after"
    rows["cost per image"] = f"{flop(before['forward_flop'])} forward before, {flop(after['forward_flop'])} after"
    rows["folder"] = receipt["folder"]
    for title, text in rows.items():
        screen.row(title, text)
