"""`softmoe extract`: a model of one task, or of some, out of one that knows several; without training. torch is
imported for what was not made before."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import ExtractConfig, as_list
from softmoe_cli.config.data import Data, check_channels
from softmoe_cli.data.contents import identity
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door, plain
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import settings_of
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
    which = named(checked, model.tasks)
    for own in checked.data.of_sets():
        if own.name in which:  # no other task's images are looked at
            inherit.check_here(own, source)
    show_extracted(extract(checked, model, source), checked.format)
    return 0


def _asked(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> tuple[ExtractConfig, dict[str, Any]] | None:
    tasks = source.card["model"]["tasks"]
    if not tasks or inherit.names_data(tree["data"]):
        return None
    inherit.take_data(tree, source, typed)
    checked = door(tree, ExtractConfig)
    return checked, settings_of_extract(checked, named(checked, tasks))


def settings_of_extract(config: ExtractConfig, which: list[str]) -> dict[str, Any]:
    """What decides the result, beside the source's weights."""
    data = data_of(config.data, which)
    return {"tasks": which, "form": config.form, "data": settings_of(data) | {"identity": identity(data)}}


def named(config: ExtractConfig, tasks: Mapping[str, int]) -> list[str]:
    """The tasks to extract, in the order in which the model knows them.

    Raises:
        UsageError: there is no such task, or nothing would change.
    """
    which = as_list(config.task)
    for name in which:
        if name not in tasks:
            raise UsageError(f"task={name}: the checkpoint knows the tasks {', '.join(tasks)}.{nearest(name, tasks)}")
    if len(which) > 1 and config.form != "experts":
        raise UsageError(
            f"form={config.form} is of one task, since another one takes other experts with other gates; extract one "
            "at a time, or leave form=experts"
        )
    return [name for name in tasks if name in which]


def data_of(data: Data, which: list[str]) -> Data:
    """The sets of these tasks: of one, that set with its own pixels."""
    if len(which) == 1:
        return next(own for own in data.of_sets() if own.name == which[0])
    own_sets = {name: own for name, own in data.sets.items() if name in which}
    classes = sum(own["num_classes"] for own in own_sets.values())
    return replace(
        data, sets=own_sets, num_classes=classes, channels=max(own["channels"] for own in own_sets.values())
    ).settled()


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
