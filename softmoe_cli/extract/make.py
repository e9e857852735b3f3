"""Extracting: the new model computes what the old one does for some tasks; receipt.json says how that was found."""

import copy
import json
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.commands import ExtractConfig
from softmoe_cli.config.model import Model
from softmoe_cli.cost.flop import account
from softmoe_cli.data import batches, sets
from softmoe_cli.data.mix import classes_of_task
from softmoe_cli.device import arithmetic, hardware
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.export.make import hub_config
from softmoe_cli.extract.cut import outputs_of
from softmoe_cli.extract.forms import Made, one_task
from softmoe_cli.extract.settings import data_of, settings_of_extract, tasks_asked
from softmoe_cli.model.vit import build, portable, prepare
from softmoe_cli.model.weights import experts_left, load_weights
from softmoe_cli.prune.fold import timm_entry
from softmoe_cli.prune.smaller import compared, distance_in_float64, latencies
from softmoe_cli.run.checkpoint import digest_of, write_checkpoint
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import origin
from softmoe_cli.run.receipt import RECEIPT, already_made, folder_of, make_whole
from softmoe_cli.terminal import Screen

FURTHEST_OFF = 1e-12
"""The largest allowed difference of the new model's outputs in float64, as a share of the largest output."""
TIMM_READS = 1e-9
"""The same of what timm alone makes of a plain ViT, whose weights have been rounded to float32 for both."""


def extract(config: ExtractConfig, model: Model, source: Source) -> dict[str, Any]:
    """Writes the checkpoint of the extracted model and returns its receipt, with the folder it lies in.

    Raises:
        UsageError: a checkpoint, task or form that cannot work, or images of other classes; nothing was written.
        RunError: the new model does not compute what the old one does; nothing was written.
    """
    if "head.weight" not in source.weights:
        raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
    which = tasks_asked(config, model.tasks)
    device, _ = arithmetic(config.device, "fp32", config.threads)
    whole = build(model, len(source.weights["head.weight"]))
    load_weights(whole, source.weights, keep_head=True, allow_unexpected=[])
    made = Made.of(config.form, model, copy.deepcopy(whole).double().eval(), which)
    settings = settings_of_extract(config, which)
    folder = folder_of("extracted", config, made.model.name, source, settings)
    if (found := already_made(folder, source, settings, clock=config.clock)) is not None:
        Screen().say(f"{folder} holds this already; nothing to do")
        return found | {"folder": str(folder)}

    for own in config.data.of_sets():
        if own.name in which:
            sets.load_of_task(own, source.card["classes"])
    prepare(whole, device, "fp32")
    new = made.built(torch.float32)
    prepare(new, device, "fp32")
    weights = made.weights_as(torch.float32)
    receipt: dict[str, Any] = {"source": {"checkpoint": source.label, "digest": source.digest}, "settings": settings}
    receipt |= {"result": {"digest": digest_of(weights)}, "blocks": made.blocks(whole)}
    receipt["of_each"] = {
        name: _compared(config, model, made.model, (whole.to(device), new.to(device)), name, source) for name in which
    }
    receipt["float64_distance"] = _distance(made, config, model, whole, which)
    both = {"before": (model, whole), "after": (made.model, new)}
    costs = {
        when: account(each, vit.num_classes, left=experts_left(dict(vit.state_dict())))
        for when, (each, vit) in both.items()
    }
    receipt["cost"] = {when: cost.row for when, cost in costs.items()}
    receipt["bytes"] = {"before": _bytes(whole.state_dict()), "after": _bytes(weights)}
    classes = source.card["classes"]
    kept = [classes[i] for i in outputs_of(model.tasks, which)]
    card: dict[str, Any] = {"model": portable(made.model, new), "data": data_of(config.data, which).on_card()}
    card |= {"classes": classes_of_task(which[0], kept) if len(which) == 1 else kept}
    card |= {key: source.card[key] for key in ("loss", "precision")}
    card |= {"receipt": receipt, "origin": origin("extract", settings, source), "train_pflop": source.train_pflop}
    files: dict[str, Any] = {RECEIPT: receipt}
    if config.form == "dense":
        files["config.json"] = hub_config(made.model, new, card) | timm_entry(made.model)
    x = next(_batches(config, made.model, which[0])).images

    def write(temporary: Path) -> None:
        texts = {name: json.dumps(each, indent=1) + "\n" for name, each in files.items()}
        write_checkpoint(temporary, weights, card, {}, texts)
        if config.form == "dense":
            theirs = timm.create_model(f"local-dir:{temporary}", pretrained=True).eval().double()
            share, others = distance_in_float64(copy.deepcopy(new).cpu().double().eval(), theirs, x.cpu().double())
            if not share <= TIMM_READS or others:
                raise RunError(f"what timm loads is off by {share:.2g} in float64: an error of softmoe's")

    make_whole(folder, write)
    return receipt | {"folder": str(folder)}


def _distance(made: Made, config: ExtractConfig, model: Model, whole: VisionTransformer, which: list[str]) -> float:
    """How far outputs are off in float64 on the first images of each task.

    Raises:
        RunError: by more than rounding.
    """
    precise, new, most = copy.deepcopy(whole).cpu().double().eval(), made.built(torch.float64), 0.0
    for name in which:
        x = next(_batches(config, model, name)).images.cpu().double()
        share, _ = distance_in_float64(one_task(model, precise, name), one_task(made.model, new, name), x)
        most = max(most, share)
    if not most <= FURTHEST_OFF:
        raise RunError(f"the new model's outputs are off by {most:.2g} in float64: an error of softmoe's")
    return most


def _batches(config: ExtractConfig, model: Model, name: str, part: str = "validation") -> Any:
    """Batches of a part of the images of one task."""
    own = next(each for each in config.data.of_sets() if each.name == name)
    device, _ = arithmetic(config.device, "fp32", config.threads)
    return batches.eval_batches(
        getattr(sets.load(own), part), own, image_size=model.image_size, in_chans=model.in_chans,
        batch_size=config.batch_size, device=device,
    )  # fmt: skip


def _compared(
    config: ExtractConfig,
    model: Model,
    new_model: Model,
    both: tuple[VisionTransformer, VisionTransformer],
    name: str,
    source: Source,
) -> dict[str, Any]:
    """How far both models' outputs for one task are apart on its validation images, and their quality there; and on its
    test images, whose labels are not read, so that nothing is known of quality there."""
    one, other = one_task(model, both[0], name), one_task(new_model, both[1], name)
    said: Any = {"checkpoint": source.label, "loss": source.card["loss"]}
    found = compared(one.eval(), other.eval(), _batches(config, model, name), **said, labelled=True)
    found |= {"validation_images": found.pop("images"), "validation": found.pop("quality")}
    test = compared(one, other, _batches(config, model, name, "test"), **said, labelled=False)
    found["test"] = {key: test[key] for key in ("images", "max_change", "same_predictions_pct")}
    if config.clock:
        x = next(_batches(config, model, name)).images
        found["clock"] = latencies({"before": one, "after": other}, x, config.repeats)
        device, _ = arithmetic(config.device, "fp32", config.threads)
        found["clock"] |= {"images": len(x), "repeats": config.repeats, "hardware": hardware(device)}
    return found


def _bytes(weights: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in weights.values())
